"""Both spools do, step by step, what the model does, whatever the steps."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from spool_model import MAX_ALONE, ModelSpool

from microbatch.spool.records import Item, Job, Name, Stage
from microbatch.spool.redis import RedisSpool
from microbatch.spool.sqlite import SQLiteSpool

pytestmark = pytest.mark.slow


STEPS = 400
LONG = 1_000.0  # seconds; the other leases are over at once
WINDOW = 8  # names in use at a time, and deliveries known: enough for old ones to come up, few enough for much to happen to each

WEIGHTS = {
    "put": 3,
    "take": 10,
    "renew": 2,
    "finish": 1,
    "give_back": 4,
    "dead_letters": 1,
    "requeue": 1,
    "begin_job": 2,
    "update_job": 1,
    "take_jobs": 1,
    "renew_jobs": 1,
    "job_items": 1,
    "end_job": 1,
}


class Walk:
    """Does the same to a spool and to its model, by chance, and compares.

    Attributes:
        story: What was done, for whoever looks into a failure.
        seen: How often each state was seen.
    """

    def __init__(self, spool, model, seed):
        self.spool, self.model = spool, model
        self.random = random.Random(seed)
        self.number = itertools.count()
        self.names = [self.new_name() for _ in range(WINDOW)]
        self.given = []  # latest deliveries
        self.story = []
        self.seen = Counter()

    def new_name(self):
        return Name(self.random.choice([None, "", "t"]), f"{next(self.number)}")

    def some(self, things, most=4):
        return self.random.choices(things, k=self.random.randint(1, most)) if things else []

    def over(self):
        return self.random.random() < 0.5

    def tell(self, *what):
        self.story.append(what)

    async def step(self):
        if self.random.random() < 0.1:
            self.names = [*self.names[1:], self.new_name()]
        name = self.random.choices(list(WEIGHTS), WEIGHTS.values())[0]
        await getattr(self, name)()
        await self.compare()

    async def compare(self):
        found, counts, expected = await self.spool.find(self.names), await self.spool.counts(), self.model.counts()
        assert found == self.model.find(self.names), self.story
        assert counts.waiting == expected.waiting, self.story
        assert (counts.leased, counts.in_job) == (expected.leased, expected.in_job), self.story
        assert (counts.done, counts.dead, counts.lost) == (expected.done, expected.dead, 0), self.story
        assert (counts.oldest is None) == (counts.depth == 0), self.story
        self.seen.update(each.state for each in found)

    async def put(self):
        contents = [(name, self.random.choice(["c", "c", "c", "d"])) for name in self.some(self.names)]
        self.tell("put", contents)
        items = [Item(name, content.encode(), f"{name.key} {content}".encode()) for name, content in contents]
        assert await self.spool.put(items) == self.model.put(items), self.story

    async def take(self):
        stage, most, over = self.random.choice(list(Stage)), self.random.randint(0, 4), self.over()
        self.tell("take", stage, most, over)
        taken = await self.spool.take(stage, most, lease=0.0 if over else LONG)
        expected = self.model.take(stage, most, taken[0].lease if taken else "", over=over)
        assert [(delivery.item, delivery.deliveries) for delivery in taken] == expected, self.story
        self.given = [*self.given, *taken][-WINDOW:]

    async def renew(self):
        which, over = self.some(self.given), self.over()
        self.tell("renew", which, over)
        await self.spool.renew(which, lease=0.0 if over else LONG)
        self.model.renew(which, over=over)

    async def finish(self):
        results = [(delivery, f"answer {next(self.number)}".encode()) for delivery in self.some(self.given, 2)]
        self.tell("finish", results)
        await self.spool.finish(results)
        self.model.finish(results)

    async def give_back(self):
        which, counted = self.some(self.given), self.over()
        self.tell("give_back", which, counted)
        await self.spool.give_back(which, error="it failed", counted=counted)
        self.model.give_back(which, "it failed", counted=counted)

    async def dead_letters(self):
        self.tell("dead_letters")
        letters = [(each.item, each.deliveries, each.error) async for each in self.spool.dead_letters()]
        assert letters == self.model.dead_letters(), self.story

    async def requeue(self):
        names = self.random.choice([None, self.some(self.names)])
        self.tell("requeue", names)
        assert await self.spool.requeue(names) == self.model.requeue(names), self.story

    async def export(self):
        kept = [(each.name, each.found, each.deliveries, each.payload) async for each in self.spool.export()]
        assert kept == self.model.export(), self.story

    # --- jobs

    def token(self):
        return self.random.choice(["job-1", "job-2"])

    async def begin_job(self):
        job, which, over = Job(self.token(), b"content"), self.some(self.given), self.over()
        self.tell("begin_job", job.token, which, over)
        await self.spool.begin_job(job, which, lease=0.0 if over else LONG)
        self.model.begin_job(job, which, over=over)

    async def update_job(self):
        job = Job(self.token(), b"other content", self.random.choice([None, "batch-1"]))
        self.tell("update_job", job)
        await self.spool.update_job(job)
        self.model.update_job(job)

    async def take_jobs(self):
        most, over = self.random.randint(1, 2), self.over()
        self.tell("take_jobs", most, over)
        taken = await self.spool.take_jobs(most, lease=0.0 if over else LONG)
        free = self.model.free_jobs()
        assert len(taken) == min(most, len(free)), self.story
        assert all(job in free for job in taken), self.story
        self.model.hold_jobs([job.token for job in taken], over=over)

    async def renew_jobs(self):
        tokens, over = [self.token()], self.over()
        self.tell("renew_jobs", tokens, over)
        await self.spool.renew_jobs(tokens, lease=0.0 if over else LONG)
        self.model.hold_jobs(tokens, over=over)

    async def job_items(self):
        token = self.token()
        self.tell("job_items", token)
        tied = await self.spool.job_items(token)
        expected = [(each.item, each.deliveries, each.lease) for each in self.model.tied(token)]
        assert [(each.item, each.deliveries, each.lease) for each in tied] == expected, self.story
        self.given = [*self.given, *tied][-WINDOW:]

    async def end_job(self):
        token = self.token()
        self.tell("end_job", token)
        await self.spool.end_job(token, error="the job failed")
        self.model.end_job(token, "the job failed")


async def walk(spool, *, keeps_places, seed, check=None):
    walk = Walk(spool, ModelSpool(keeps_places=keeps_places), seed)
    await spool.open()
    try:
        for number in range(STEPS):
            await walk.step()
            if check is not None and number % 4 == 0:
                await check(walk)
        await walk.export()
    finally:
        await spool.aclose()
    assert all(walk.seen[state] > STEPS / 20 for state in ("waiting", "leased", "in_job", "done", "dead")), walk.seen


@pytest.mark.parametrize("seed", range(3))
async def test_the_sqlite_spool_does_what_the_model_does(tmp_path, seed):
    await walk(SQLiteSpool(tmp_path / "spool.sqlite", max_alone=MAX_ALONE), keeps_places=True, seed=seed)


@pytest.mark.parametrize("seed", range(3))
async def test_the_redis_spool_does_what_the_model_does_and_every_entry_has_its_request(redis_url, seed):
    spool = RedisSpool(redis_url, max_alone=MAX_ALONE, prefix="walk:")
    await walk(spool, keeps_places=False, seed=seed, check=every_entry_has_its_request)


async def every_entry_has_its_request(walk):
    """Whoever is waiting or leased has one entry in the stream of its stage, with the right consumer; and there are no others."""
    client, entries, model = walk.spool._client, [], walk.model
    for stage in Stage:
        key = f"walk:stage:{stage:d}"
        if not await client.exists(key):
            continue
        pending = {
            each["message_id"]: each["consumer"] for each in await client.xpending_range(key, "workers", "-", "+", 1000)
        }
        for entry, fields in await client.xrange(key):
            state = "leased" if pending.pop(entry, b"returned") == b"leased" else "waiting"
            entries.append((stage, fields[b"name"].decode(), state))
        assert pending == {}, walk.story
    states = {e.item.name.key: (e.state, e.deliveries) for e in model.entries.values()}
    assert sorted(entries) == sorted(
        (Stage.after(deliveries - (state == "leased")), key, state)
        for key, (state, deliveries) in states.items()
        if state in ("waiting", "leased")
    ), walk.story
    for index, in_it in (
        ("open", lambda state: state not in ("done", "dead")),
        ("done", lambda state: state == "done"),
        ("dead", lambda state: state == "dead"),
        ("names", lambda _: True),
    ):
        members = {each.decode() for each in await client.zrange(f"walk:{index}", 0, -1)}
        assert members == {key for key, (state, _) in states.items() if in_it(state)}, walk.story
