"""From spooled requests to the file of a batch: who travels with whom, in which line, and under which id.

Requests share a prompt exactly where live ones would: all but the text of the last user message is equal, and so is the tenant.
Nothing is learned here as a lane learns, and nothing waits, so the budgets are kept to by upper bounds.
"""

from __future__ import annotations

import asyncio
import secrets
import zlib
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import msgspec

from microbatch.batching.batch_limits import MAX_COUNTED_CHARS, output_reserve
from microbatch.batching.bounds import Bounds
from microbatch.batching.lane_history import LaneHistory
from microbatch.batching.request import check_messages, read_messages
from microbatch.errors import ConfigError, StorageError
from microbatch.prompt.canary import CANARY_ANSWER_TOKENS, CANARY_TOKENS, canary_line, draw_word
from microbatch.prompt.compose import ID_TOKENS, LINE_OVERHEAD_BYTES, compose, draw_endings, instruction, item_line
from microbatch.protocols import ChatCall
from microbatch.spool.payload import Payload
from microbatch.spool.provider.api import ENDPOINT
from microbatch.spool.records import Name, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

    from microbatch.batching.request import Options
    from microbatch.policy import FlushPolicy
    from microbatch.spool.records import Delivery

MAX_LINES: Final = 50_000
MAX_FILE_BYTES: Final = 200_000_000
"""What OpenAI takes in one file."""

# Most bytes of a line without its body.
_AROUND_BYTES: Final = 256

# Expected of an answer when its caller sets no limit, as a lane expects it before it has seen one.
_USUAL_ANSWER_TOKENS: Final = 32

# Requests that are read, and lines that are written, before the event loop has its turn.
_SLICE: Final = 64


class Writes(Protocol):
    """What writes the body of a line: see `BatchWire.body`.

    Attributes:
        model: The model that is asked where a request names none, or None.
    """

    model: str | None

    def body(self, call: ChatCall) -> dict[str, Any]:
        """Return the body of the line for *call*."""
        ...


class Line(msgspec.Struct, frozen=True, array_like=True):
    """A line of a batch's file, and whom its reply answers.

    Attributes:
        custom_id: Its name, which no other batch has a line of.
        names: Its requests, in order.
        ids: The ids that they have in the prompt, the canary's at the end; none if it is a single call.
        sizes: The bytes of each request's text there, by which the cost is divided.
        canary: The word that the last item, which is nobody's request, has to be answered with; None if there is none.
    """

    custom_id: str
    names: list[Name]
    ids: list[str] = []
    sizes: list[int] = []
    canary: str | None = None


class Content(msgspec.Struct, frozen=True, array_like=True):
    """What a job is recorded with, before anything of it exists at the provider.

    Attributes:
        begun_at: When that was, in seconds since 1970.
        lines: Its lines, in the order of the file.
        packed: The file's bytes, compressed.
    """

    begun_at: float
    lines: list[Line]
    packed: bytes

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Return what `encode` was told.

        Raises:
            StorageError: The bytes are damaged.
        """
        try:
            return msgspec.msgpack.decode(raw, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StorageError(f"a recorded batch job is damaged ({type(error).__name__})") from None

    def encode(self) -> bytes:
        """Return the bytes to record."""
        return msgspec.msgpack.encode(self)

    async def file(self) -> bytes:
        """Return the file."""
        return await asyncio.to_thread(zlib.decompress, self.packed)

    def __repr__(self) -> str:
        """Tell the size, never the words."""
        return f"Content(lines=<{len(self.lines)}>)"


class Asked(msgspec.Struct):
    """A request in the hands of a worker, read.

    Attributes:
        delivery: The request.
        messages: Its messages.
        options: Its options.
        key: What it must share with others to travel with them; None if it goes alone.
        line: Its text as a line of a prompt would hold it; b"" if none can.
        tokens: An upper bound of the tokens of that line, its id left out.
    """

    delivery: Delivery
    messages: list[dict[str, Any]]
    options: Options
    key: Hashable = None
    line: bytes = b""
    tokens: int = 0

    @property
    def stage(self) -> Stage:
        """In what company it travels."""
        return Stage.after(self.delivery.deliveries - 1)


class Draft:
    """A job that is about to be recorded.

    Attributes:
        token: Its own name.
        lines: Its lines.
        deliveries: Their requests.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        self.lines: list[Line] = []
        self.deliveries: list[Delivery] = []
        self._rows: list[bytes] = []
        self._size = 0

    def has_room(self, body: bytes) -> bool:
        """Return whether a line with *body* goes in."""
        return len(self.lines) < MAX_LINES and self._size + len(body) + _AROUND_BYTES <= MAX_FILE_BYTES

    def add(self, batch: Sequence[Asked], ids: list[str], canary: str | None, body: bytes) -> None:
        """Add a line.

        Args:
            batch: Its requests.
            ids: The ids in its prompt; none for a single call.
            canary: The word of its canary, or None.
            body: Its body.
        """
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


class Rejected(msgspec.Struct, frozen=True):
    """A request that no line can be made of, and why."""

    delivery: Delivery
    error: str


def read(delivery: Delivery, count: Callable[[str], int] | None = None) -> Asked:
    """Read a spooled request.

    Args:
        delivery: The request.
        count: Counts a text's tokens; None takes its bytes, which bound them.

    Raises:
        StorageError: It is damaged.
        ConfigError: It cannot be sent.
    """
    payload = Payload.decode(delivery.item.payload)
    options = payload.options(delivery.item.name.tenant)
    check_messages(payload.messages)
    shared = read_messages(payload.messages, options) if options.combinable else None
    if shared is None:
        return Asked(delivery, payload.messages, options)
    key, text = shared
    line = item_line(text)
    if len(line) > MAX_COUNTED_CHARS:
        return Asked(delivery, payload.messages, options, line=line)
    tokens = len(line) + LINE_OVERHEAD_BYTES if count is None else count(f" {line.decode()}\n")
    return Asked(delivery, payload.messages, options, key, line, tokens)


class Composer:
    """Makes jobs of requests.

    Args:
        wire: Writes the bodies of lines.
        policy: How much one prompt may hold.
        count: Counts a text's tokens; None takes its bytes, which bound them.
        canary: Whether each combined prompt ends in a canary.
        draw: Where id endings come from.
    """

    def __init__(
        self,
        wire: Writes,
        policy: FlushPolicy,
        *,
        count: Callable[[str], int] | None = None,
        canary: bool = False,
        draw: Callable[[int], Sequence[str]] = draw_endings,
    ) -> None:
        self._wire = wire
        self._policy = policy
        self._count = count
        self._canary = canary
        self._draw = draw
        self._bounds = Bounds(wire.model, canary=canary)

    async def drafts(self, deliveries: Sequence[Delivery]) -> tuple[list[Draft], list[Rejected]]:
        """Return the jobs that *deliveries* make, and what no job can be made of.

        A file holds requests to one model, so that there is at least one job for each.

        Raises:
            ConfigError: A request names no model, and nobody else does.
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
                rejected += [Rejected(each.delivery, "it is larger than a provider's whole file") for each in batch]
            if number % _SLICE == 0:
                await asyncio.sleep(0)
        return [draft for draft in drafts if draft.lines], rejected

    async def _read(self, deliveries: Iterable[Delivery]) -> tuple[list[list[Asked]], list[Rejected]]:
        """Return who may travel together, group by group, and what cannot be read."""
        alone: list[list[Asked]] = []
        lanes: dict[tuple[Stage, Hashable], list[Asked]] = {}
        rejected: list[Rejected] = []
        for number, delivery in enumerate(deliveries, 1):
            try:
                asked = read(delivery, self._count)
            except (ConfigError, StorageError) as error:
                rejected.append(Rejected(delivery, str(error)))
            else:
                if asked.key is None or asked.stage is Stage.ALONE:
                    alone.append([asked])
                else:
                    lanes.setdefault((asked.stage, asked.key), []).append(asked)
            if number % _SLICE == 0:
                await asyncio.sleep(0)
        return alone + list(lanes.values()), rejected

    def _filled(self, lane: list[Asked]) -> Iterator[list[Asked]]:
        """Yield batches of *lane* that keep to the budgets; who is over it all alone goes alone."""
        size, tokens = self._budget(lane[0])
        if lane[0].stage is Stage.HALF:
            size = max(1, size // 2)
        batch: list[Asked] = []
        total = 0
        for each in lane:
            needed = each.tokens + ID_TOKENS
            if batch and (len(batch) >= size or total + needed > tokens):
                yield batch
                batch, total = [], 0
            batch.append(each)
            total += needed
        yield batch

    def _budget(self, one: Asked) -> tuple[int, int]:
        """Return how many requests, and tokens of their lines, a batch of requests like *one* may hold."""
        policy, options = self._policy, one.options
        reserve = output_reserve(options.max_tokens) if options.max_tokens else _USUAL_ANSWER_TOKENS
        size = min(policy.max_batch_size, max(1, policy.max_output_tokens // reserve))
        tokens = policy.max_batch_tokens
        if policy.max_prompt_tokens is not None:
            shared = "".join(str(message.get("content")) for message in one.messages[:-1])
            tokens = min(tokens, policy.max_prompt_tokens - self._tokens_of(shared))
        tokens -= self._tokens_of(instruction(options.answer.words)) + (CANARY_TOKENS if self._canary else 0)
        return size, tokens

    def _tokens_of(self, text: str) -> int:
        # Counting a huge text would hold up the event loop; its bytes are a bound as good as any.
        if self._count is None or len(text) > MAX_COUNTED_CHARS:
            return len(text.encode())
        return self._count(text)

    def _written(self, batch: list[Asked]) -> tuple[dict[str, Any], list[str], str | None]:
        """Return the body of a line, the ids in it, and the word of its canary; a single call has neither."""
        if len(batch) == 1:
            return self._wire.body(_alone(batch[0])), [], None
        options = batch[0].options
        lines = [each.line for each in batch]
        canary = draw_word(self._draw) if self._canary else None
        if canary is not None:
            lines.append(canary_line(canary))
        prompt, ids = compose(instruction(options.answer.words), lines, self._draw)
        limit = len(batch) * output_reserve(options.max_tokens) if options.max_tokens else None
        call = ChatCall(
            messages=[*batch[0].messages[:-1], {"role": "user", "content": prompt}],
            model=options.model,
            params=options.params,
            schema=options.answer.batch_schema if canary is None else options.answer.watched_schema,
            strict=options.answer.strict,
            max_tokens=limit if limit is None or canary is None else limit + CANARY_ANSWER_TOKENS,
            bound=self._bound(options, len(batch)),
        )
        return self._wire.body(call), ids, canary

    def _bound(self, options: Options, items: int) -> int | None:
        """Return the most tokens that a combined reply may take; None for no bound of ours.

        There is one only for models whose limit is known by name: to learn it from refusals would take a job each time.
        """
        if self._bounds.of(options.model).output is None:
            return None
        return self._bounds.bound(options, LaneHistory(), items, prompt=lambda: 0, quota=None)


def _alone(one: Asked) -> ChatCall:
    """Return the call that carries *one* alone, with its own messages."""
    options = one.options
    return ChatCall(
        messages=one.messages,
        model=options.model,
        params=options.params,
        schema=options.answer.single_schema,
        strict=options.answer.strict,
        hint=options.answer.hint,
        max_tokens=options.max_tokens,
    )
