"""Plays a run of several parts: one or two batchers on one transport, their callers, workers of a spool, and a trace of all they do."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from simulation.memory_spool import Handle, MemorySpool
from simulation.mixed_endpoint import Endpoint, Relayed, right_vector
from simulation.mixed_scenario import Worker
from simulation.stage import Stage
from simulation.upstream import BESIDE, OUTPUT_TYPES, WHOSE

import microbatch as mb
from microbatch.prompt.compose import ALPHABET
from microbatch.semantic.cache import SemanticCache
from microbatch.semantic.evidence import KindEvidence
from microbatch.spool import worker as spool_worker
from microbatch.spool.records import Stage as Step

if TYPE_CHECKING:
    from simulation.mixed_scenario import Call, Mixed
    from simulation.upstream import Attempt

SIMILAR = 0.9
"""The similarity from which on answers are handed out; texts of one topic have 1."""

PRICES = {"sim": mb.Price(1.0, 4.0, 0.5), "vec": mb.Price(0.1, 0.0)}


@dataclass
class Caller:
    """One caller, and what became of it.

    Attributes:
        accepted: When its batcher took in its request, or its first text; None if it never did.
        settled: When the futures of all its texts were done.
        pending: Those that are not.
        outcome: A `Reply`, an `Embedding`, a list of them, the bytes that were relayed, an exception, "cancelled", or None.
        name: The id of what it spooled.
    """

    number: int
    call: Call
    arrived: float | None = None
    accepted: float | None = None
    settled: float | None = None
    pending: int = 0
    ended: float | None = None
    cancel: float | None = None
    outcome: Any = None
    name: str | None = None
    task: asyncio.Task[Any] | None = None

    @property
    def content(self) -> tuple[Any, ...]:
        """All that requests which travel together, or share an answer, must have in common, but for their texts."""
        call = self.call
        kind = call.kind if call.what == "submit" else "vector"
        system = call.system if call.what == "submit" else ""
        return call.batcher, kind, system, call.tenant, call.headers

    @property
    def replies(self) -> list[Any]:
        """What it was answered."""
        found = self.outcome if isinstance(self.outcome, list) else [self.outcome]
        return [each for each in found if isinstance(each, mb.Reply | mb.Embedding)]

    @property
    def error(self) -> BaseException | None:
        """What it ended with, if it was an error."""
        return self.outcome if isinstance(self.outcome, BaseException) else None


class Proven(SemanticCache):
    """A semantic cache that hands answers out from the start."""

    def kind(self, digest, model):
        return self.kinds.get_or_make(
            digest, lambda: KindEvidence(digest=digest, model=model, state="proven", threshold=SIMILAR, bound=0.3)
        )


class MixedWorld(Stage):
    """One run of a scenario.

    Attributes:
        callers: By number.
        by_text: The callers of each text.
        batchers: The batchers of the callers.
        stats: Their figures after the end.
        spool: The spool, or None.
        deaths: How often each spooled text was held by a worker that died.
        charges: What was charged to a budget.
        overspent: Charges that the budget did not allow.
        overcharged: Grants of tokens that the rate limit did not allow.
    """

    def __init__(self, scenario: Mixed) -> None:
        super().__init__(scenario.order, scenario.shuffled)
        self.scenario = scenario
        self.callers = [Caller(number, call) for number, call in enumerate(scenario.calls)]
        self.by_text: dict[str, list[Caller]] = {}
        for caller in self.callers:
            for text in caller.call.texts:
                self.by_text.setdefault(text, []).append(caller)
        self.upstream = Endpoint(self, scenario.faults, scenario.poison, scenario.embeds, scenario.forwards)
        self.spool = MemorySpool(scenario.outages, scenario.spool_latency) if "spool" in scenario.parts else None
        self.deaths: dict[str, int] = {}
        self.closed: tuple[float, float | None] | None = None
        self.over = False
        self.overcharged: list[str] = []
        self.stats: list[mb.Stats] = []
        self._poison = {text for call in scenario.calls if call.poison for text in call.texts}
        self._by_task: dict[asyncio.Task[Any] | None, Caller] = {}
        self._letters = Random(scenario.order or 0)
        self._looked_up = itertools.count()
        self._limits: list[mb.RateLimit] = []
        self._budgets: list[mb.Budget] = []
        self._ways = {
            "submit": self._submit,
            "embed": self._embed_one,
            "embed_many": self._embed_many,
            "forward": self._forward,
            "enqueue": self._enqueue,
        }
        self.batchers = [self._make_batcher() for _ in range(scenario.batchers)]

    def _draw_ids(self, count: int) -> list[str]:
        return ["".join(self._letters.choices(ALPHABET, k=5)) for _ in range(count)]

    def _make_batcher(self) -> mb.Microbatcher:
        scenario = self.scenario
        if scenario.rate_limit and not (self._limits and scenario.together):
            self._limits.append(mb.RateLimit(**scenario.rate_limit))
            self._watch_grants(self._limits[-1])
        if scenario.budget and not (self._budgets and scenario.together):
            self._budgets.append(mb.Budget(**scenario.budget))
        cache = None
        if "similar" in scenario.parts:
            embed = None if scenario.look_ups is None else self._embed
            cache = Proven(mb.MemoryCache(), embed=embed, max_error=0.3)
        batcher = mb.Microbatcher(
            self.upstream,
            policy=mb.FlushPolicy(**scenario.policy),
            retry=mb.RetryPolicy(**scenario.retry),
            fallback=mb.FallbackPolicy(**scenario.fallback),
            rate_limit=self._limits[-1] if self._limits else None,
            budget=self._budgets[-1] if self._budgets else None,
            cache=cache,
            audit=mb.AuditPolicy(**scenario.audit) if scenario.audit else None,
            spool=self.spool,
            prices=PRICES,
            tokens="bytes",
            draw_ids=self._draw_ids,
            id_secret="sim",
        )
        self._watch(batcher)
        return batcher

    # --- watching

    def _watch(self, batcher: mb.Microbatcher) -> None:
        """Note who is accepted and which calls nobody waits for: nothing public tells it."""
        parts = batcher._parts
        parts.sender._draw = lambda: self._letters.randrange(9) / 8
        note = batcher._intake._note_accepted

        def watched(ticket, waiter, loop):
            note(ticket, waiter, loop)
            caller = self._by_task[asyncio.current_task()]
            if caller.accepted is None:
                caller.accepted = self.now()
            caller.pending += 1
            caller.settled = None
            self.note("accepted", caller.number)
            waiter.future.add_done_callback(lambda _: self._settled(caller))

        batcher._intake._note_accepted = watched
        checks = parts.audits
        if parts.look_ups is not None:
            checks = parts.look_ups.checks
            checks._draw = SimpleNamespace(random=lambda: self._letters.random() / 10)  # every second answer is checked
        if checks is not None:
            ask_again = checks._dispatcher.ask_again

            async def beside(ticket, permit, history, route="audit"):
                BESIDE.set(route)
                return await ask_again(ticket, permit, history, route)

            checks._dispatcher.ask_again = beside
        if parts.spending is not None:
            self.watch_charges(parts.spending, self.scenario.budget)

    def _settled(self, caller: Caller) -> None:
        caller.pending -= 1
        if not caller.pending:
            caller.settled = self.now()
        self.note("settled", caller.number)

    def _watch_grants(self, limit: mb.RateLimit) -> None:
        """Note grants that are more than the limit in any minute, as they were charged by then."""
        make, granted = limit.bucket, {}

        def bucket(key, now, *name):
            made = make(key, now, *name)
            if not hasattr(made, "watched"):
                made.watched = True
                grant = made.grant

                def watched(tokens, now, who=None):
                    got = grant(tokens, now, who)
                    log = granted.setdefault(key, [])
                    log.append(got)
                    charged = sum(each.tokens for each in log if each.at > now - 60.0)
                    if limit.tpm is not None and charged > limit.tpm * (1 + 1e-6) and tokens:
                        self.overcharged.append(f"{charged} of {limit.tpm} tokens in the minute before {now}")
                    return got

                made.grant = watched
            return made

        limit.bucket = bucket

    async def _embed(self, texts: list[str]) -> Any:
        """Embed for look-ups, as the fault says."""
        faults, number = self.scenario.look_ups or [], next(self._looked_up)
        fault = faults[number] if number < len(faults) else None
        vectors: Any = [right_vector(text.rpartition("cook ")[2].split(" ")[0]) for text in texts]
        if fault is None:
            return vectors
        self.note("look-up", number, fault.kind, *texts)
        await asyncio.sleep(fault.latency + (0.25 if fault.kind == "slow" else 0.0))
        if fault.kind == "raises":
            raise ZeroDivisionError("a bug in embed")
        if fault.kind == "hangs":
            await asyncio.sleep(100.0)
        if fault.kind == "nan":
            vectors[0] = [float("nan")] * len(vectors[0])
        if fault.kind == "longer":
            vectors[0] = [*vectors[0], 1.0]
        return vectors[1:] if fault.kind == "short" else vectors

    # --- what the endpoint tells and asks

    def is_poison(self, text: str) -> bool:
        """Return whether calls that carry *text* are refused."""
        return text in self._poison

    def attempt_came(self, attempt: Attempt) -> None:
        """Nothing hangs on it."""

    def answers_come(self, texts: list[str], when: str) -> None:
        """Cancel who wants to be cancelled in the step of its answer."""
        for text in texts:
            for caller in self.by_text.get(text, ()):
                if caller.call.cancel == ("answer", when):
                    self._cancel(caller)

    # --- what callers do

    def _cancel(self, caller: Caller) -> None:
        if caller.task is not None and not caller.task.done() and caller.cancel is None:
            caller.cancel = self.now()
            self.note("cancel", caller.number)
            caller.task.cancel()

    def _arrive(self, caller: Caller) -> None:
        caller.task = self._start(self._ask(caller))
        self._by_task[caller.task] = caller
        if caller.call.cancel is not None and caller.call.cancel[0] == "after":
            self.loop.call_later(float(caller.call.cancel[1]), self._cancel, caller)

    async def _ask(self, caller: Caller) -> None:
        WHOSE.set(f"caller {caller.number}")
        caller.arrived = self.now()
        self.note(caller.call.what, caller.number, *caller.call.texts)
        try:
            caller.outcome = await self._ways[caller.call.what](caller, self.batchers[caller.call.batcher])
            self.note("answer", caller.number)
        except asyncio.CancelledError:
            caller.outcome = "cancelled"
            self.note("cancelled", caller.number)
        except BaseException as error:  # noqa: BLE001 whatever comes is judged later
            error.__traceback__ = None  # it would keep this whole world alive
            caller.outcome = error
            self.note("error", caller.number, type(error).__name__, str(error))
        caller.ended = self.now()

    def _options(self, call: Call) -> dict[str, Any]:
        return {
            "tenant": call.tenant,
            "headers": dict(call.headers) or None,
            "priority": call.priority,
            "timeout": call.timeout,
        }

    def _messages(self, call: Call) -> list[dict[str, str]]:
        return [{"role": "system", "content": call.system}, {"role": "user", "content": call.texts[0]}]

    async def _submit(self, caller: Caller, batcher: mb.Microbatcher) -> Any:
        call = caller.call
        return await batcher.submit(
            self._messages(call),
            output_type=str if call.kind == "text" else OUTPUT_TYPES[call.kind],
            **self._options(call),
        )

    async def _embed_one(self, caller: Caller, batcher: mb.Microbatcher) -> Any:
        return await batcher.embed(caller.call.texts[0], **self._options(caller.call))

    async def _embed_many(self, caller: Caller, batcher: mb.Microbatcher) -> Any:
        return await batcher.embed_many(list(caller.call.texts), **self._options(caller.call))

    async def _forward(self, caller: Caller, batcher: mb.Microbatcher) -> Any:
        call, got = caller.call, []
        body = {"model": "sim", "messages": [], "max_tokens": 60, "stream": True} if call.charged else {}
        async with batcher.forward(
            "POST", f"/v1/things/{caller.number}", dict(call.headers), json.dumps(body).encode(), tenant=call.tenant
        ) as response:
            async for piece in response:
                got.append(piece)
                if call.pause:
                    await asyncio.sleep(call.pause)
            caller.name = "whole" if got == Relayed.pieces(response) else "wrong"
        return b"".join(got)

    async def _enqueue(self, caller: Caller, batcher: mb.Microbatcher) -> Any:
        call, kind = caller.call, OUTPUT_TYPES[caller.call.kind]
        name = f"request {caller.number}"
        for _ in range(2 if call.again else 1):
            while True:
                try:
                    await batcher.enqueue(self._messages(call), id=name, output_type=kind, tenant=call.tenant)
                    break
                except mb.StorageError:
                    await asyncio.sleep(0.25)
        caller.name = name
        await asyncio.sleep(call.pause)
        while True:
            try:
                return await batcher.result(name, tenant=call.tenant, output_type=kind, timeout=call.timeout)
            except mb.StorageError:
                await asyncio.sleep(0.25)

    # --- the run

    async def _main(self) -> None:
        scenario, loop = self.scenario, self.loop
        for batcher in self.batchers:
            await batcher.open()
        start = last = loop.time()
        arrivals: list[Any] = [(caller.call.at, self._arrive, caller) for caller in self.callers]
        if scenario.close is not None:
            arrivals.append((scenario.close[0], self._close, scenario.close[1]))
        for at, call, *args in arrivals:
            loop.call_at(start + at, call, *args)
            last = max(last, start + at)
        shifts = [loop.create_task(self._shift(worker)) for worker in scenario.workers]
        await asyncio.sleep(last - start)
        if self.spool is not None:
            # Now that all have come, what is spooled has to end: neither endpoint nor spool are in trouble any more.
            self.upstream.healthy = self.spool.healthy = True
            shifts.append(loop.create_task(self._shift(Worker(0.0, None, 0.5))))
        await asyncio.sleep(0)
        while waiting := [task for task in self._tasks if not task.done()]:
            await asyncio.wait(waiting)
        for task in self._tasks:
            if not task.cancelled() and task.exception() is not None:
                raise task.exception()
        await self._drain(shifts)
        self.finished = loop.time()
        for caller in self.callers:
            for reply in caller.replies:
                if isinstance(reply, mb.Reply) and caller.call.what == "submit":
                    await reply.settled()
        for batcher in self.batchers:
            await batcher.aclose(30.0)
        for _ in range(3):
            await asyncio.sleep(0)
        self.stats = [batcher.stats() for batcher in self.batchers]
        self._look_for_leftovers(self.batchers)
        if self.upstream.closed != 1:
            self.leftover.append(f"the transport was closed {self.upstream.closed} times")

    def _close(self, grace: float | None) -> None:
        self.closed = (self.now(), grace)
        self.note("close", grace)
        self._start(self.batchers[0].aclose(grace))

    # --- the spool

    async def _drain(self, shifts: list[asyncio.Task[None]]) -> None:
        if self.spool is None:
            return
        await asyncio.sleep(1.0)  # what the gone have put may be on its way
        while (await self.spool.counts()).depth:  # noqa: ASYNC110 the workers are other processes
            await asyncio.sleep(0.5)
        self.over = True
        await asyncio.wait(shifts)
        for shift in shifts:
            shift.result()

    async def _shift(self, worker: Worker) -> None:
        await asyncio.sleep(worker.at)
        dies = worker.dies
        while not self.over:
            await Life(self, dies).live()
            dies = None
            await asyncio.sleep(worker.rest)

    def died(self, held: list[str]) -> None:
        """Note that a worker died that held these texts."""
        self.note("worker dies", *held)
        for text in held:
            self.deaths[text] = self.deaths.get(text, 0) + 1


@dataclass(eq=False)
class Life:
    """One life of a worker, which is its own process: its transport and its batchers die with it."""

    world: MixedWorld
    dies: float | None
    dead: bool = False
    model: str = "sim"
    _task: asyncio.Task[None] | None = None
    _handle: Handle | None = field(default=None)

    async def live(self) -> None:
        """Work until it dies, or all is over."""
        world, policy = self.world, dict(self.world.scenario.policy)
        size = policy["max_batch_size"]
        self._handle = Handle(world.spool)
        batchers = {}
        for step, most in ((Step.FULL, size), (Step.HALF, max(1, size // 2)), (Step.ALONE, 1)):
            batcher = mb.Microbatcher(
                self,
                policy=mb.FlushPolicy(max_batch_size=most, max_concurrent_batches=1 if step is Step.ALONE else 2),
                retry=mb.RetryPolicy(**world.scenario.retry),
                tokens="bytes",
                draw_ids=world._draw_ids,
                id_secret="sim",
            )
            batcher._parts.sender._draw = lambda: world._letters.randrange(9) / 8
            batchers[step] = await batcher.open(), most * 2
        self._worker = spool_worker.Worker(self._handle, batchers, lease=world.scenario.lease)
        self._task = world.loop.create_task(self._worker.run())
        timer = None if self.dies is None else world.loop.call_later(self.dies, self.die)
        while not self._task.done():
            await asyncio.wait([self._task], timeout=0.5)
            if world.over:
                self._worker.stop()
        if timer is not None:
            timer.cancel()
        for batcher, _ in batchers.values():
            await batcher.aclose(0.0)
        if not self._task.cancelled():
            self._task.result()

    def die(self) -> None:
        """Die: nothing that it does reaches the spool or the endpoint any more."""
        if not self.dead and self._task is not None and not self._task.done():
            self.dead = self._handle.dead = True
            held = [json.loads(each.item.payload)["messages"][-1]["content"] for each in self._worker._held.values()]
            self.world.died(held)
            self._task.cancel()

    async def send(self, call: Any, on_text: Any) -> Any:
        """Send to the endpoint."""
        deadly = (text for text, callers in self.world.by_text.items() if any(each.call.deadly for each in callers))
        if self.dead or any(text in call.messages[-1]["content"] for text in deadly):
            self.die()
            await asyncio.sleep(1_000.0)
        return await self.world.upstream.send(call, on_text)

    async def aclose(self) -> None:
        """Close the connections, which are its own."""


def play(scenario: Mixed) -> MixedWorld:
    """Play *scenario*; return the world after it."""
    world = MixedWorld(scenario)
    world.run()
    return world
