"""Whatever happens in a semantic cache, no caller gets an answer from behind a wall, and every request ends."""

import asyncio
import itertools
import random

import pytest
from helpers import batcher_for
from similar_world import THINGS, Embedder, Naming, question, thing_of

import microbatch as mb

USAGE = ("prompt_tokens", "completion_tokens")


class World:
    """Callers of several tenants, headers, instructions and priorities, some of whom leave, and an embedder with moods.

    Attributes:
        given: For each answer of the model, the wall behind which it was asked for; answers are all different.
        found: The walls, questions and replies of callers.
        reported: The usage of all calls.
    """

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.numbers = itertools.count()
        self.texts = itertools.count()
        self.transport = Naming(delay=0.05)
        self.transport._answer = lambda text: f"{thing_of(text).upper()} #{next(self.numbers)}"
        self.embed = Embedder(spread=0.1, fault=self._mood)
        self.cache = mb.SemanticCache(
            mb.MemoryCache(),
            embed=self.embed_slowly,
            max_error=0.3,
            same=lambda one, other: one.split("#")[0] == other.split("#")[0],
            lookup_timeout=0.1,
        )
        self.found, self.reported, self.cleared = [], dict.fromkeys(USAGE, 0), []

    async def embed_slowly(self, texts):
        self.embed.delay = self.rng.choice((0, 0, 0, 0.001, 0.01, 0.03, 0.3))
        return await self.embed(texts)

    def _mood(self, vectors):
        mood = self.rng.random()
        if mood < 0.03:
            raise RuntimeError
        if mood < 0.06:
            return vectors[1:]
        if mood < 0.09:
            return [[float("nan")] * 32, *vectors[1:]]
        return vectors

    def on_call(self, event):
        if event.usage is not None:
            for name in USAGE:
                self.reported[name] += getattr(event.usage, name)

    async def caller(self, batcher):
        rng = self.rng
        await asyncio.sleep(rng.random() * 60)
        wall = {
            "tenant": rng.choice((None, "a", "b")),
            "headers": rng.choice((None, {"x-team": "1"})),
        }
        system = rng.choice(("Name it.", "Say what it is."))
        text = question(rng.choice(THINGS[:6]), next(self.texts) if rng.random() < 0.9 else rng.randrange(30))
        options = {
            "priority": rng.choice(("normal", "normal", "low", "high")),
            "timeout": rng.choice((None, None, None, 0.06)),
            "use_cache": rng.choice((True, True, True, True, "refresh", False)),
        }
        asking = asyncio.ensure_future(
            batcher.submit(
                [{"role": "system", "content": system}, {"role": "user", "content": text}], **wall, **options
            )
        )
        if rng.random() < 0.1:
            asyncio.get_running_loop().call_later(rng.random() * 0.05, asking.cancel)
        begun = len(self.cleared)
        try:
            reply = await asking
        except (asyncio.CancelledError, mb.DeadlineExceeded):
            return
        self.found.append((repr((wall, system)), text, reply, begun))

    async def janitor(self):
        for _ in range(3):
            await asyncio.sleep(17)
            tenant = self.rng.choice(("a", "b", None))
            before = next(self.numbers)
            await asyncio.sleep(0.1)
            await self.cache.clear(tenant)
            # What is stored at that time may stay, and so may what was read.
            await asyncio.sleep(0.2)
            self.cleared.append((tenant, before))

    async def play(self, callers=900):
        async with batcher_for(self.transport, self.cache, hooks=[self], max_wait=0.02) as batcher:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.janitor())
                for _ in range(callers):
                    tasks.create_task(self.caller(batcher))
            await asyncio.sleep(5)
            self.stats = batcher.stats()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.promise(of="similar")
async def test_no_answer_crosses_a_wall_and_every_request_ends(seed):
    world = World(seed)
    await world.play()
    stats = world.stats
    assert stats.queued == stats.in_flight == 0
    assert stats.items == stats.answered + stats.failed + stats.cancelled
    similar = [entry for entry in world.found if entry[2].route == "similar"]
    assert similar
    asked = {reply.text: wall for wall, _, reply, _ in world.found if reply.route not in ("similar", "cache", "shared")}
    for wall, text, reply, _ in similar:
        # One whose caller has left is not among them.
        assert asked.get(reply.text, wall) == wall
        assert reply.text.startswith(thing_of(text).upper())
        assert (reply.usage, reply.cost_usd) == (mb.Usage(), 0.0)
        assert reply.score is not None
    handed_out = {
        name: sum(getattr(reply.usage, name) for _, _, reply, _ in world.found if not reply.usage.estimated)
        for name in USAGE
    }
    for name in USAGE:
        assert handed_out[name] + getattr(stats.unclaimed, name) == world.reported[name]


@pytest.mark.parametrize("seed", range(3))
async def test_what_was_cleared_is_never_handed_out_again(seed):
    world = World(seed)
    await world.play()
    for wall, _, reply, begun in world.found:
        if reply.route not in ("similar", "cache"):
            continue
        number = int(reply.text.split("#")[1])
        for tenant, before in world.cleared[:begun]:
            if tenant is None or f"'tenant': {tenant!r}" in wall:
                assert number > before
