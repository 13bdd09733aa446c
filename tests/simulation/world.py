"""Plays a scenario: the batcher, its callers and its endpoint on one shuffled, virtual-time loop, and a trace of all they do."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from simulation.stage import Stage
from simulation.upstream import OUTPUT_TYPES, WHOSE, Attempt, Upstream

import microbatch as mb
from microbatch.prompt.compose import ALPHABET

if TYPE_CHECKING:
    from simulation.scenario import Ask, Bulk, Scenario


class Hostile(dict[str, Any]):
    """A message that raises when it is read."""

    def _raise(self, *_: Any) -> Any:
        raise ZeroDivisionError("hostile")

    __getitem__ = __iter__ = __len__ = get = items = keys = values = _raise


@dataclass
class Item:
    """One request, and what became of it.

    Attributes:
        lane: All that requests which travel together must have in common.
        bulk: Number of the `map` it came from, or None for a submit.
        arrived: When its caller began, in virtual seconds.
        accepted: When the batcher took it in, None if it never did; `place` tells the order.
        timeout: What was left of its timeout then.
        cancel: When its caller was cancelled, and in which turn.
        settled: When its future was done, and `turn_settled` in which turn.
        ended: When its caller had the outcome.
        outcome: A `Reply`, an exception, "cancelled", "unfetched" for an answer that a map's consumer left behind, or None while
            there is none.
        ticket: The batcher's own record.
    """

    text: str
    ask: Ask
    lane: tuple[Any, ...]
    bulk: int | None = None
    arrived: float | None = None
    accepted: float | None = None
    place: int = 0
    timeout: float | None = None
    cancel: tuple[float, int] | None = None
    settled: float | None = None
    turn_settled: int = 0
    ended: float | None = None
    outcome: Any = None
    ticket: Any = None
    task: asyncio.Task[Any] | None = None

    @property
    def reply(self) -> mb.Reply[Any] | None:
        """What its caller was answered."""
        return self.outcome if isinstance(self.outcome, mb.Reply) else None

    @property
    def error(self) -> BaseException | None:
        """What it ended with, if it was an error."""
        return self.outcome if isinstance(self.outcome, BaseException) else None


class World(Stage):
    """One run of a scenario.

    Attributes:
        items: By text, which is unique.
        closed: When the first `aclose` was called and with what grace; None before.
        shut_call: The first `aclose` that returned: when it was called and when it returned.
        stats: As they were after the end.
        charges: What was charged for each attempt, in order.
        overspent: Charges that the budget did not allow.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        super().__init__(scenario.order, scenario.shuffled)
        self.items: dict[str, Item] = {}
        self.upstream = Upstream(self, scenario.faults, scenario.poison)
        self.closed: tuple[float, float | None] | None = None
        self.shut_call: tuple[float, float] | None = None
        self.stats: mb.Stats | None = None
        self.finished: float | None = None
        self.bulk_complaints: list[str] = []
        self._letters = Random(scenario.order or 0)
        self.batcher = self._make_batcher()
        for index, ask in enumerate(scenario.asks):
            self._add(ask, f"{index}")
        for number, bulk in enumerate(scenario.bulks):
            for index, ask in enumerate(bulk.asks):
                self._add(ask, f"{number}/{index}", bulk=number)

    def _add(self, ask: Ask, name: str, bulk: int | None = None) -> None:
        text = f"{ask.kind} {name}{' ' + 'x' * ask.size if ask.size else ''}"
        alone = ("alone", text) if ask.alone else ()
        lane = (
            ask.kind, ask.system, ask.max_tokens, ask.temperature, ask.tenant, ask.headers, ask.priority, *alone
        )  # fmt: skip
        self.items[text] = Item(text, ask, lane, bulk)

    def _make_batcher(self) -> mb.Microbatcher:
        scenario = self.scenario
        if scenario.priced:
            self.upstream.model = "sim"
        batcher = mb.Microbatcher(
            self.upstream,
            policy=mb.FlushPolicy(**scenario.policy),
            retry=mb.RetryPolicy(**scenario.retry),
            fallback=mb.FallbackPolicy(**scenario.fallback),
            rate_limit=mb.RateLimit(**scenario.rate_limit) if scenario.rate_limit else None,
            budget=mb.Budget(**scenario.budget) if scenario.budget else None,
            prices={"sim": mb.Price(1.0, 4.0, 0.5)},
            tokens="bytes",
            draw_ids=lambda count: ["".join(self._letters.choices(ALPHABET, k=5)) for _ in range(count)],
        )
        # Jitter comes in eighths, so that back-offs end together with other things.
        batcher._parts.sender._draw = lambda: self._letters.randrange(9) / 8
        # The one look inside: who was accepted, and when. Nothing public tells it of requests that wait for room.
        accept = batcher._intake.accept

        def watched(messages, options, caller, *args, **kwargs):
            ticket, waiter = accept(messages, options, caller, *args, **kwargs)
            item = self.items[messages[-1]["content"]]
            item.accepted, item.place, item.ticket = self.now(), self.moment(), waiter
            item.timeout = None if caller.timeout is None else caller.deadline(item.accepted).at - item.accepted
            self.note("accepted", item.text)
            waiter.future.add_done_callback(lambda _: self._settled(item))
            return ticket, waiter

        batcher._intake.accept = watched
        if scenario.budget:
            self.watch_charges(batcher._parts.spending, self.scenario.budget)
        return batcher

    def _settled(self, item: Item) -> None:
        # Callbacks of a future run in the turn after.
        item.settled, item.turn_settled = self.now(), self.loop.turns - 1
        self.note("settled", item.text)

    # --- what the endpoint tells and asks

    def is_poison(self, text: str) -> bool:
        """Whether calls that carry *text* are refused."""
        return self.items[text].ask.poison

    def attempt_came(self, attempt: Attempt) -> None:
        """Cancel who wants to be cancelled when its text has been sent."""
        for text in attempt.texts:
            cancel = self.items[text].ask.cancel
            if cancel is not None and cancel[0] == "sent" and self.items[text].cancel is None:
                self._cancel_in(float(cancel[1]), self.items[text])

    def answers_come(self, texts: list[str], when: str) -> None:
        """Cancel who wants to be cancelled in the step of its answer."""
        for text in texts:
            if self.items[text].ask.cancel == ("answer", when):
                self._cancel(self.items[text])

    # --- what callers do

    def _cancel_in(self, seconds: float, item: Item) -> None:
        self.loop.call_later(seconds, self._cancel, item)

    def _cancel(self, item: Item) -> None:
        if item.task is not None and not item.task.done() and item.cancel is None:
            item.cancel = (self.now(), self.loop.turns)
            self.note("cancel", item.text)
            item.task.cancel()

    def _options(self, ask: Ask) -> dict[str, Any]:
        options = {
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "tenant": ask.tenant,
            "headers": dict(ask.headers) or None,
            "priority": ask.priority,
            "timeout": ask.timeout,
            "params": {"seed": 1} if ask.alone else None,
        }
        return options if ask.kind == "text" else {**options, "output_type": OUTPUT_TYPES[ask.kind]}

    def _messages(self, item: Item) -> list[dict[str, str]]:
        if item.ask.misuse == "raising":
            return [Hostile(role="user", content=item.text)]
        if item.ask.misuse == "refused":
            return []
        return [{"role": "system", "content": item.ask.system}, {"role": "user", "content": item.text}]

    def _arrive(self, item: Item) -> None:
        item.task = self._start(self._submit(item))
        if item.ask.cancel is not None and item.ask.cancel[0] == "after":
            self._cancel_in(float(item.ask.cancel[1]), item)

    async def _submit(self, item: Item) -> None:
        WHOSE.set(item.text)
        item.arrived = self.now()
        self.note("submit", item.text)
        try:
            item.outcome = await self.batcher.submit(self._messages(item), **self._options(item.ask))
            self.note("answer", item.text, item.outcome.output)
        except asyncio.CancelledError:
            item.outcome = "cancelled"
            self.note("cancelled", item.text)
        except BaseException as error:  # noqa: BLE001 whatever comes is judged later
            error.__traceback__ = None  # it would keep this whole world alive
            item.outcome = error
            self.note("error", item.text, type(error).__name__, str(error))
        item.ended = self.now()

    async def _map(self, number: int, bulk: Bulk) -> None:
        items = [item for item in self.items.values() if item.bulk == number]
        yielded: list[int] = []
        taken = 0
        WHOSE.set(f"map {number}")

        def request(item: Item) -> mb.Request:
            nonlocal taken
            taken += 1
            if bulk.max_pending is not None and taken - len(yielded) > bulk.max_pending:
                self.bulk_complaints.append(f"map {number} took in more than max_pending={bulk.max_pending}")
            item.arrived = self.now()
            self.note("taken", item.text)
            return mb.Request(self._messages(item), id=item.text, **self._options(item.ask))

        async def slowly() -> Any:
            for item, gap in zip(items, bulk.gaps, strict=False):
                await asyncio.sleep(gap)
                yield request(item)

        source = map(request, items) if bulk.gaps is None else slowly()
        whole = False
        try:
            results = self.batcher.map(source, max_pending=bulk.max_pending, ordered=bulk.ordered)
            async with aclosing(results):
                if bulk.leave == 0 and bulk.how == "break":
                    return
                async for result in results:
                    item = self.items[result.id]
                    yielded.append(result.index)
                    item.outcome = result.reply if result.reply is not None else result.error
                    item.ended = self.now()
                    self.note("result", item.text, type(item.outcome).__name__)
                    if bulk.leave is not None and len(yielded) >= bulk.leave and bulk.how == "break":
                        break
                    if bulk.pause:
                        await asyncio.sleep(bulk.pause)
                else:
                    whole = True
        except mb.BatcherClosed:
            self.note("map closed", number)
            if self.closed is None:
                self.bulk_complaints.append(f"map {number} was sent away from an open batcher")
        except asyncio.CancelledError:
            self.note("map cancelled", number)
        finally:
            self._left(items)
        if whole and sorted(yielded) != list(range(len(items))):
            self.bulk_complaints.append(f"map {number} yielded {yielded} of {len(items)}")
        if bulk.ordered and yielded != sorted(yielded):
            self.bulk_complaints.append(f"map {number} is ordered, but yielded {yielded}")

    def _left(self, items: list[Item]) -> None:
        """The consumer of *items* is gone: those still open count as cancelled now."""
        for item in items:
            if item.outcome is None and item.accepted is not None and item.ticket.future.cancelled():
                item.cancel = (self.now(), self.loop.turns)
                item.outcome, item.ended = "cancelled", self.now()
            elif item.outcome is None and item.accepted is not None and item.ticket.reply is not None:
                item.outcome, item.ended = "unfetched", self.now()

    def _arrive_bulk(self, number: int, bulk: Bulk) -> None:
        task = self._start(self._map(number, bulk))
        if bulk.leave is not None and bulk.how == "cancel":
            self.loop.call_later(bulk.leave * 0.25, task.cancel)

    def _flush(self) -> None:
        self.note("flush")
        try:
            self.batcher.flush()
        except mb.BatcherClosed:
            self.note("flush refused")

    def _close(self, grace: float | None, give_up: float | None) -> None:
        task = self._start(self._aclose(grace))
        if give_up is not None:
            self.loop.call_later(give_up, task.cancel)

    async def _aclose(self, grace: float | None) -> None:
        start = self.now()
        if self.closed is None:
            self.closed = (start, grace)
        self.note("close", grace)
        await self.batcher.aclose(grace)
        self.note("closed")
        if self.shut_call is None:
            self.shut_call = (start, self.now())
            stats = self.batcher.stats()
            if stats.queued or stats.in_flight:
                self.leftover.append(f"when closed: queued={stats.queued}, in_flight={stats.in_flight}")

    # --- the run

    async def _main(self) -> None:
        scenario, loop = self.scenario, self.loop
        await self.batcher.open()
        start = loop.time()
        last = start
        arrivals = [(ask.at, self._arrive, item) for ask, item in zip(scenario.asks, self.items.values(), strict=False)]
        arrivals += [(bulk.at, self._arrive_bulk, number, bulk) for number, bulk in enumerate(scenario.bulks)]
        arrivals += [(at, self._flush) for at in scenario.flushes]
        arrivals += [(at, self._close, grace, give_up) for at, grace, give_up in scenario.closes]
        for at, call, *args in arrivals:
            loop.call_at(start + at, call, *args)
            last = max(last, start + at)
        done = loop.create_future()
        loop.call_at(last, done.set_result, None)
        await done
        await asyncio.sleep(0)
        while waiting := [task for task in self._tasks if not task.done()]:
            await asyncio.wait(waiting)
        for task in self._tasks:
            if not task.cancelled() and task.exception() is not None:
                raise task.exception()
        self.finished = loop.time()
        for item in self.items.values():
            if item.reply is not None:
                await item.reply.settled()
        await self._aclose(30.0)
        for _ in range(3):
            await asyncio.sleep(0)
        self.stats = self.batcher.stats()
        self._look_for_leftovers([self.batcher])
        if self.upstream.closed != 1:
            self.leftover.append(f"the transport was closed {self.upstream.closed} times")


def play(scenario: Scenario) -> World:
    """Play *scenario*; return the world after it."""
    world = World(scenario)
    world.run()
    return world
