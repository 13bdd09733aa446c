"""Audits condemn and correct cached answers in every kind of cache."""

from __future__ import annotations

import asyncio

import pytest
from helpers import ask, batcher_for, submit_all
from test_caches import KINDS, made
from two_minds import TwoMinds, ask_pairs, audited_batcher

from microbatch.caching.answer_cache import FRESH


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """The tests here are about answers, not about how soon they come: this machine may be busy."""
    for module in ("guard", "tiers", "answer_cache"):
        monkeypatch.setattr(f"microbatch.caching.{module}.LIVE_TIMEOUT", 5.0)


@pytest.fixture(params=KINDS)
def cache(request, tmp_path):
    url = request.getfixturevalue("redis_url") if "redis" in request.param else None
    return made(request.param, tmp_path, url)  # batchers open and close it


PAIR = {"idle": "wait", "max_batch_size": 2}


@pytest.mark.promise(of="audit_cache")
async def test_what_a_condemned_size_has_answered_is_asked_for_anew_and_all_else_is_a_hit(cache):
    async with batcher_for(TwoMinds(), cache, **PAIR) as before:  # without an audit
        wrong = await submit_all(before, ["worse a", "worse b"])
        await before.submit(ask("worse alone"))
        await submit_all(before, ["sound a", "sound b"], max_tokens=50)  # another kind of lane
        assert {(reply.output, reply.batch_size) for reply in wrong} == {("WRONG", 2)}
    async with audited_batcher(TwoMinds(), cache=cache, policy={"adapt": True}) as batcher:
        hit = await batcher.submit(ask("worse a"))
        assert (hit.route, hit.output, hit.batch_size, hit.lane_kind) == ("cache", "WRONG", 2, wrong[0].lane_kind)
        await ask_pairs(batcher, "worse", 20)
        assert [(row.kind, row.condemned) for row in batcher.stats().audit] == [(hit.lane_kind, True)]
        misses = batcher.stats().cache_misses
        mended = [await batcher.submit(ask(text)) for text in ("worse a", "worse b")]
        assert [(reply.route, reply.output) for reply in mended] == [("single", "WORSE A"), ("single", "WORSE B")]
        assert batcher.stats().cache_misses == misses + 2
        assert (await batcher.submit(ask("worse alone"))).route == "cache"
        assert {reply.route for reply in await submit_all(batcher, ["sound a", "sound b"], max_tokens=50)} == {"cache"}
        await asyncio.sleep(2 * FRESH)
        again = await batcher.submit(ask("worse a"))
        assert (again.route, again.output, again.batch_size) == ("cache", "WORSE A", 1)


@pytest.mark.promise(of="audit_cache")
async def test_an_answer_that_combining_has_changed_is_replaced_by_that_alone(cache):
    async with audited_batcher(TwoMinds(), cache=cache) as batcher:
        await ask_pairs(batcher, "worse", 3)
        await asyncio.sleep(2 * FRESH)
        texts = [f"worse {pair} {item}" for pair in range(3) for item in "ab"]
        found = [await batcher.submit(ask(text)) for text in texts]
    async with batcher_for(TwoMinds(), cache) as other:
        assert [(await other.submit(ask(text))).output for text in texts] == [reply.output for reply in found]
    assert {reply.route for reply in found} == {"cache"}
    for pair in (found[:2], found[2:4], found[4:]):  # one of each was audited
        assert sorted((reply.output[:5], reply.batch_size) for reply in pair) == [("WORSE", 1), ("WRONG", 2)]
