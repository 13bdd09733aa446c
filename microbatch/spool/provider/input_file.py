"""Composes the input file of a provider batch from spooled requests.

Requests share a prompt exactly where live ones would. Nothing is learned here from earlier calls, so upper bounds keep prompts within
their limits: a text is counted as if each byte were a token.
"""

from __future__ import annotations

import asyncio
import secrets
import zlib
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from microbatch.batching.bounds import Bounds
from microbatch.batching.estimates import Estimates
from microbatch.batching.lane_history import LaneHistory
from microbatch.batching.overhead import MAX_COUNTED_CHARS
from microbatch.batching.request import check_messages, read_messages, spec_of
from microbatch.errors import ConfigError, StorageError
from microbatch.prompt.codec import ChatCodec
from microbatch.prompt.compose import ID_TOKENS, LINE_OVERHEAD_BYTES, item_line
from microbatch.prompt.message_forms import copy_of
from microbatch.prompt.parameters import HARMLESS
from microbatch.spool.payload import Payload
from microbatch.spool.provider.api import ENDPOINT
from microbatch.spool.records import Name, Stage

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence

    from microbatch.batching.request import Options
    from microbatch.messages import Messages
    from microbatch.policy import FlushPolicy
    from microbatch.prompt.ids import IdKey
    from microbatch.spool.records import Delivery
    from microbatch.transports.chat_wire import BatchWire

    Rejected = tuple[Delivery, str]

MAX_LINES: Final = 50_000
MAX_FILE_BYTES: Final = 200_000_000  # OpenAI's limits for one file
_AROUND_BYTES: Final = 256  # most bytes of a line without its body
_SLICE: Final = 64  # requests read, or lines written, between turns of the event loop


class Line(msgspec.Struct, frozen=True, array_like=True):
    """A line of a batch's file.

    Attributes:
        names: Its requests, in order.
        ids: Their ids in the prompt, that of the canary last; empty for a single call.
        sizes: The bytes of each request's text there, by which the cost is divided.
        canary: The word that the canary has to be answered with; None without a canary.
    """

    custom_id: str
    names: list[Name]
    ids: list[str] = []
    sizes: list[int] = []
    canary: str | None = None


class Content(msgspec.Struct, frozen=True, array_like=True):
    """The record of a job, made at *begun_at* (seconds since 1970), before anything of it exists at the provider."""

    begun_at: float
    lines: list[Line]
    packed: bytes

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Return the content that was encoded as *raw*; raise `StorageError` if it is damaged."""
        try:
            return msgspec.msgpack.decode(raw, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StorageError(f"a recorded batch job is damaged ({type(error).__name__})") from None

    def encode(self) -> bytes:
        """Return the bytes to record."""
        return msgspec.msgpack.encode(self)

    async def file(self) -> bytes:
        """Return the file's bytes."""
        return await asyncio.to_thread(zlib.decompress, self.packed)

    def __repr__(self) -> str:
        return f"Content(lines=<{len(self.lines)}>)"  # without any text


class Asked(msgspec.Struct):
    """A spooled request that was read.

    Attributes:
        key: Equal keys may share a prompt; None if the request is sent alone.
        line: Its text as a line of a prompt; b"" if it cannot be combined.
        texts: Its messages as a combined prompt has them.
    """

    delivery: Delivery
    messages: list[dict[str, Any]]
    options: Options
    key: Hashable = None
    line: bytes = b""
    texts: Messages = ()

    @property
    def stage(self) -> Stage:
        """The stage of its delivery."""
        return Stage.after(self.delivery.deliveries - 1)


class Draft:
    """A job that is being composed; `token` is its unique name."""

    def __init__(self) -> None:
        self.token: str = secrets.token_hex(8)
        self.lines: list[Line] = []
        self.deliveries: list[Delivery] = []
        self._rows: list[bytes] = []
        self._size = 0

    def has_room(self, body: bytes) -> bool:
        """Return whether the file can take a line with *body*."""
        return len(self.lines) < MAX_LINES and self._size + len(body) + _AROUND_BYTES <= MAX_FILE_BYTES

    def add(self, batch: Sequence[Asked], ids: list[str], canary: str | None, body: bytes) -> None:
        """Add the line of *batch*; *ids* and *canary* as in `Line`."""
        custom_id = f"{self.token}-{len(self.lines) + 1}"
        names = [each.delivery.item.name for each in batch]
        sizes = [len(each.line) for each in batch] if ids else []
        self.lines.append(Line(custom_id, names, ids, sizes, canary))
        self.deliveries += [each.delivery for each in batch]
        row = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": msgspec.Raw(body)}
        self._rows.append(msgspec.json.encode(row) + b"\n")
        self._size += len(self._rows[-1])

    async def content(self, begun_at: float) -> Content:
        """Return what to record of it."""
        return Content(begun_at, self.lines, await asyncio.to_thread(zlib.compress, b"".join(self._rows)))


def _byte_count(text: str) -> int:
    return len(text.encode())


def read(delivery: Delivery, harmless: Collection[str] = HARMLESS) -> Asked:
    """Read a spooled request; raise `StorageError` if it is damaged, and `ConfigError` if it cannot be sent.

    Parameters other than the *harmless* keep it alone.
    """
    payload = Payload.decode(delivery.item.payload)
    options = payload.options(delivery.item.name.tenant, harmless)
    check_messages(payload.messages)
    shared = "" if options.alone else read_messages(payload.messages, options)
    if isinstance(shared, str):
        return Asked(delivery, payload.messages, options)
    key, text, texts = shared
    line = item_line(text)
    return Asked(delivery, payload.messages, options, key if len(line) <= MAX_COUNTED_CHARS else None, line, texts)


class Composer:
    """Composes jobs.

    Args:
        wire: Writes the bodies of lines.
        policy: Says how much one prompt may hold.
        canary: Whether each combined prompt ends in a canary.
        key: The key of the ids; None for that of this process.
    """

    def __init__(self, wire: BatchWire, policy: FlushPolicy, *, canary: bool = False, key: IdKey | None = None) -> None:
        self._wire = wire
        self._codec = ChatCodec(key=key, canary=canary)
        self._bounds = Bounds(wire.model, canary=canary)
        self._policy, self._estimates = policy, Estimates(_byte_count, self._bounds, canary=canary)
        self._harmless = HARMLESS.union(policy.combine_params)

    async def drafts(self, deliveries: Sequence[Delivery]) -> tuple[list[Draft], list[Rejected]]:
        """Return the jobs for *deliveries*, at least one per model, and the requests that cannot be sent, with the reasons.

        Raises:
            ConfigError: A request names no model, and the transport has none.
        """
        groups, rejected = await self._read(deliveries)
        drafts: list[Draft] = []
        latest: dict[str, Draft] = {}
        for number, batch in enumerate(chain.from_iterable(map(self._filled, groups)), 1):
            fields, ids, canary = self._written(batch)
            model, body = fields["model"], msgspec.json.encode(fields)
            draft = latest.get(model)
            if draft is None or not draft.has_room(body):
                draft = latest[model] = Draft()
                drafts.append(draft)
            if draft.has_room(body):
                draft.add(batch, ids, canary, body)
            else:
                rejected += [(each.delivery, "it is larger than a provider's whole file") for each in batch]
            if number % _SLICE == 0:
                await asyncio.sleep(0)
        return [draft for draft in drafts if draft.lines], rejected

    async def _read(self, deliveries: Iterable[Delivery]) -> tuple[list[list[Asked]], list[Rejected]]:
        """Return the groups of requests that may share a prompt, and the requests that cannot be read, with the reasons."""
        groups: dict[Hashable, list[Asked]] = {}
        rejected: list[Rejected] = []
        for number, delivery in enumerate(deliveries, 1):
            try:
                asked = read(delivery, self._harmless)
            except (ConfigError, StorageError) as error:
                rejected.append((delivery, str(error)))
            else:
                alone = asked.key is None or asked.stage is Stage.ALONE
                groups.setdefault(delivery.item.name if alone else (asked.stage, asked.key), []).append(asked)
            if number % _SLICE == 0:
                await asyncio.sleep(0)
        return list(groups.values()), rejected

    def _filled(self, lane: list[Asked]) -> Iterator[list[Asked]]:
        """Yield batches of *lane* within its limits; a request that exceeds them by itself is yielded alone."""
        if len(lane) == 1:
            yield lane
            return
        spec = spec_of(lane[0].texts[:-1], lane[0].options)
        budget = self._estimates.budget(self._policy, spec, LaneHistory())
        size = max(1, budget.size // 2) if lane[0].stage is Stage.HALF else budget.size
        batch: list[Asked] = []
        total = 0
        for each in lane:
            needed = len(each.line) + LINE_OVERHEAD_BYTES + ID_TOKENS
            if batch and (len(batch) >= size or total + needed > budget.tokens):
                yield batch
                batch, total = [], 0
            batch.append(each)
            total += needed
        yield batch

    def _written(self, batch: list[Asked]) -> tuple[dict[str, Any], list[str], str | None]:
        """Return the body of a line, the ids in it, and the word of its canary; a single call has neither."""
        options, messages = batch[0].options, batch[0].messages
        if len(batch) == 1:
            call = self._codec.compose_alone(options, options.answer, messages)
            return self._wire.body(call), [], None
        lines = [each.line for each in batch]
        shared = copy_of(batch[0].texts[:-1])
        apart = (
            options.tenant,
            int(batch[0].stage),
        )  # a batch that is as small as half a batch is asked again as it is
        combined = self._codec.compose(options, shared, lines, self._bound(options, len(batch)), apart=apart)
        return self._wire.body(combined.call), combined.ids, combined.canary

    def _bound(self, options: Options, items: int) -> int | None:
        """Return the most tokens that a combined reply may take; None for no bound."""
        # Only for models whose limit is known by name: to learn it from refusals would take a job each time.
        if self._bounds.of(options.model).output is None:
            return None
        return self._bounds.bound(options, LaneHistory(), items, prompt=lambda: 0, quota=None)
