"""A spool in Redis, shared by workers on many machines."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import secrets
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.checking import Count, Positive, Seconds, checks_arguments
from microbatch.errors import ConfigError, StorageError
from microbatch.spool.records import (
    KEEP,
    LOST,
    MAX_ALONE,
    OVERDUE,
    Counts,
    DeadLetter,
    Delivery,
    Found,
    Item,
    Job,
    Kept,
    Name,
    Spool,
    as_kept,
)
from microbatch.storage.redis import RedisStore, describe, is_about_rights, milliseconds, results_of, translated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from microbatch.spool.records import PutOutcome, Stage

logger: Final = logging.getLogger("microbatch")

PAGE: Final = 100  # most requests whose texts are read at once
_MAX_CONNECTIONS: Final = 16
_DELIVERY_FIELDS: Final = 6
_SAFE: Final = "noeviction"
_LEAST_MAJOR: Final = 7
_SECTION: Final = re.compile(r"^--- (\w+) ?(.*)\n", re.MULTILINE)


class RedisSpool(RedisStore, Spool):
    """A durable queue on a Redis server, 7.0 or later, but not a cluster. Each call is one script, which runs atomically.

    Each stage is a stream with a consumer group. Requests of a stage are taken in the order in which they came to it: those that
    failed come after those that waited there already; those given back uncounted keep their place unless they were in a job. Leases
    run by the server's clock.

    It is as durable as the server: with `appendonly yes` and `appendfsync always` requests survive a power cut; with
    `appendfsync everysec`, the server's default, all but those of the last second; without `appendonly`, only the death of workers
    and senders. Its `maxmemory-policy` has to be `noeviction`: a full server then refuses new requests, and still serves those that
    it has.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with the database number and credentials where needed; `valkey://` and `valkeys://`
            for Valkey.
        keep: Seconds for which answers are kept.
        max_alone: Number of single deliveries after which a request is dead.
        prefix: Prefix of all keys.
        timeout: Seconds for each of: connecting, each write, and each read.
        allow_eviction: Whether to use a server that drops keys when it is full. It may drop acknowledged requests and answers;
            `counts` then looks at every request to find those that are lost.

    Raises:
        ConfigError: The package redis is missing, the address is malformed, or a limit is below its minimum.
    """

    @checks_arguments
    def __init__(
        self,
        url: str,
        *,
        keep: Seconds = KEEP,
        max_alone: Count = MAX_ALONE,
        prefix: str = "microbatch:spool:",
        timeout: Positive = 5.0,
        allow_eviction: bool = False,
    ) -> None:
        super().__init__(url, prefix=prefix, timeout=timeout, max_connections=_MAX_CONNECTIONS)
        self._keep = keep
        self._max_alone = max_alone
        self._allow_eviction = allow_eviction
        self._evicts = False
        self._scripts: dict[str, Any] = {}

    async def open(self) -> None:
        """Connect, and log a warning if the server may lose data.

        Raises:
            ConfigError: The server cannot be reached or used, or drops keys when it is full.
        """
        self._client = self._connect()
        self._scripts = {name: self._client.register_script(text) for name, text in _scripts().items()}
        try:
            await self._check(self._client)
        except BaseException as error:
            await self.aclose()
            if isinstance(error, StorageError):
                raise ConfigError(f"the spool cannot be used: {error}") from error
            raise

    async def _check(self, client: Any) -> None:
        """Check the server's version and settings, as INFO shows them: managed servers often refuse CONFIG."""
        with translated():
            server = await describe(client)
        if server.cluster:
            raise ConfigError("the spool cannot be used: it needs a Redis server that is not part of a cluster")
        if server.replica:
            raise ConfigError(
                "the spool cannot be used: this Redis server is a replica, which takes no writes; give the address of the primary"
            )
        try:
            with translated():
                await client.script_load(_scripts()["put"])
        except StorageError as error:
            old = not is_about_rights(error) and (server.major or 0) < _LEAST_MAJOR
            need = f"; it needs Redis 7.0 or later, and this is {server.version or 'another'}" if old else ""
            raise ConfigError(f"the spool cannot be used: its scripts cannot be loaded: {error}{need}") from error
        try:
            with translated():
                info = await client.info()
            dangers = list(_dangers(info))
        except StorageError as error:
            info, dangers = {}, [f"whether it keeps its data could not be checked ({error})"]
        policy = info.get("maxmemory_policy", _SAFE)
        self._evicts = bool(info.get("maxmemory")) and policy != _SAFE
        if self._evicts and not self._allow_eviction:
            raise ConfigError(
                f"the spool cannot be used: under its maxmemory-policy {policy} the server drops requests and answers when it is full. "
                f"Set maxmemory-policy to {_SAFE}, or use another server than that of a cache; "
                "RedisSpool(allow_eviction=True) takes the risk"
            )
        if dangers:
            logger.warning("the spool in Redis may lose data: %s", "; ".join(dangers))

    async def _run(self, name: str, *args: str | bytes | int) -> Any:
        self._opened()
        with translated():
            return await self._scripts[name](args=(self._prefix, self._max_alone, *args))

    async def put(self, items: Sequence[Item]) -> list[PutOutcome]:
        rows = ((item.name.key, item.digest, item.payload) for item in items)
        return [outcome.decode() for outcome in await self._run("put", *_flat(rows))]

    async def take(self, stage: Stage, most: int, *, lease: float) -> list[Delivery]:
        return _deliveries(await self._run("take", int(stage), most, milliseconds(lease), secrets.token_hex(8)))

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float) -> None:
        await self._run("renew", milliseconds(lease), *_held(deliveries))

    async def finish(self, results: Sequence[tuple[Delivery, bytes]]) -> None:
        rows = ((delivery.item.name.key, delivery.item.digest, result) for delivery, result in results)
        await self._run("finish", milliseconds(self._keep), *_flat(rows))

    async def give_back(self, deliveries: Sequence[Delivery], *, error: str, counted: bool) -> None:
        await self._run("give_back", as_kept(error), int(counted), *_held(deliveries))

    async def find(self, names: Sequence[Name]) -> list[Found]:
        return [_found(*row) for row in await self._run("find", *(name.key for name in names))]

    async def counts(self) -> Counts:
        full, half, alone, leased, in_job, done, dead, age, lost = await self._run("counts", int(self._evicts))
        counts = Counts((full, half, alone), leased, in_job, done, dead, lost=lost)
        return msgspec.structs.replace(counts, oldest=max(0, age) / 1000) if counts.depth else counts

    async def export(self) -> AsyncIterator[Kept]:
        """Yield everything stored, in the order in which it was put."""
        async for key, (state, result, error, deliveries, payload) in self._pages(
            "names", "state", "result", "error", "deliveries", "payload"
        ):
            if state is not None:
                yield Kept(Name.of(key), _found(state, result, error), int(deliveries), payload)

    async def dead_letters(self) -> AsyncIterator[DeadLetter]:
        await self._run("pass_on_lost")
        async for key, (state, digest, payload, deliveries, error, died_at) in self._pages(
            "dead", "state", "digest", "payload", "deliveries", "error", "died_at"
        ):
            if state == b"dead":
                item = Item(Name.of(key), digest, payload)
                yield DeadLetter(item, int(deliveries), error.decode(), float(died_at))

    async def _pages(self, index: str, *fields: str) -> AsyncIterator[tuple[bytes, list[Any]]]:
        """Yield each name's key in *index*, with *fields* of the request. Scores differ, so pages neither overlap nor leave gaps."""
        last = "-inf"
        while True:
            client = self._opened()
            with translated():
                page = await client.zrange(
                    self._prefix + index, last, "+inf", byscore=True, offset=0, num=PAGE, withscores=True
                )
                if not page:
                    return
                pipeline = client.pipeline(transaction=False)
                for key, _ in page:
                    pipeline.hmget(f"{self._prefix}item:".encode() + key, fields)
                rows = await results_of(pipeline)
            for (key, _), row in zip(page, rows, strict=True):
                yield key, row
            last = f"({page[-1][1]:.0f}"

    async def requeue(self, names: Sequence[Name] | None = None) -> int:
        keys = [] if names is None else [name.key for name in names]
        return int(await self._run("requeue", int(names is None), *keys))

    async def begin_job(self, job: Job, deliveries: Sequence[Delivery], *, lease: float) -> None:
        await self._run("begin_job", milliseconds(lease), *_job(job), *_held(deliveries))

    async def update_job(self, job: Job) -> None:
        await self._run("update_job", *_job(job))

    async def take_jobs(self, most: int, *, lease: float) -> list[Job]:
        return [
            Job(token.decode(), content, None if batch_id is None else batch_id.decode())
            for token, content, batch_id in await self._run("take_jobs", most, milliseconds(lease))
        ]

    async def renew_jobs(self, tokens: Sequence[str], *, lease: float) -> None:
        await self._run("renew_jobs", milliseconds(lease), *tokens)

    async def job_items(self, token: str) -> list[Delivery]:
        return _deliveries(await self._run("job_items", token))

    async def end_job(self, token: str, *, error: str) -> None:
        await self._run("end_job", token, as_kept(error))


@functools.cache
def _scripts() -> dict[str, str]:
    """Return the scripts in redis.lua by name."""
    text = (resources.files(__package__) / "redis.lua").read_text("utf-8")
    text = text.replace("$LOST", LOST).replace("$OVERDUE", f"{1000 * OVERDUE:.0f}")
    shared, *sections = _SECTION.split(text)
    return {
        name: f"#!lua{f' flags={flag}' if flag else ''}\n{shared}{body}"
        for name, flag, body in zip(*(sections[start::3] for start in range(3)), strict=True)
    }


def _dangers(info: dict[str, Any]) -> Iterator[str]:
    """Yield the reasons why a server with that *info* may lose data."""
    if not info.get("aof_enabled"):
        yield "without `appendonly yes` a request that was put survives the death of its worker, but not the server's"
    policy = info.get("maxmemory_policy")
    if policy is None:
        yield "its behaviour when it is full could not be checked"
    elif policy != _SAFE:
        yield f"under its maxmemory-policy {policy} it may drop requests or answers"


def _flat(rows: Iterable[tuple[str | bytes, ...]]) -> Iterator[str | bytes]:
    return itertools.chain.from_iterable(rows)


def _held(deliveries: Sequence[Delivery]) -> Iterator[str | bytes]:
    return _flat((delivery.item.name.key, delivery.lease) for delivery in deliveries)


def _job(job: Job) -> tuple[str | bytes | int, ...]:
    return job.token, job.content, int(job.batch_id is not None), job.batch_id or ""


def _deliveries(flat: list[Any]) -> list[Delivery]:
    return [
        Delivery(Item(Name.of(key), digest, payload), deliveries, lease.decode(), float(queued_at))
        for key, digest, payload, deliveries, queued_at, lease in zip(*[iter(flat)] * _DELIVERY_FIELDS, strict=True)
    ]


def _found(state: bytes | None, result: bytes | None, error: bytes | None) -> Found:
    if state is None:
        return Found("unknown")
    decoded: Any = state.decode()
    return Found(decoded, result, None if error is None else error.decode())
