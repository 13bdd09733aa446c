"""A spool in Redis: workers on many machines share it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import secrets
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.errors import ConfigError, StorageError
from microbatch.policy import at_least, whole
from microbatch.spool import redis_scripts as scripts
from microbatch.spool.records import (
    KEEP,
    MAX_ALONE,
    Counts,
    DeadLetter,
    Delivery,
    Found,
    Item,
    Job,
    Kept,
    Name,
    as_kept,
)
from microbatch.storage.redis import connect, results_of, translated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from microbatch.spool.records import PutOutcome, Stage

logger = logging.getLogger("microbatch")

PAGE: Final = 100
"""Most requests whose texts are read at once."""

_LONGEST: Final = 100 * 365 * 86_400.0  # the server refuses times that do not fit its integers
_MAX_CONNECTIONS: Final = 16
_DELIVERY_FIELDS: Final = 6
_SAFE: Final = "noeviction"


class RedisSpool:
    """A durable queue on a Redis server, 7.0 or later, but no cluster. Each call is one script, which the server runs as a whole.

    Each stage is a stream with a consumer group. Requests of a stage are taken in the order in which they came to it: those that
    failed come after those that waited there already, those given back uncounted keep their place unless they were in a job. Leases
    run by the server's clock.

    It is as durable as the server: with `appendonly yes` and `appendfsync always` what was put survives a power cut; with
    `appendfsync everysec`, the server's default, all but the last second of it; without `appendonly`, only the death of workers
    and whoever put it. Its `maxmemory-policy` has to be `noeviction`: a full server then refuses new requests, and goes on to
    serve those that it has.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with the number of the database and credentials if need be.
        keep: Seconds that answers are kept.
        max_alone: Deliveries alone after which a request is dead.
        prefix: What the names of all keys begin with.
        timeout: Seconds for each of: connecting, each write, and each read.
        allow_eviction: Whether a server may be used that drops keys for want of room. It may drop requests and answers that were
            acknowledged; `counts` then looks at every request to tell how many are lost.

    Raises:
        ConfigError: The package redis is missing, the address is malformed, or a limit is below its minimum.
    """

    def __init__(
        self,
        url: str,
        *,
        keep: float = KEEP,
        max_alone: int = MAX_ALONE,
        prefix: str = "microbatch:spool:",
        timeout: float = 5.0,
        allow_eviction: bool = False,
    ) -> None:
        at_least(0, keep=keep)
        at_least(0.001, timeout=timeout)
        whole(1, max_alone=max_alone)
        if not isinstance(prefix, str):
            raise ConfigError(f"prefix must be a str, got {prefix!r}")
        self._keep = keep
        self._max_alone = max_alone
        self._prefix = prefix
        self._allow_eviction = allow_eviction
        self._evicts = False
        self._connect: Callable[[], Any] = functools.partial(
            connect, url, timeout=timeout, max_connections=_MAX_CONNECTIONS
        )
        self._connect()  # nothing is sent; a malformed address is told now
        self._client: Any = None
        self._scripts: dict[str, Any] = {}

    def __repr__(self) -> str:
        """Tell the names it uses, but not the address: it may hold a password."""
        return f"<RedisSpool: {self._prefix}*, {'closed' if self._client is None else 'open'}>"

    async def open(self) -> None:
        """Connect, and warn once if the server may lose what it is given.

        Raises:
            ConfigError: The server cannot be reached or used, or drops keys for want of room.
        """
        client = self._connect()
        try:
            with translated():
                await client.ping()
            await self._check(client)
        except BaseException as error:
            with contextlib.suppress(StorageError), translated():
                await client.aclose()
            if isinstance(error, StorageError):
                raise ConfigError(f"the spool cannot be used: {error}") from error
            raise
        self._client = client
        self._scripts = {}

    async def _check(self, client: Any) -> None:
        """Warn of what the server may lose.

        INFO tells it; managed servers often refuse CONFIG.

        Raises:
            ConfigError: The server is too old, part of a cluster, or drops keys for want of room and that is not allowed.
        """
        try:
            with translated():
                await client.script_load(scripts.PUT)
        except StorageError as error:
            raise ConfigError(f"the spool cannot be used: it needs Redis 7.0 or later ({error})") from error
        try:
            with translated():
                info = await client.info()
        except StorageError as error:
            info = {}
            told = [f"whether it keeps what it is given could not be checked ({error})"]
        else:
            told = list(_dangers(info))
        if info.get("redis_mode") == "cluster":
            raise ConfigError("the spool cannot be used: it needs a Redis server that is not part of a cluster")
        policy = info.get("maxmemory_policy", _SAFE)
        self._evicts = bool(info.get("maxmemory")) and policy != _SAFE
        if self._evicts and not self._allow_eviction:
            raise ConfigError(
                f"the spool cannot be used: under its maxmemory-policy {policy} the server drops requests and answers when it is full. "
                f"Set maxmemory-policy to {_SAFE}, or use another server than that of a cache; "
                "RedisSpool(allow_eviction=True) takes the risk"
            )
        if told:
            logger.warning("the spool in Redis may lose what it is given: %s", "; ".join(told))

    async def aclose(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(StorageError), translated():
                await client.aclose()

    def _opened(self) -> Any:
        if self._client is None:
            raise StorageError("the spool in Redis is not open")
        return self._client

    async def _run(self, script: str, *args: str | bytes | int) -> Any:
        client = self._opened()
        runs = self._scripts.get(script)
        if runs is None:
            runs = self._scripts[script] = client.register_script(script)
        with translated():
            return await runs(args=(self._prefix, self._max_alone, *args))

    # --- requests

    async def put(self, items: Sequence[Item]) -> list[PutOutcome]:
        """Queue *items*; once this returns they are as durable as the server. The first of several with one name counts."""
        if not items:
            return []
        rows = [(item.name.key, item.digest, item.payload) for item in items]
        return [outcome.decode() for outcome in await self._run(scripts.PUT, *_flat(rows))]

    async def take(self, stage: Stage, most: int, *, lease: float) -> list[Delivery]:
        """Take up to *most* requests of *stage* for *lease* seconds, in the order in which they came to it."""
        return _deliveries(await self._run(scripts.TAKE, int(stage), most, _ms(lease), secrets.token_hex(8)))

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float) -> None:
        """Hold *deliveries* for *lease* seconds from now; those that others may have by now are passed over."""
        if deliveries:
            await self._run(scripts.RENEW, _ms(lease), *_held(deliveries))

    async def finish(self, results: Sequence[tuple[Delivery, bytes]]) -> None:
        """Store the results and acknowledge the requests, in one script; the first result of a request stays."""
        if results:
            rows = [(delivery.item.name.key, delivery.item.digest, result) for delivery, result in results]
            await self._run(scripts.FINISH, _ms(self._keep), *_flat(rows))

    async def give_back(self, deliveries: Sequence[Delivery], *, error: str, counted: bool) -> None:
        """Put requests back that were not answered: on their next stage if *counted*, else where they were."""
        if deliveries:
            await self._run(scripts.GIVE_BACK, as_kept(error), int(counted), *_held(deliveries))

    # --- looking

    async def find(self, names: Sequence[Name]) -> list[Found]:
        """Return what is known of each of *names*."""
        rows = await self._run(scripts.FIND, *(name.key for name in names)) if names else []
        return [_found(*row) for row in rows]

    async def counts(self) -> Counts:
        """Return how many requests are where."""
        full, half, alone, leased, in_job, done, dead, age, lost = await self._run(scripts.COUNTS, int(self._evicts))
        counts = Counts((full, half, alone), leased, in_job, done, dead, lost=lost)
        return msgspec.structs.replace(counts, oldest=max(0, age) / 1000) if counts.depth else counts

    async def export(self) -> AsyncIterator[Kept]:
        """Yield everything that is kept, in the order in which it was put."""
        async for key, (state, result, error, deliveries, payload) in self._pages(
            "names", "state", "result", "error", "deliveries", "payload"
        ):
            if state is not None:
                yield Kept(Name.of(key), _found(state, result, error), int(deliveries), payload)

    async def _read(self, keys: Sequence[str | bytes], *fields: str) -> list[list[Any]]:
        """Return *fields* of each of the requests, None where there is none."""
        pipeline = self._opened().pipeline(transaction=False)
        for key in keys:
            pipeline.hmget(self._item_key(key), fields)
        with translated():
            rows: list[list[Any]] = await results_of(pipeline) if keys else []
        return rows

    def _item_key(self, key: str | bytes) -> bytes:
        return f"{self._prefix}item:".encode() + (key if isinstance(key, bytes) else key.encode())

    async def _pages(self, index: str, *fields: str) -> AsyncIterator[tuple[bytes, list[Any]]]:
        """Yield the key of each name in *index*, and *fields* of the request; scores differ, so pages neither overlap nor gape."""
        last = "-inf"
        while True:
            client = self._opened()
            with translated():
                page = await client.zrange(
                    self._prefix + index, last, "+inf", byscore=True, offset=0, num=PAGE, withscores=True
                )
            if not page:
                return
            last = f"({page[-1][1]:.0f}"
            keys = [key for key, _ in page]
            for row in zip(keys, await self._read(keys, *fields), strict=True):
                yield row

    # --- dead letters

    async def dead_letters(self) -> AsyncIterator[DeadLetter]:
        """Yield the dead letters, oldest first; those whose last lease has run out by now are among them."""
        await self._run(scripts.PASS_ON_LOST)
        async for key, (state, digest, payload, deliveries, error, died_at) in self._pages(
            "dead", "state", "digest", "payload", "deliveries", "error", "died_at"
        ):
            if state == b"dead":
                item = Item(Name.of(key), digest, payload)
                yield DeadLetter(item, int(deliveries), error.decode(), float(died_at))

    async def requeue(self, names: Sequence[Name] | None = None) -> int:
        """Queue dead letters anew, as if they had never been delivered: those of *names*, or all; return how many."""
        keys = [] if names is None else [name.key for name in names]
        return int(await self._run(scripts.REQUEUE, int(names is None), *keys))

    # --- batch jobs at the provider

    async def begin_job(self, job: Job, deliveries: Sequence[Delivery], *, lease: float) -> None:
        """Record *job*, held for *lease* seconds, and tie *deliveries* to it; those that others may have by now are passed over."""
        await self._run(scripts.BEGIN_JOB, _ms(lease), *_job(job), *_held(deliveries))

    async def update_job(self, job: Job) -> None:
        """Record what is known of *job* by now; nothing, if it has ended."""
        await self._run(scripts.UPDATE_JOB, *_job(job))

    async def take_jobs(self, most: int, *, lease: float) -> list[Job]:
        """Take up to *most* jobs that nobody holds, for *lease* seconds."""
        return [
            Job(token.decode(), content, None if batch_id is None else batch_id.decode())
            for token, content, batch_id in await self._run(scripts.TAKE_JOBS, most, _ms(lease))
        ]

    async def renew_jobs(self, tokens: Sequence[str], *, lease: float) -> None:
        """Hold jobs for *lease* seconds from now."""
        if tokens:
            await self._run(scripts.RENEW_JOBS, _ms(lease), *tokens)

    async def job_items(self, token: str) -> list[Delivery]:
        """Return the requests that are still tied to a job, in the order in which they were put."""
        return _deliveries(await self._run(scripts.JOB_ITEMS, token))

    async def end_job(self, token: str, *, error: str) -> None:
        """Forget a job. Requests still tied to it are given back as counted, with *error*."""
        await self._run(scripts.END_JOB, token, as_kept(error))


def _dangers(info: dict[str, Any]) -> Iterator[str]:
    """Yield why a server that tells *info* of itself may lose what it is given."""
    if not info.get("aof_enabled"):
        yield "without `appendonly yes` a request that was put survives the death of its worker, but not the server's"
    policy = info.get("maxmemory_policy")
    if policy is None:
        yield "what it does when it is full could not be checked"
    elif policy != _SAFE:
        yield f"under its maxmemory-policy {policy} it may drop requests or answers"


def _ms(seconds: float) -> int:
    return round(min(seconds, _LONGEST) * 1000)


def _flat(rows: Sequence[tuple[str | bytes, ...]]) -> Iterator[str | bytes]:
    return itertools.chain.from_iterable(rows)


def _held(deliveries: Sequence[Delivery]) -> Iterator[str | bytes]:
    return _flat([(delivery.item.name.key, delivery.lease) for delivery in deliveries])


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
    told: Any = state.decode()
    return Found(told, result, None if error is None else error.decode())
