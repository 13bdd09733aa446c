"""A spool in memory, on virtual time, whose operations can fail before or after their effect."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import microbatch as mb
from microbatch.spool.records import LOST, MAX_ALONE, Counts, Delivery, Found, Item, Spool, Stage, is_dead

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Row:
    """One request; `answers` are all that were stored for it, of which the first counts, `lost` its leases that have expired."""

    item: Item
    state: str = "waiting"
    deliveries: int = 0
    lease: str = ""
    until: float = 0.0
    answers: tuple[bytes, ...] = ()
    error: str | None = None
    lost: int = 0


class MemorySpool(Spool):
    """The spool.

    Args:
        outages: Operations that fail, by number: "before" or "after" their effect.
        latency: Seconds that each takes.
    """

    def __init__(self, outages: dict[int, str], latency: float) -> None:
        self.rows: dict[str, Row] = {}
        self.healthy = False
        self._outages = outages
        self._latency = latency
        self._operations = self._leases = 0

    async def _do(self, change: Callable[[float], Any]) -> Any:
        outage = None if self.healthy else self._outages.get(self._operations)
        self._operations += 1
        await asyncio.sleep(self._latency)
        if outage == "before":
            raise mb.StorageError("the store is away")
        done = change(asyncio.get_running_loop().time())
        if outage == "after":
            raise mb.StorageError("the store went away")
        return done

    async def open(self):
        pass

    async def aclose(self):
        pass

    async def put(self, items):
        def put(_now):
            outcomes = []
            for item in items:
                row = self.rows.get(item.name.key)
                outcomes.append("new" if row is None else "known" if row.item.digest == item.digest else "conflict")
                self.rows.setdefault(item.name.key, Row(item))
            return outcomes

        return await self._do(put)

    async def take(self, stage, most, *, lease):
        def take(now):
            for row in self.rows.values():
                if row.state == "leased" and row.until <= now:
                    row.lost += 1
                    self._fail(row, LOST.format(row.deliveries))
            self._leases += 1
            free = [
                row for row in self.rows.values() if row.state == "waiting" and Stage.after(row.deliveries) == stage
            ]
            taken = free[:most]
            for row in taken:
                row.state, row.lease, row.until = "leased", f"lease {self._leases}", now + lease
                row.deliveries += 1
            return [Delivery(row.item, row.deliveries, row.lease, 0.0) for row in taken]

        return await self._do(take)

    def _fail(self, row: Row, error: str) -> None:
        row.lease = ""
        row.state, row.error = ("dead", error) if is_dead(row.deliveries, MAX_ALONE) else ("waiting", None)

    def _held(self, deliveries):
        rows = ((self.rows[each.item.name.key], each) for each in deliveries)
        return [row for row, each in rows if row.state == "leased" and row.lease == each.lease]

    async def renew(self, deliveries, *, lease):
        def renew(now):
            for row in self._held(deliveries):
                row.until = now + lease

        await self._do(renew)

    async def finish(self, results):
        def finish(_now):
            for delivery, result in results:
                row = self.rows[delivery.item.name.key]
                row.state, row.lease, row.error, row.answers = "done", "", None, (*row.answers, result)

        await self._do(finish)

    async def give_back(self, deliveries, *, error, counted):
        def give_back(_now):
            for row in self._held(deliveries):
                if counted:
                    self._fail(row, error)
                else:
                    row.state, row.lease = "waiting", ""
                    row.deliveries -= 1

        await self._do(give_back)

    async def find(self, names):
        def find(_now):
            rows = [self.rows.get(name.key) for name in names]
            return [
                Found("unknown") if row is None else Found(row.state, *(row.answers[:1] or (None,)), row.error)
                for row in rows
            ]

        return await self._do(find)

    async def counts(self):
        def counts(_now):
            states = [row.state for row in self.rows.values()]
            waiting = (states.count("waiting"), 0, 0)
            return Counts(waiting, states.count("leased"), 0, states.count("done"), states.count("dead"))

        return await self._do(counts)


class Handle:
    """A spool as one worker has it: once the worker is dead, nothing of it reaches the spool."""

    def __init__(self, spool: MemorySpool) -> None:
        self.dead = False
        self._spool = spool

    def __getattr__(self, name: str) -> Any:
        async def operation(*args, **options):
            if self.dead:
                raise mb.StorageError("the process is gone")
            return await getattr(self._spool, name)(*args, **options)

        return operation
