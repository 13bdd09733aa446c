"""The entries of the tables: floors, peers and ours, with one interface, so that every load treats them alike."""

from __future__ import annotations

import asyncio
import operator
import re
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

import microbatch as mb
from bench import peers
from microbatch.demo import instructions
from microbatch.prompt.compose import compose, instruction, item_line
from microbatch.prompt.ids import IdKey
from microbatch.schema.answer_type import answer_type

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Pause = Callable[[], Awaitable[object]] | None
    Messages = list[dict[str, Any]]

FLOOR = "floor-future"
OURS = "microbatch"
LARGE = "microbatch, 1 KB, default budget"
WAITING = "microbatch, idle='wait'"
SAME_WORK = ", same work"

SYSTEM = instructions()
"""About 300 tokens that all requests share."""

_PROSE = (
    "A light and sturdy companion for long days outside, with two pockets on the inside, a strap that can be taken off and "
    "a cover against rain; the outer fabric is made of recycled bottles and can be washed by hand in cold water. "
) * 6
SMALL_BYTES, LARGE_BYTES = 400, 1_000
NO_LIMIT = 10**6

_ITEM = re.compile(r'\[(\d+[a-z]{5})\] "(\d+) ')
"""An item's id, and the number its text begins with."""


def chat(number: int, rest: str) -> Messages:
    """Return new messages for one call: what a caller keeps while it waits is no cost of a library."""
    return [{"role": "system", "content": f"{SYSTEM}."}, {"role": "user", "content": f"{number} {rest}"}]


class Running:
    """A way to batch, set up for one run.

    Attributes:
        calls: Calls of the batch function or of the transport so far.
        wanted: Returns the only right answer to a number.
    """

    calls = 0
    wanted: Callable[[int], Any] = operator.neg
    submit: Callable[[int], Awaitable[Any]]

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        """Do nothing: all are answered, the rest ends with the loop, and some libraries take a second to close."""


class Entry(NamedTuple):
    """One row of the tables.

    Attributes:
        waits: Whether it holds the first request back for a time.
        make: Set it up for a batch size, a longest wait in seconds and the backend's pause.
        exact: Whether all batches of a burst have to be full.
        same_work: Whether a peer takes chat messages, composes prompts and reads replies, instead of handing an integer on.
    """

    kind: Literal["floor", "peer", "ours"]
    waits: bool
    make: Callable[[int, float, Pause], Running]
    exact: bool = False
    same_work: bool = False

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "waits": self.waits, "same_work": self.same_work}


class Echo:
    """A transport that answers each item of a combined prompt with the number its text begins with.

    Replies are templates built for every batch size before the clock starts: only the ids are found and filled in.
    """

    model = base_url = None

    def __init__(self, size: int, pause: Pause) -> None:
        self.calls = 0
        self._pause = pause
        element = '{"id":"%s","answer":"%s"}'
        self._templates = ['{"results":[' + ",".join([element] * items) + "]}" for items in range(size + 1)]

    async def send(self, call: mb.ChatCall, on_text: Callable[[str], None]) -> mb.Completion:
        self.calls += 1
        if self._pause is not None:
            await self._pause()
        content = call.messages[-1]["content"]
        found = _ITEM.findall(content)
        # A request that goes alone has its own messages and is answered without a wrapper.
        reply = self._templates[len(found)] % tuple(chain.from_iterable(found)) if found else content.partition(" ")[0]
        on_text(reply)
        return mb.Completion("stop", usage=mb.Usage(len(content) // 4, 12 * len(found)))

    async def aclose(self) -> None:
        pass


class Futures(Running):
    """Bare futures, the cost of any way to hand over an answer; all that wait are answered in the next turn of the loop."""

    def __init__(self, size: int, wait: float, pause: Pause) -> None:  # noqa: ARG002, it does not batch
        self._pause = pause
        self._waiting: list[asyncio.Future[None]] = []

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    async def submit(self, number: int) -> int:
        future = self._loop.create_future()
        waiting = self._waiting
        waiting.append(future)
        if len(waiting) == 1:
            if self._pause is None:
                self._loop.call_soon(self._answer)
            else:
                self._paused = self._loop.create_task(self._answer_later(self._pause))
        await future
        return -number

    def _answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.set_result(None)

    async def _answer_later(self, pause: Callable[[], Awaitable[object]]) -> None:
        await pause()
        self._answer()


class Integers(Running):
    """A library that hands integers on; its batch function returns their negatives."""

    def __init__(self, peer: type[peers.Peer], size: int, wait: float, pause: Pause) -> None:
        self._pause = pause
        self._peer = peer(self._answer, size, wait)
        # Its own methods: a frame of ours around them would be charged to it.
        self.start, self.submit = self._peer.start, self._peer.submit

    async def _answer(self, items: list[int]) -> list[int]:
        self.calls += 1
        if self._pause is not None:
            await self._pause()
        return [-item for item in items]


class Share(msgspec.Struct):
    """The answer to one item, and its share of the usage: of the prompt by its length, of the reply an equal part."""

    output: str
    usage: mb.Usage


class SameWork(Running):
    """A library whose batch function makes combined calls, as `submit` does, of the chat messages that callers pass on.

    Without the check of the other messages, a request would be answered under the instructions of another one. Messages are compared
    rather than hashed and answers are matched by position, since peers have no ids: the cheapest way in both cases.
    """

    wanted = str

    def __init__(self, peer: type[peers.Peer], size: int, wait: float, pause: Pause) -> None:
        self._echo = Echo(size, pause)
        self._peer = peer(self._answer, size, wait)
        self._preamble = instruction(answer_type(str).words)
        self._draw = IdKey().draws(b"any")
        self._scratch = bytearray()
        self._rest = _PROSE[:SMALL_BYTES]
        self.start = self._peer.start

    async def submit(self, number: int) -> str:
        # A tuple, because batched takes a list for several items.
        return (await self._peer.submit(tuple(chat(number, self._rest)))).output

    async def _answer(self, batch: list[tuple[Any, ...]]) -> list[Share]:
        """Make one call for all requests that differ in the last message only."""
        groups: list[tuple[Messages, dict[int, str]]] = []
        for place, (*shared, last) in enumerate(batch):
            texts = next((texts for others, texts in groups if others == shared), None)
            if texts is None:
                texts = {}
                groups.append((shared, texts))
            texts[place] = last["content"]
        answers: dict[int, Share] = {}
        for shared, texts in groups:
            answers.update(zip(texts, await self._call(shared, list(texts.values())), strict=True))
        return [answers[place] for place in range(len(batch))]

    async def _call(self, shared: Messages, texts: list[str]) -> list[Share]:
        lines = [item_line(text, self._scratch) for text in texts]
        prompt, _ = compose(self._preamble, lines, self._draw)
        pieces: list[str] = []
        self.calls += 1
        call = mb.ChatCall(messages=[*shared, {"role": "user", "content": prompt}])
        usage = (await self._echo.send(call, pieces.append)).usage
        results = msgspec.json.decode("".join(pieces))["results"]
        each, size = usage.completion_tokens // len(lines), sum(map(len, lines))
        return [
            Share(result["answer"], mb.Usage(usage.prompt_tokens * len(line) // size, each))
            for result, line in zip(results, lines, strict=True)
        ]


class Ours(Running):
    """The whole `submit(messages)`, with single flight."""

    wanted = str

    def __init__(
        self,
        policy: dict[str, Any],
        tokens: Literal["bytes"] | None,
        characters: int,
        size: int,
        wait: float,
        pause: Pause,
    ) -> None:
        self._echo = Echo(size, pause)
        settings = mb.FlushPolicy(max_batch_size=size, max_wait=wait, max_queued=NO_LIMIT, share=True, **policy)
        self._batcher = mb.Microbatcher(self._echo, policy=settings, tokens=tokens)
        self._rest = _PROSE[:characters]

    async def start(self) -> None:
        await self._batcher.open()

    async def submit(self, number: int) -> str:
        return (await self._batcher.submit(chat(number, self._rest))).output

    async def stop(self) -> None:
        self.calls = self._batcher.upstream_calls
        if self.calls != self._echo.calls:
            raise AssertionError(f"upstream_calls is {self.calls}, the transport counted {self._echo.calls}")
        await self._batcher.aclose()


def entries() -> dict[str, Entry]:
    """Return the entries by name: floors, peers, the same on the same work, ours."""
    found = {FLOOR: Entry("floor", False, Futures)}
    collectors = [("floor", peers.Minimal), *(("peer", peer) for peer in peers.PEERS.values())]
    found |= {peer.name: Entry(kind, peer.waits, partial(Integers, peer)) for kind, peer in collectors}
    for kind, peer in collectors:
        found[peer.name + SAME_WORK] = Entry(kind, peer.waits, partial(SameWork, peer), same_work=True)
    unlimited = {"max_batch_tokens": NO_LIMIT, "max_output_tokens": NO_LIMIT}  # only size, time and idling end a batch
    waiting = partial(Ours, unlimited | {"idle": "wait"}, "bytes", SMALL_BYTES)
    found[OURS] = Entry("ours", True, partial(Ours, unlimited, "bytes", SMALL_BYTES), exact=True)
    found[WAITING] = Entry("ours", True, waiting, exact=True)
    found[LARGE] = Entry("ours", True, partial(Ours, {}, None, LARGE_BYTES))
    return found
