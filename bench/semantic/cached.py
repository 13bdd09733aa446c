"""`SemanticCache` on streams of questions: a batcher, a SIMULATED model that knows the right answers, and a clock on virtual time."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import microbatch as mb
from microbatch.testing import Latency, SimulatedModel, SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from bench.semantic.questions import Pair

    Embed = Callable[[list[str]], Awaitable[Sequence[Any]]]

PACE = 0.1
"""Seconds between two requests."""

LATENCY = Latency(first_token=0.2, tokens_per_second=100.0)
INSTRUCTIONS = "You classify messages from customers of a bank. Answer with the label that fits the message best."


class Asked(NamedTuple):
    """A question that was asked, where its answer came from, and the answer."""

    text: str
    route: str
    answer: str


class Scene:
    """A batcher with a semantic cache, and a model whose answers are looked up.

    Args:
        answers: The right answer to each text; it may be changed while questions are asked.
        noise: Share of the model's answers that are another label, drawn anew each time.
    """

    def __init__(self, answers: dict[str, str], labels: Sequence[str], embed: Embed, *, max_error: float, noise: float, seed: int) -> None:  # fmt: skip
        self.answers, self.labels, self.noise = answers, tuple(labels), noise
        self._draw = random.Random(seed)
        self._kind = Literal[self.labels]
        model = SimulatedModel(answer=self._answer, latency=LATENCY)
        # The same ids and audits in each run with the same seed.
        cache = mb.SemanticCache(mb.MemoryCache(max_entries=10**6), embed=embed, max_error=max_error)
        self.batcher = mb.Microbatcher(SimulatedTransport(model), cache=cache, id_secret=str(seed))

    def _answer(self, text: str, _: dict[str, Any] | None) -> str:
        right = self.answers[text]
        if self._draw.random() >= self.noise:
            return right
        return self._draw.choice([label for label in self.labels if label != right])

    async def ask(self, texts: Iterable[str], tenants: Iterable[str | None] = ()) -> list[Asked]:
        """Ask *texts*, one every `PACE` seconds, each as the tenant at its place if there are any."""
        done: list[Asked] = []

        async def one(text: str, tenant: str | None) -> None:
            asked = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": text}]
            reply = await self.batcher.submit(asked, model="gpt-4.1-mini", output_type=self._kind, tenant=tenant)
            done.append(Asked(text, reply.route, reply.output))

        async with asyncio.TaskGroup() as group:
            for text, tenant in zip(texts, tenants or itertools.repeat(None), strict=False):
                group.create_task(one(text, tenant))
                await asyncio.sleep(PACE)
        return done

    def hits(self, done: list[Asked]) -> dict[str, int]:
        similar = [(text, answer) for text, route, answer in done if route == "similar"]
        wrong = sum(answer != self.answers[text] for text, answer in similar)
        return {"requests": len(done), "hits": len(similar), "false_hits": wrong}

    def evidence(self) -> dict[str, Any]:
        """Return what the cache says of itself; all questions are of one kind."""
        stats = self.batcher.stats()
        (kind,) = stats.similar
        told = {
            name: getattr(kind, name) for name in ("state", "why", "threshold", "pairs", "excess", "upper", "checked")
        }
        return {
            **told,
            "calls": stats.upstream_calls,
            "checks": stats.similar_checks,
            "refusals": dict(stats.guard_refusals),
        }


def run(coroutine: Any) -> Any:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(coroutine)


async def stream(scene: Scene, texts: Sequence[str]) -> dict[str, Any]:
    """Ask *texts*; return the hits in all, and in the last quarter, when most has been learned."""
    async with scene.batcher:
        done = await scene.ask(texts)
        late = scene.hits(done[len(done) * 3 // 4 :])
        return {**scene.hits(done), "late": late, **scene.evidence()}


async def walls(scene: Scene, texts: Sequence[str], questions: Sequence[str], changes: dict[str, list[Pair]]) -> dict[str, Any]:  # fmt: skip
    """Ask *texts* until answers are handed out; then ask beyond walls, where no answer may come from the cache.

    Each of *questions*, which are among the texts, is asked by a tenant of its own, who has asked nothing before. Each pair of *changes*
    has a tenant too: it asks the question, in other words (which may hit), and what the question is changed to.
    """
    async with scene.batcher:
        first = scene.hits(await scene.ask(texts))
        alone = await scene.ask(questions, [f"tenant {place}" for place in range(len(questions))])
        changed = {}
        for kind, pairs in changes.items():
            tenants = [f"{kind} {place}" for place in range(len(pairs))]
            await scene.ask([pair.text for pair in pairs], tenants)
            again = await scene.ask([thanks(pair.text) for pair in pairs], tenants)
            beyond = await scene.ask([pair.changed for pair in pairs], tenants)
            changed[kind] = {"asked": len(beyond), "crossed": _from_cache(beyond), "again": _from_cache(again)}
        tenants_told = {"asked": len(alone), "crossed": _from_cache(alone)}
        return {"first": first, "changed": changed, "tenants": tenants_told, **scene.evidence()}


def thanks(text: str) -> str:
    """Return *text* in other words with the same facts."""
    return f"{text} Thanks"


def _from_cache(done: list[Asked]) -> int:
    return sum(one.route in {"similar", "cache"} for one in done)
