"""The endpoint of a run of several parts: chat as in `simulation.upstream`, embeddings, and requests that are relayed."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Any

from simulation.scenario import Fault
from simulation.upstream import LIMIT, STATUS, WHOSE, Upstream

import microbatch as mb
from microbatch.protocols import Embedded
from microbatch.testing.embedding_faults import Element, spoil
from microbatch.testing.vectors import text_vector

if TYPE_CHECKING:
    from array import array
    from collections.abc import AsyncIterator, Callable

    from simulation.mixed_world import MixedWorld

DIMENSIONS = 16


@lru_cache(maxsize=4_096)
def right_vector(text: str) -> array[float]:
    """Return the vector of *text*."""
    return text_vector(text, "vec", DIMENSIONS)


@dataclass
class Other:
    """A call that is no chat call; what is not described is as in `Attempt`.

    Attributes:
        what: "embed", "look_up" or "forward".
        texts: The inputs of an embeddings call.
        caller: Number of the caller whose request is relayed.
    """

    what: str
    number: int
    fault: Fault
    started: float
    headers: dict[str, str]
    texts: tuple[str, ...] = ()
    caller: int | None = None
    ended: float | None = None
    how: str | None = None
    reported: mb.Usage | None = None
    raised: BaseException | None = None
    whose: str | None = None


class Endpoint(Upstream):
    """The endpoint.

    Attributes:
        others: What came that is no chat call, in order.
        healthy: Whether faults are over.
    """

    model = "sim"
    embedding_model = "vec"

    def __init__(
        self, world: MixedWorld, faults: list[Fault], poison: str, embeds: list[Fault], forwards: list[Fault]
    ) -> None:
        super().__init__(world, faults, poison)
        self.others: list[Other] = []
        self.healthy = False
        self._queues = {"embed": embeds, "forward": forwards}

    def _fault_of(self, number: int) -> Fault:
        return Fault(dice=number) if self.healthy else super()._fault_of(number)

    @asynccontextmanager
    async def _other(self, what: str, queue: str, **known: Any) -> AsyncIterator[Other]:
        world = self._world
        number = sum((other.what == "forward") == (queue == "forward") for other in self.others)
        faults = self._queues[queue]
        fault = faults[number] if number < len(faults) else Fault(dice=number)
        other = Other(what, number, fault, world.now(), whose=WHOSE.get(), **known)
        self.others.append(other)
        world.note(what, number, fault.kind, *other.texts, *filter(None, [known.get("caller")]))
        try:
            yield other
            other.how = "answered"
        except (asyncio.CancelledError, GeneratorExit):
            other.how, other.reported = "cancelled", None
            if fault.stubborn and what != "forward":
                await asyncio.sleep(fault.stubborn)
            raise
        except BaseException as error:
            other.how, other.raised, other.reported = "failed", error, None
            raise
        finally:
            other.ended = world.now()
            world.note(f"{what} ends", number, other.how)

    async def embed(self, call: Any) -> Embedded:
        """Answer with vectors, or as the fault says."""
        texts, world = tuple(call.inputs), self._world
        what = "embed" if texts[0].startswith("vector") else "look_up"
        async with self._other(what, "embed", texts=texts, headers=dict(call.headers)) as other:
            fault = other.fault
            limit = LIMIT if call.timeout is None else min(call.timeout, LIMIT)
            if fault.kind == "hang" or fault.latency >= limit:
                await asyncio.sleep(limit)
                raise mb.TransportTimeout("took too long")
            if fault.latency:
                await asyncio.sleep(fault.latency)
            if any(map(world.is_poison, texts)):
                raise mb.BadRequest("no", status=400)
            if fault.kind in STATUS:
                raise STATUS[fault.kind](fault)
            elements = [Element(place, right_vector(text)[:]) for place, text in enumerate(texts)]
            if fault.kind != "ok":
                elements = spoil(elements, fault.kind, Random(fault.dice))
            pairs = [
                (each.index if type(each.index) is int else None, None if each.damaged else each.vector)
                for each in elements
            ]
            world.answers_come(list(texts), "before")
            other.reported = mb.Usage(sum(map(len, texts))) if fault.usage else None
            return Embedded(vectors=pairs, usage=other.reported)

    @asynccontextmanager
    async def forward(self, _method: str, path: str, headers: Any, _body: bytes | None) -> AsyncIterator[Relayed]:
        """Relay an answer of some pieces, or fail as the fault says."""
        caller = int(path.rpartition("/")[2])
        async with self._other("forward", "forward", caller=caller, headers=dict(headers)) as other:
            await asyncio.sleep(other.fault.latency)
            if other.fault.kind == "no_connection":
                raise mb.ConnectFailed("refused")
            yield Relayed(other)


class Relayed:
    """The answer to a relayed request, as `microbatch.transports.relay.Forwarded`."""

    def __init__(self, other: Other) -> None:
        self.status = {"refused": 400, "server_error": 500}.get(other.fault.kind, 200)
        self.headers: dict[str, str] = {}
        self.on_chunk: Callable[[bytes], object] | None = None
        self._other = other

    def pieces(self) -> list[bytes]:
        """Return what is sent if nothing goes wrong on the way."""
        other = self._other
        if self.status != 200:
            return [b'{"error":{"message":"no"}}']
        usage = b'{"usage":{"prompt_tokens":40,"completion_tokens":%d}}' % (other.caller or 0)
        return [*(b"piece %d of %d;" % (number, other.caller) for number in range(other.fault.pieces)), usage]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for number, piece in enumerate(self.pieces()):
            if number and self._other.fault.gap:
                await asyncio.sleep(self._other.fault.gap)
            if number == 1 and self._other.fault.kind == "broken_off":
                raise mb.ConnectFailed("broken off")
            if number == 1 and self._other.fault.kind == "silent":
                await asyncio.sleep(LIMIT)
                raise mb.TransportTimeout("silent")
            if self.on_chunk is not None:
                self.on_chunk(piece)
            if b'"usage"' in piece:
                self._other.reported = mb.Usage(40, self._other.caller or 0)
            yield piece
