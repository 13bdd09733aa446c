"""Who is measured: floors, peers and ours, made alike, so that every load treats them alike."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import msgspec

import microbatch as mb
from bench import peers
from bench.overhead.backend import Echo, Function
from bench.peers import floors
from microbatch.demo import instructions
from microbatch.prompt.compose import compose, instruction, item_line
from microbatch.schema.answer_type import answer_type

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bench.overhead.backend import Pause

FLOOR = "floor-future"
OURS = "microbatch"
LARGE = "microbatch, 1 KB, default budget"
WAITING = "microbatch, idle='wait'"

SYSTEM = instructions()
"""About 300 tokens that all requests share."""

_PROSE = (
    "A light and sturdy companion for long days outside, with two pockets on the inside, a strap that can be taken off and "
    "a cover against rain; the outer fabric is made of recycled bottles and can be washed by hand in cold water. "
) * 6
SMALL_BYTES, LARGE_BYTES = 400, 1_000

NO_LIMIT = 10**6
"""More than any run here asks for: a bound that must not bind."""


class Running(Protocol):
    """One way to batch, set up for one run.

    Attributes:
        backend: What it calls, with `calls` and `spent`.
    """

    backend: Any

    async def start(self) -> None: ...

    async def submit(self, number: int) -> Any: ...

    async def stop(self) -> None: ...

    def wanted(self, number: int) -> Any:
        """Return the only right answer to *number*."""


class Entry(NamedTuple):
    """One row of the tables.

    Attributes:
        name: As shown.
        kind: What it is to us.
        windowed: Whether it waits for company, as opposed to one turn of the loop or not at all.
        make: Sets it up for a batch size, a longest wait in seconds and the backend's pause.
        exact: Whether a burst has to come in full batches, however its items are.
        same_work: Whether a peer composes prompts and reads replies, as submit does, instead of handing an integer on.
    """

    name: str
    kind: Literal["floor", "peer", "ours"]
    windowed: bool
    make: Callable[[int, float, Pause], Running]
    exact: bool = False
    same_work: bool = False


class Futures:
    """Bare futures: what any way to hand over an answer pays. All that wait are answered together, in the next turn of the loop."""

    def __init__(self, size: int, wait: float, pause: Pause) -> None:  # noqa: ARG002, it does not batch
        self.backend = Function(None)  # never called
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

    async def stop(self) -> None:
        pass

    @staticmethod
    def wanted(number: int) -> int:
        return -number


class Peer:
    """A library that hands the items on as they are."""

    def __init__(self, peer: Callable[..., Any], size: int, wait: float, pause: Pause) -> None:
        self.backend = Function(pause)
        self._peer = peer(self.backend.answer, size=size, wait=wait)
        # Its own methods: a frame of ours around them would be charged to it.
        self.start, self.submit = self._peer.start, self._peer.submit

    async def stop(self) -> None:
        """Do nothing: all are answered, what is left ends with the loop, and some take a second to close."""

    @staticmethod
    def wanted(number: int) -> int:
        return -number


class SameWork:
    """A library whose batch function does what `submit` does: compose the numbered prompt, and take the same reply apart.

    Answers are matched by position, since peers have no ids: the cheapest way there is.
    """

    def __init__(self, peer: Callable[..., Any], size: int, wait: float, pause: Pause) -> None:
        self.backend = Echo(size, pause)
        self._peer = peer(self._answer, size=size, wait=wait)
        self._preamble = instruction(answer_type(str).words)
        self._scratch = bytearray()
        self._rest = _PROSE[:SMALL_BYTES]
        self.start = self._peer.start

    async def submit(self, number: int) -> str:
        return await self._peer.submit(f"{number} {self._rest}")

    async def _answer(self, texts: list[str]) -> list[str]:
        prompt, _ = compose(self._preamble, [item_line(text, self._scratch) for text in texts])
        messages = [{"role": "system", "content": f"{SYSTEM}."}, {"role": "user", "content": prompt}]
        pieces: list[str] = []
        await self.backend.send(mb.ChatCall(messages=messages), pieces.append)
        return [element["answer"] for element in msgspec.json.decode("".join(pieces))["results"]]

    async def stop(self) -> None:
        """Do nothing, as `Peer`."""

    @staticmethod
    def wanted(number: int) -> str:
        return str(number)


class Ours:
    """The whole `submit(messages)`, with single flight."""

    def __init__(self, policy: mb.FlushPolicy, tokens: Literal["bytes"] | None, characters: int, pause: Pause) -> None:
        self.backend = Echo(policy.max_batch_size, pause)
        self._batcher = mb.Microbatcher(self.backend, policy=policy, tokens=tokens)
        self._rest = _PROSE[:characters]

    async def start(self) -> None:
        await self._batcher.open()

    async def submit(self, number: int) -> str:
        # Built in the call: what a caller keeps while it waits is no cost of submit.
        reply = await self._batcher.submit(
            [{"role": "system", "content": f"{SYSTEM}."}, {"role": "user", "content": f"{number} {self._rest}"}]
        )
        return reply.output

    async def stop(self) -> None:
        calls = self._batcher.upstream_calls
        if calls != self.backend.calls:
            raise AssertionError(f"upstream_calls is {calls}, the transport counted {self.backend.calls}")
        await self._batcher.aclose()

    @staticmethod
    def wanted(number: int) -> str:
        return str(number)


def free_of_limits(size: int, wait: float, idle: Literal["flush", "wait"] = "flush") -> mb.FlushPolicy:
    """Return the policy under which nothing but size, window and idling ends a batch."""
    return mb.FlushPolicy(
        max_batch_size=size,
        max_wait=wait,
        max_queued=NO_LIMIT,
        max_batch_tokens=NO_LIMIT,
        max_output_tokens=NO_LIMIT,
        idle=idle,
        share=True,
    )


def entries(only: list[str] | None = None) -> dict[str, Entry]:
    """Return who can be measured here, by name: floors, peers, ours; of those, *only* some if told so, and the bare floor."""
    found = [Entry(FLOOR, "floor", False, Futures)]
    found += [_peer(name, "floor", floor) for name, floor in floors.FLOORS.items()]
    found += [_peer(name, "peer", peer) for name, peer in peers.installed().items()]
    found += [_same_work(name, "floor", floor) for name, floor in floors.FLOORS.items()]
    found += [_same_work(name, "peer", peer) for name, peer in peers.installed().items()]
    found += _ours()
    return {entry.name: entry for entry in found if not only or entry.name in only or entry.name == FLOOR}


def _peer(name: str, kind: Literal["floor", "peer"], peer: type[peers.Peer]) -> Entry:
    return Entry(name, kind, peer.windowed, partial(Peer, peer))


def _same_work(name: str, kind: Literal["floor", "peer"], peer: type[peers.Peer]) -> Entry:
    return Entry(f"{name}, same work", kind, peer.windowed, partial(SameWork, peer), same_work=True)


def _ours() -> list[Entry]:
    def small(size: int, wait: float, pause: Pause) -> Running:
        return Ours(free_of_limits(size, wait), "bytes", SMALL_BYTES, pause)

    def waiting(size: int, wait: float, pause: Pause) -> Running:
        return Ours(free_of_limits(size, wait, "wait"), "bytes", SMALL_BYTES, pause)

    def large(size: int, wait: float, pause: Pause) -> Running:
        policy = mb.FlushPolicy(max_batch_size=size, max_wait=wait, max_queued=NO_LIMIT, share=True)
        return Ours(policy, None, LARGE_BYTES, pause)

    return [
        Entry(OURS, "ours", True, small, exact=True),
        Entry(WAITING, "ours", True, waiting, exact=True),
        Entry(LARGE, "ours", True, large),
    ]
