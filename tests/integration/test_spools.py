"""One suite for both spools: what put has acknowledged is answered, once, by whoever holds it."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import time
from contextlib import AsyncExitStack

import pytest
from helpers import opened
from spools import ALONE, FULL, HALF, LONG, found, ids, item, items

from microbatch.errors import ConfigError, StorageError
from microbatch.spool import redis as redis_spool
from microbatch.spool import sqlite as sqlite_spool
from microbatch.spool.records import LOST, Counts, Found, Item, Job, Name, Spool, Stage
from microbatch.spool.redis import RedisSpool
from microbatch.spool.sqlite import SQLiteSpool

pytestmark = pytest.mark.slow


SHORT = 0.1
IN_TIME = 3.0  # long enough for a loaded machine to take the next step before it is over
PATIENCE = 20.0


@pytest.fixture(params=["sqlite", "redis"])
def make(request, tmp_path):
    """Return a function that makes one more spool object for the same spool."""
    if request.param == "sqlite":
        return lambda **options: SQLiteSpool(tmp_path / "spool.sqlite", **options)
    url = request.getfixturevalue("redis_url")
    return lambda **options: RedisSpool(url, **options)


@pytest.fixture
async def spools(make):
    """Return a function that makes and opens one more."""
    async with AsyncExitStack() as stack:

        async def open_one(**options):
            return await stack.enter_async_context(opened(make(**options)))

        yield open_one


@pytest.fixture
async def spool(spools):
    return await spools()


async def taken(spool, stage, most=10, *, lease=LONG):
    """Take what may come within some seconds: at least one."""
    end = time.monotonic() + PATIENCE
    while not (found := await spool.take(stage, most, lease=lease)):
        assert time.monotonic() < end, f"nothing comes to {stage!r}"
        await asyncio.sleep(0.01)
    return found


async def all_of(generator):
    return [each async for each in generator]


# --- putting


async def test_a_spool_is_what_the_protocol_says(spool):
    assert isinstance(spool, Spool)


async def test_a_name_is_new_then_known_and_in_conflict_with_other_content(spool):
    assert await spool.put([item("a"), item("b")]) == ["new", "new"]
    assert await spool.put([item("a"), item("c"), item("b", "other")]) == ["known", "new", "conflict"]
    assert (await spool.counts()).waiting == (3, 0, 0)
    (a, b, c) = await spool.take(FULL, 10, lease=LONG)
    assert (a.item, b.item, c.item) == (item("a"), item("b"), item("c"))


async def test_the_first_of_several_with_one_name_in_one_put_counts(spool):
    assert await spool.put([item("a"), item("a"), item("a", "other"), item("b")]) == ["new", "known", "conflict", "new"]
    assert [d.item for d in await spool.take(FULL, 10, lease=LONG)] == [item("a"), item("b")]


async def test_the_same_id_of_two_tenants_is_two_requests_and_no_tenant_is_not_the_empty_one(spool):
    tenants = (None, "", "t")
    assert await spool.put([item("a", f"of {tenant}", tenant) for tenant in tenants]) == ["new"] * 3
    deliveries = await spool.take(FULL, 10, lease=LONG)
    await spool.finish([(d, f"to {d.item.name.tenant}".encode()) for d in deliveries[:2]])
    assert await spool.find([Name(tenant, "a") for tenant in tenants]) == [
        Found("done", b"to None"),
        Found("done", b"to "),
        Found("leased"),
    ]


async def test_names_and_contents_may_be_any_text(spool):
    odd = ['"', "\\", "\x00", "ü🦆", "a b\n", "{}", "'", "%d", "[null]", "x" * 10_000]
    wanted = [Item(Name(text, text), bytes(range(256)), b"\x00\xff" + text.encode()) for text in odd]
    assert await spool.put(wanted) == ["new"] * len(odd)
    deliveries = await spool.take(FULL, 100, lease=LONG)
    assert [d.item for d in deliveries] == wanted
    await spool.finish([(d, d.item.payload) for d in deliveries])
    assert [each.result for each in await spool.find([d.item.name for d in deliveries])] == [d.payload for d in wanted]


async def test_what_was_put_is_there_for_others_and_after_reopening(spools, make):
    first = await spools()
    await first.put([item("a")])
    second = await spools()
    assert await found(second, "a") == Found("waiting")
    (delivery,) = await second.take(FULL, 1, lease=LONG)
    assert await found(first, "a") == Found("leased")
    await second.aclose()
    await first.aclose()
    async with opened(make()) as third:
        await third.finish([(delivery, b"answer")])
        assert await found(third, "a") == Found("done", b"answer")
        assert await third.put([item("a")]) == ["known"]
        assert await third.put([item("a", "other")]) == ["conflict"]


async def test_nothing_to_do_is_nothing_done(spool):
    assert await spool.put([]) == []
    assert await spool.find([]) == []
    assert await spool.take(FULL, 5, lease=LONG) == []
    assert await spool.take_jobs(5, lease=LONG) == []
    assert await spool.requeue() == 0
    assert await spool.requeue([Name(None, "x")]) == 0
    await spool.renew([], lease=LONG)
    await spool.finish([])
    await spool.give_back([], error="", counted=True)
    await spool.renew_jobs([], lease=LONG)
    assert await spool.find([Name(None, "x")]) == [Found("unknown")]
    assert await spool.counts() == Counts()
    assert await all_of(spool.export()) == []
    assert await all_of(spool.dead_letters()) == []


async def test_a_spool_that_is_not_open_says_so(make):
    with pytest.raises(StorageError, match="not open"):
        await make().put([item("a")])
    with pytest.raises(StorageError, match="not open"):
        await make().counts()


@pytest.mark.parametrize("options", [{"keep": -1}, {"keep": "7 d"}, {"max_alone": 0}, {"max_alone": 1.5}])
def test_limits_that_make_no_sense_are_refused(make, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make(**options)


# --- deliveries


async def test_requests_are_taken_in_the_order_in_which_they_were_put(spool):
    await spool.put(items(10))
    assert ids(await spool.take(FULL, 4, lease=LONG)) == ["p0000", "p0001", "p0002", "p0003"]
    assert ids(await spool.take(FULL, 99, lease=LONG)) == [f"p{each:04}" for each in range(4, 10)]
    assert await spool.take(FULL, 99, lease=LONG) == []


async def test_who_is_lost_again_and_again_goes_from_full_batches_to_half_ones_to_none_to_the_dead(spools):
    spool = await spools(max_alone=2)
    await spool.put([item("a"), item("b")])
    for deliveries, stage in enumerate((FULL, HALF, ALONE, ALONE), start=1):
        held = await taken(spool, stage)
        assert [d.deliveries for d in held] == [deliveries] * 2
        assert (await spool.counts()).leased == 2
        await spool.renew(held, lease=SHORT)
        others = [each for each in Stage if each != Stage.after(deliveries)]
        assert [await spool.take(each, 10, lease=LONG) for each in others] == [[], []]
        end = time.monotonic() + PATIENCE
        while (counts := await spool.counts()).leased:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        assert sum(counts.waiting) + counts.dead == 2
    assert counts == Counts(dead=2)
    letters = await all_of(spool.dead_letters())
    assert [(letter.item, letter.deliveries, letter.error) for letter in letters] == [
        (item("a"), 4, LOST.format(4)),
        (item("b"), 4, LOST.format(4)),
    ]
    assert await found(spool, "a") == Found("dead", error=LOST.format(4))


async def test_a_lease_holds_as_long_as_it_is_renewed(spools):
    spool, other = await spools(), await spools()
    await spool.put([item("a"), item("b")])
    (a, b) = await spool.take(FULL, 2, lease=IN_TIME)
    await spool.renew([a], lease=LONG)
    assert ids(await taken(other, HALF)) == ["b"]  # so the lease that "a" had at first is over as well
    assert await other.take(HALF, 10, lease=LONG) == []
    assert (await found(spool, "b")).state == "leased"
    assert (await spool.counts()).waiting == (0, 0, 0)
    await spool.renew([a], lease=SHORT)
    assert ids(await taken(other, HALF)) == ["a"]
    await spool.renew([a, b], lease=0)  # by whoever held them before
    assert (await spool.counts()).leased == 2
    assert await spool.take(HALF, 10, lease=LONG) == []


async def test_leases_of_different_lengths_are_each_kept(spools):
    spool, other = await spools(), await spools()
    await spool.put([item("a"), item("b")])
    await spool.take(FULL, 1, lease=LONG)
    await spool.take(FULL, 1, lease=SHORT)
    assert ids(await taken(other, HALF, lease=SHORT)) == ["b"]
    assert ids(await taken(other, ALONE, lease=SHORT)) == ["b"]
    assert (await found(spool, "a")).state == "leased"


async def test_the_first_answer_stays_even_if_it_comes_late(spools):
    late, other = await spools(), await spools()
    await late.put([item("a")])
    (first,) = await late.take(FULL, 1, lease=0)
    (second,) = await other.take(HALF, 1, lease=LONG)
    await late.finish([(first, b"first")])
    await other.finish([(second, b"second")])
    await late.finish([(first, b"third")])
    assert await found(late, "a") == Found("done", b"first")
    await other.renew([second], lease=0)
    await other.give_back([first, second], error="x", counted=True)
    assert [await other.take(stage, 10, lease=LONG) for stage in Stage] == [[], [], []]
    assert await other.counts() == Counts(done=1)


async def test_an_answer_acknowledges_a_request_that_is_waiting_again(spool):
    await spool.put([item("a"), item("b"), item("c")])
    (a, b, c) = await spool.take(FULL, 3, lease=LONG)
    await spool.give_back([a], error="x", counted=True)
    await spool.give_back([b], error="x", counted=False)
    await spool.renew([c], lease=0)
    await spool.finish([(a, b"1"), (b, b"2"), (c, b"3")])
    assert [await spool.take(stage, 10, lease=LONG) for stage in Stage] == [[], [], []]
    assert await spool.counts() == Counts(done=3)


async def test_answers_are_stored_all_or_none(spool):
    await spool.put([item("a"), item("b")])
    (a, b) = await spool.take(FULL, 2, lease=LONG)
    with pytest.raises(StorageError):
        await spool.finish([(a, b"answer"), (b, ["no bytes"])])
    assert await spool.find([a.item.name, b.item.name]) == [Found("leased"), Found("leased")]
    with pytest.raises(StorageError):
        await spool.put([item("c"), Item(Name(None, "d"), b"", ["no bytes"])])
    assert (await found(spool, "c")).state == "unknown"


async def test_an_answer_to_a_request_dropped_since_is_none_to_another_of_its_name(spools):
    spool = await spools(keep=0.001)
    await spool.put([item("a")])
    (old,) = await spool.take(FULL, 1, lease=LONG)
    await spool.finish([(old, b"answer")])
    end = time.monotonic() + PATIENCE
    while await spool.put([item("a", "other")]) != ["new"]:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    await spool.finish([(old, b"answer")])
    await spool.give_back([old], error="x", counted=True)
    assert await found(spool, "a") == Found("waiting")
    (new,) = await spool.take(FULL, 1, lease=LONG)
    assert (new.item, new.deliveries) == (item("a", "other"), 1)


async def test_what_is_given_back_uncounted_is_as_if_never_taken(spool):
    await spool.put(items(4))
    taken = await spool.take(FULL, 3, lease=LONG)
    await spool.give_back(taken[:2], error="no fault of theirs", counted=False)
    assert await spool.find([taken[0].item.name]) == [Found("waiting")]
    assert (await spool.counts()).waiting == (3, 0, 0)
    again = await spool.take(FULL, 10, lease=LONG)
    assert [(d.item.name.id, d.deliveries) for d in again] == [("p0000", 1), ("p0001", 1), ("p0003", 1)]
    await spool.give_back(taken, error="held by somebody else by now", counted=True)
    assert (await spool.counts()).leased == 3
    assert (await spool.counts()).waiting == (0, 1, 0)


async def test_who_fails_alone_often_enough_is_dead_with_the_last_error(spool):
    await spool.put([item("a")])
    for number, stage in enumerate((FULL, HALF, ALONE, ALONE, ALONE), start=1):
        (delivery,) = await spool.take(stage, 1, lease=LONG)
        await spool.give_back([delivery], error=f"failure {number}, sk-verysecret1234 \ud800", counted=True)
    (letter,) = await all_of(spool.dead_letters())
    assert (letter.item, letter.deliveries, letter.error) == (item("a"), 5, "failure 5, *** ?")
    assert abs(letter.died_at - time.time()) < PATIENCE
    assert await found(spool, "a") == Found("dead", error="failure 5, *** ?")
    assert await spool.counts() == Counts(dead=1)
    assert await spool.put([item("a")]) == ["known"]
    assert await spool.put([item("a", "other")]) == ["conflict"]


async def bury(spool, *labels):
    await spool.put([item(label) for label in labels])
    for stage in (FULL, HALF, ALONE):
        deliveries = await spool.take(stage, len(labels), lease=LONG)
        await spool.give_back(deliveries, error="it failed", counted=True)
    return deliveries


async def test_a_dead_letter_is_queued_anew_as_if_never_delivered(spools):
    spool = await spools(max_alone=1)
    await bury(spool, "a", "b", "c")
    assert await spool.requeue([Name(None, "b"), Name("t", "a"), Name(None, "b")]) == 1
    assert [letter.item.name.id for letter in await all_of(spool.dead_letters())] == ["a", "c"]
    (b,) = await spool.take(FULL, 10, lease=LONG)
    assert (b.item, b.deliveries) == (item("b"), 1)
    assert await spool.requeue() == 2
    assert await all_of(spool.dead_letters()) == []
    assert ids(await spool.take(FULL, 10, lease=LONG)) == ["a", "c"]
    assert await found(spool, "a") == Found("leased")


async def test_a_dead_letter_that_is_answered_after_all_is_dead_no_longer(spools):
    spool = await spools(max_alone=1)
    (delivery,) = await bury(spool, "a")
    await spool.finish([(delivery, b"answer")])
    assert await found(spool, "a") == Found("done", b"answer")
    assert await all_of(spool.dead_letters()) == []
    assert await spool.requeue() == 0
    assert await spool.counts() == Counts(done=1)


async def test_dead_letters_come_oldest_first_and_page_by_page(spools, monkeypatch):
    monkeypatch.setattr(redis_spool, "PAGE", 3)
    monkeypatch.setattr(sqlite_spool, "PAGE", 3)
    spool = await spools(max_alone=1)
    for group in ("bcad", "hefg"):
        await bury(spool, *group)
    assert [letter.item.name.id for letter in await all_of(spool.dead_letters())] == list("bcadhefg")


async def test_many_who_take_at_once_never_hold_the_same_request(spools):
    several = [await spools() for _ in range(4)]
    await several[0].put(items(200))

    async def take_all(spool):
        held = []
        while some := await spool.take(FULL, 7, lease=LONG):
            held += ids(some)
        return held

    held = await asyncio.gather(*map(take_all, several * 2))
    assert sorted(itertools.chain(*held)) == [f"p{each:04}" for each in range(200)]


# --- looking


async def test_counts_tell_every_state_and_the_age_of_the_oldest(spools):
    spool = await spools(max_alone=1)
    before = time.time()
    await bury(spool, "dead")
    await spool.put(items(6))
    deliveries = await spool.take(FULL, 4, lease=LONG)
    await spool.finish([(deliveries[0], b"answer")])
    await spool.give_back([deliveries[1]], error="x", counted=True)
    await spool.begin_job(Job("j", b""), [deliveries[2]], lease=LONG)
    counts = await spool.counts()
    assert counts == Counts((2, 1, 0), leased=1, in_job=1, done=1, dead=1, oldest=counts.oldest)
    assert counts.depth == 5
    assert 0 <= counts.oldest <= time.time() - before + 0.1
    assert before - 0.1 <= deliveries[3].queued_at <= time.time()


async def test_export_yields_everything_that_is_kept(spools, monkeypatch):
    monkeypatch.setattr(redis_spool, "PAGE", 2)
    monkeypatch.setattr(sqlite_spool, "PAGE", 2)
    spool = await spools(max_alone=1)
    await bury(spool, "dead")
    await spool.put([item("done"), item("taken"), item("waiting", tenant="t"), item("last")])
    (done, _) = await spool.take(FULL, 2, lease=LONG)
    await spool.finish([(done, b"answer")])
    kept = await all_of(spool.export())
    assert [(k.name, k.found, k.deliveries, k.payload) for k in kept] == [
        (Name(None, "dead"), Found("dead", error="it failed"), 3, b"content of dead"),
        (Name(None, "done"), Found("done", b"answer"), 1, None),
        (Name(None, "taken"), Found("leased"), 1, b"content of taken"),
        (Name("t", "waiting"), Found("waiting"), 0, b"content of waiting"),
        (Name(None, "last"), Found("waiting"), 0, b"content of last"),
    ]


async def test_answers_are_kept_for_a_while_and_then_forgotten(spools, request):
    spool = await spools(keep=IN_TIME)
    await spool.put(items(5))
    deliveries = await spool.take(FULL, 5, lease=LONG)
    await spool.finish([(d, b"answer") for d in deliveries[:4]])
    names = [d.item.name for d in deliveries]
    assert [each.state for each in await spool.find(names)] == ["done"] * 4 + ["leased"]
    end = time.monotonic() + IN_TIME + PATIENCE
    while (await spool.counts()).done:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    assert [each.state for each in await spool.find(names)] == ["unknown"] * 4 + ["leased"]
    assert [kept.name for kept in await all_of(spool.export())] == names[4:]
    assert await spool.put([item("p0000", "other"), item("p0004", "other")]) == ["new", "conflict"]
    if isinstance(spool, SQLiteSpool):
        rows = await spool._database.read(
            lambda db: [db.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("items", "payloads", "results")]
        )
        assert rows == [2, 2, 0]
    else:
        assert await spool._client.zrange("microbatch:spool:names", 0, -1) == [b'[null,"p0004"]', b'[null,"p0000"]']
        assert await spool._client.zcard("microbatch:spool:done") == 0


async def test_old_answers_are_dropped_in_small_portions(spools):
    spool = await spools(keep=0.05)
    await spool.put(items(200))
    await spool.finish([(d, b"answer") for d in await spool.take(FULL, 200, lease=LONG)])
    end = time.monotonic() + PATIENCE
    while (await spool.counts()).done:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    again = [item("p0199", "other"), item("p0198", "other")]
    assert await spool.put(again) == ["new", "new"]  # though their old answers are there, as others come first
    assert await rows_of(spool) == 200 - 66
    (delivery,) = await spool.take(FULL, 1, lease=LONG)
    await spool.put([item("x")])
    assert await rows_of(spool) == 200 - 131 + 1
    await spool.finish([(delivery, b"answer")])
    assert await rows_of(spool) == 200 - 196 + 1
    await spool.put([item("y")])
    await spool.put([item("z")])
    assert [kept.name.id async for kept in spool.export() if kept.payload] == ["p0198", "x", "y", "z"]


async def rows_of(spool):
    if isinstance(spool, SQLiteSpool):
        return await spool._database.read(lambda db: db.execute("SELECT count(*) FROM items").fetchone()[0])
    return await spool._client.zcard("microbatch:spool:names")


# --- batch jobs at the provider


async def test_a_job_holds_its_requests_until_it_ends(spools):
    spool, other = await spools(), await spools()
    await spool.put(items(4))
    deliveries = await spool.take(FULL, 3, lease=0.001)
    job = Job("token", b"lines")
    await spool.begin_job(job, deliveries, lease=0)
    await spool.renew(deliveries, lease=0)
    await asyncio.sleep(0.01)
    assert [await other.take(stage, 10, lease=LONG) for stage in (HALF, ALONE)] == [[], []]
    assert await other.find([deliveries[0].item.name]) == [Found("in_job")]
    assert (await other.counts()).in_job == 3

    assert await other.take_jobs(5, lease=LONG) == [job]
    assert await spool.take_jobs(5, lease=LONG) == []
    known = Job("token", b"more", "batch-7")
    await other.update_job(known)
    tied = await other.job_items("token")
    assert [(d.item, d.deliveries, d.queued_at) for d in tied] == [
        (d.item, d.deliveries, d.queued_at) for d in deliveries
    ]
    await other.finish([(tied[0], b"answer")])
    await other.give_back([tied[1]], error="expired", counted=False)
    assert ids(await other.job_items("token")) == ["p0002"]
    await other.renew_jobs(["token", "unknown"], lease=0)
    assert await spool.take_jobs(5, lease=LONG) == [known]

    await spool.end_job("token", error="cancelled")
    assert await spool.job_items("token") == []
    await spool.renew_jobs(["token"], lease=0)
    await spool.update_job(known)
    assert await spool.take_jobs(5, lease=LONG) == []
    assert sorted(ids(await spool.take(FULL, 10, lease=LONG))) == ["p0001", "p0003"]
    assert ids(await spool.take(HALF, 10, lease=LONG)) == ["p0002"]
    assert (await spool.counts()).in_job == 0


async def test_jobs_are_taken_anew_when_their_lease_runs_out(spools):
    spool = await spools()
    for token in ("a", "b", "c"):
        await spool.begin_job(Job(token, token.encode()), [], lease=SHORT)
    end = time.monotonic() + PATIENCE
    held = []
    while len(held) < 3:
        assert time.monotonic() < end
        held += [job.token for job in await spool.take_jobs(2, lease=LONG)]
        await asyncio.sleep(0.01)
    assert sorted(held) == ["a", "b", "c"]


async def test_a_job_that_ends_again_and_again_makes_its_requests_dead_letters(spools):
    spool = await spools(max_alone=1)
    await spool.put([item("a"), item("b")])
    for number, stage in enumerate((FULL, HALF, ALONE)):
        await spool.begin_job(Job(f"{number}", b""), await spool.take(stage, 10, lease=LONG), lease=LONG)
        await spool.end_job(f"{number}", error="expired, sk-verysecret1234")
    assert [(d.item.name.id, d.error) for d in await all_of(spool.dead_letters())] == [
        ("a", "expired, ***"),
        ("b", "expired, ***"),
    ]


async def test_a_job_takes_only_what_its_worker_still_holds(spool):
    await spool.put(items(3))
    (a, b, c) = await spool.take(FULL, 3, lease=LONG)
    await spool.finish([(a, b"answer")])
    await spool.give_back([b], error="x", counted=True)
    await spool.begin_job(Job("j", b""), [a, b, c], lease=LONG)
    await spool.begin_job(Job("j", b""), [a, b, c], lease=LONG)  # as after an acknowledgement that never came
    assert ids(await spool.job_items("j")) == ["p0002"]
    assert (await spool.counts()).waiting == (0, 1, 0)


# --- SQLite alone


@pytest.fixture
async def file(tmp_path):
    async with opened(SQLiteSpool(tmp_path / "s")) as spool:
        yield spool


async def test_the_file_is_its_owners_alone(file, tmp_path):
    await file.put([item("a")])
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("s", "s-wal", "s-shm"), 0o600
    )


async def test_each_commit_waits_for_the_disk(file):
    settings = await file._database.run(
        lambda db: [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
    )
    assert settings == [2, "wal"]


async def test_no_step_looks_through_the_whole_table(file, monkeypatch):
    """Every query of every step finds its rows by an index that has them in order."""
    plans = set()

    class Explaining:
        def __init__(self, db):
            self.db = db

        def execute(self, query, values=()):
            self.explain(query, values)
            return self.db.execute(query, values)

        def executemany(self, query, rows):
            for row in rows[:1]:
                self.explain(query, row)
            return self.db.executemany(query, rows)

        def explain(self, query, values):
            plans.update((row[3], query) for row in self.db.execute(f"EXPLAIN QUERY PLAN {query}", values))

    for way in ("run", "read"):
        original = getattr(file._database, way)
        monkeypatch.setattr(
            file._database, way, lambda work, original=original: original(lambda db: work(Explaining(db)))
        )
    await file.put(items(9))
    deliveries = await file.take(FULL, 8, lease=LONG)
    await file.renew(deliveries, lease=LONG)
    await file.finish([(d, b"answer") for d in deliveries[:2]])
    await file.give_back(deliveries[2:3], error="x", counted=True)
    await file.give_back(deliveries[3:4], error="x", counted=False)
    await file.begin_job(Job("j", b""), deliveries[4:6], lease=0)
    await file.update_job(Job("j", b""))
    await file.take_jobs(5, lease=LONG)
    await file.job_items("j")
    await file.end_job("j", error="x")
    await file.requeue([item("p0001").name])
    await file.find([d.item.name for d in deliveries])
    await file.counts()
    await all_of(file.dead_letters())
    reading = {plan for plan in plans if "count(*)" in plan[1] and "items" in plan[0]}
    assert {plan for plan in reading if "COVERING INDEX" not in plan[0]} == set()
    full = {plan for plan in plans if plan[0].startswith("SCAN") and "VIRTUAL TABLE" not in plan[0]}
    counting = {plan for plan in full if "USING COVERING INDEX" in plan[0] or plan[0].startswith("SCAN (subquery")}
    assert full - counting == set()
    assert all(plan[1].startswith("SELECT") for plan in counting)
    assert {plan for plan in plans if "TEMP B-TREE" in plan[0] and "deliveries, count" not in plan[1]} == set()


async def test_another_program_that_holds_the_file_is_waited_for(tmp_path):
    path = tmp_path / "s"
    async with opened(SQLiteSpool(path)) as spool:
        blocking = sqlite3.connect(path, isolation_level=None)
        blocking.execute("BEGIN IMMEDIATE")
        putting = asyncio.ensure_future(spool.put([item("a")]))
        assert await spool.counts() == Counts()  # reading waits for nobody
        await asyncio.sleep(0.1)
        assert not putting.done()
        blocking.execute("COMMIT")
        blocking.close()
        assert await putting == ["new"]


# --- Redis alone


async def test_a_server_that_keeps_nothing_is_warned_of_once(redis_url, caplog):
    async with opened(RedisSpool(redis_url)) as spool:
        await spool.put([item("a")])
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("microbatch", "WARNING")
    assert "without `appendonly yes`" in record.message


async def test_a_server_that_does_not_tell_is_warned_of(redis_server, caplog):
    with redis_server.client() as client:
        client.acl_setuser("worker", enabled=True, passwords="+s3cret", keys="*", commands=["+@all", "-info"])
    try:
        async with opened(RedisSpool(f"redis://worker:s3cret@127.0.0.1:{redis_server.port}/0")) as spool:
            assert await spool.put([item("a")]) == ["new"]
        assert "could not be checked" in caplog.text
    finally:
        with redis_server.client() as client:
            client.acl_deluser("worker")


async def test_what_was_acknowledged_survives_the_servers_sudden_death(durable_redis, caplog):
    async with opened(RedisSpool(durable_redis.url)) as spool:
        await spool.put(items(6))
        deliveries = await spool.take(FULL, 4, lease=LONG)
        await spool.finish([(deliveries[0], b"answer")])
        await spool.give_back([deliveries[1]], error="x", counted=False)
        await spool.renew([deliveries[2]], lease=0)
        before = await spool.counts()
        durable_redis.kill()
        with pytest.raises(StorageError):
            await spool.put([item("lost")])
        durable_redis.start()
        counts = await spool.counts()
        assert counts == Counts(before.waiting, before.leased, 0, 1, 0, counts.oldest)
        assert ids(await spool.take(FULL, 10, lease=LONG)) == ["p0001", "p0004", "p0005"]
        assert ids(await spool.take(HALF, 10, lease=LONG)) == ["p0002"]
        await spool.finish([(deliveries[3], b"late")])
        assert await found(spool, "p0003") == Found("done", b"late")
    assert caplog.text == ""


async def test_a_server_that_forgot_everything_is_used_on(redis_server, spools):
    async with opened(RedisSpool(redis_server.url)) as spool:
        await spool.put([item("a")])
        (delivery,) = await spool.take(FULL, 1, lease=LONG)
        with redis_server.client() as client:
            client.flushall()
            client.script_flush()
        await spool.renew([delivery], lease=LONG)
        await spool.finish([(delivery, b"answer")])
        assert await spool.counts() == Counts()
        assert await spool.take(HALF, 1, lease=LONG) == []
        assert await spool.put([item("a")]) == ["new"]
        assert ids(await spool.take(FULL, 1, lease=LONG)) == ["a"]


async def test_a_request_that_somebody_deleted_holds_up_nobody(redis_server):
    async with opened(RedisSpool(redis_server.url)) as spool:
        await spool.put(items(4))
        returned, leased, _ = await spool.take(FULL, 3, lease=LONG)
        await spool.give_back([returned], error="x", counted=False)
        await spool.renew([leased], lease=0)
        with redis_server.client() as client:
            for label in ("p0000", "p0001", "p0003"):
                client.delete(f'microbatch:spool:item:[null,"{label}"]')
        assert (await spool.counts()).waiting == (2, 0, 0)  # that they are gone is seen when their turn comes
        assert [await spool.take(stage, 10, lease=LONG) for stage in Stage] == [[], [], []]
        counts = await spool.counts()
        assert (counts.waiting, counts.leased, counts.depth) == ((0, 0, 0), 1, 1)
        assert [kept.name.id for kept in await all_of(spool.export())] == ["p0002"]


async def test_two_prefixes_are_two_spools(redis_url):
    async with opened(RedisSpool(redis_url, prefix="a:")) as a, opened(RedisSpool(redis_url, prefix="b:")) as b:
        assert await a.put([item("x")]) == ["new"]
        assert await b.put([item("x")]) == ["new"]
        assert await b.take(FULL, 1, lease=0)
        assert (await a.counts()).waiting == (1, 0, 0)
        assert repr(a) == "<RedisSpool: a:*, open>"


async def test_a_server_that_cannot_be_reached_is_told_without_the_password(own_redis):
    own_redis.stop()
    with pytest.raises(ConfigError, match=r"cannot be used: Redis: ConnectionError") as caught:
        await RedisSpool(f"redis://:s3cret@127.0.0.1:{own_redis.port}/0").open()
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError, match="malformed"):
        RedisSpool("http://localhost")
    with pytest.raises(ConfigError, match="prefix"):
        RedisSpool(own_redis.url, prefix=b"x")


async def test_a_server_that_never_answers_is_given_up_in_time(own_redis):
    hasty, patient = RedisSpool(own_redis.url, timeout=1.0), RedisSpool(own_redis.url)
    async with opened(hasty) as spool, opened(patient) as other:
        own_redis.pause()
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(StorageError, match="Timeout"):
                await spool.put([item("a")])
        own_redis.resume()
        assert await other.put([item("a")]) == ["known"]  # it was told, and did it when it came to itself
