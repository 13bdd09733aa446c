"""What was answered once is not asked again, and nobody gets from the cache what is not theirs."""

import asyncio
import logging
import random

import msgspec
import pytest
from helpers import ask, batcher_for, each, submit_all

import microbatch as mb
from microbatch.caching import entry as entries
from microbatch.caching.answer_cache import BULK_TIMEOUT, FRESH, MAX_CLOCK_SKEW, PAGE
from microbatch.caching.guard import LIVE_TIMEOUT
from microbatch.lru import LRU
from microbatch.testing import ScriptedTransport


class Watched(mb.MemoryCache):
    """A memory cache that counts its calls, and may be slow."""

    def __init__(self, *, delay=0.0, **options):
        super().__init__(**options)
        self.gets, self.sets = [], []
        self.delay = delay

    async def get_many(self, keys):
        self.gets.append(list(keys))
        await asyncio.sleep(self.delay)
        return await super().get_many(keys)

    async def set_many(self, kept):
        self.sets.append(list(kept))
        await asyncio.sleep(self.delay)
        await super().set_many(kept)


async def test_what_was_answered_before_is_not_asked_again():
    transport = ScriptedTransport()
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        first = await submit_all(batcher, "abc")
        again = await submit_all(batcher, "cba")
        stats = batcher.stats()
    assert [reply.output for reply in again] == ["C", "B", "A"]
    assert {reply.route for reply in first} == {"batch"}
    assert {reply.route for reply in again} == {"cache"}
    assert all((reply.usage, reply.cost_usd) == (mb.Usage(), 0.0) for reply in again)
    assert len(transport.calls) == 1
    assert (stats.cache_hits, stats.cache_misses, stats.cache_stores, stats.cache_hit_rate) == (3, 3, 3, 0.5)
    assert (stats.items, stats.answered, stats.queued) == (6, 6, 0)


async def test_look_ups_of_one_turn_are_one_call_and_so_are_the_stores_of_one_reply():
    cache = Watched()
    async with batcher_for(ScriptedTransport(), cache) as batcher:
        await submit_all(batcher, "abcabc")
    assert [len(keys) for keys in cache.gets] == [3]
    assert [len(kept) for kept in cache.sets] == [3]


@pytest.mark.promise(of="single_flight")
async def test_a_thousand_equal_submits_on_a_cold_cache_are_one_item_whoever_leaves():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask("same"), temperature=1)) for _ in range(1_000)]
        await asyncio.sleep(0.5)
        tasks[0].cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        stats = batcher.stats()
    assert isinstance(ended[0], asyncio.CancelledError)
    assert {reply.output for reply in ended[1:]} == {"SAME"}
    assert [text for call in transport.calls for _, text in call.items] == ["same"]
    assert (stats.shared, stats.answered, stats.cancelled) == (998, 999, 1)


async def test_a_hit_waits_for_no_flush_and_for_no_room():
    loop = asyncio.get_running_loop()
    transport = ScriptedTransport(delay=5.0)
    async with batcher_for(transport, mb.MemoryCache(), idle="wait", max_wait=1.0, max_queued=1) as batcher:
        await batcher.submit(ask("a"))
        begun = loop.time()
        busy = asyncio.ensure_future(batcher.submit(ask("b")))
        await asyncio.sleep(0)
        reply = await batcher.submit(ask("a"))
        assert (reply.output, loop.time()) == ("A", begun)
        await busy


@pytest.mark.parametrize("option", [{"use_cache": False}, {"use_cache": False, "temperature": 0}])
async def test_who_wants_an_answer_of_their_own_neither_looks_up_nor_stores(option):
    cache, transport = Watched(), ScriptedTransport()
    async with batcher_for(transport, cache) as batcher:
        await batcher.submit(ask("a"), **option)
        await batcher.submit(ask("a"), **option)
        assert batcher.stats().cache_misses == 0
    assert (cache.gets, cache.sets, len(transport.calls)) == ([], [], 2)


@pytest.mark.promise(of="lane")
async def test_tenants_and_keys_never_see_each_others_answers():
    transport = ScriptedTransport()
    callers = [{"tenant": "a"}, {"tenant": "b"}, {}, {"headers": {"Authorization": "Bearer x"}}]
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        for _ in range(2):
            for caller in callers:
                await batcher.submit(ask("same"), **caller)
    assert len(transport.calls) == len(callers)


async def test_typed_answers_are_decoded_anew_for_each_caller():
    class Fact(msgspec.Struct):
        number: int

    transport = ScriptedTransport(answer=lambda _: {"number": 7})
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        first, _ = await submit_all(batcher, "ab", output_type=Fact)
        again = await batcher.submit(ask("a"), output_type=Fact)
    assert first.output == again.output == Fact(7)
    assert first.output is not again.output
    assert (again.route, again.text) == ("cache", first.text)


async def test_what_goes_alone_is_kept_with_its_body():
    body = {"choices": [{"message": {"content": "hm"}, "logprobs": {"content": []}}]}
    transport = ScriptedTransport(lambda _: ("hm", mb.Completion("stop", model="m", body=body)))
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        await batcher.submit(ask("a"), params={"logprobs": True})
        again = await batcher.submit(ask("a"), params={"logprobs": True})
    assert (again.route, again.body, again.model, again.finish_reason) == ("cache", body, "m", "stop")


# --- what is not kept


def spoilt(spoil):
    def step(call):
        answers = [(name, text.upper()) for name, text in call.items]
        return spoil(call, answers)

    return step


BAD_REPLIES = {
    "truncated": lambda call, answers: (call.reply(answers), mb.Completion("length")),
    "out of order": lambda call, answers: call.reply(reversed(answers)),
    "unknown id": lambda call, answers: call.reply([*answers, ("9zzzzz", "?")]),
    "late duplicate": lambda call, answers: call.reply([*answers, answers[0]]),
    "broken element": lambda call, answers: call.reply(answers).replace('"B"', "B"),
    "cut": lambda call, answers: (call.reply(answers), mb.TransportError("cut")),
}


@pytest.mark.parametrize("how", BAD_REPLIES)
async def test_answers_of_a_reply_that_is_odd_in_any_way_are_not_kept(how):
    cache = Watched()
    transport = ScriptedTransport(spoilt(BAD_REPLIES[how]))
    async with batcher_for(transport, cache) as batcher:
        replies = await submit_all(batcher, "abcd")
    assert [reply.output for reply in replies] == list("ABCD")
    kept = {entries.read(value, key, 0.0).text for stored in cache.sets for key, value, _ in stored}
    alone = {call.items[0][1].upper() for call in transport.calls[1:] if not call.combined}
    assert kept == alone  # what was asked again alone was answered soundly


async def test_a_reply_whose_canary_is_wrong_is_not_kept():
    cache = Watched()
    transport = ScriptedTransport(lambda call: call.reply([(name, "x") for name, _ in call.items]))
    fallback = mb.FallbackPolicy(canary=True)
    async with batcher_for(transport, cache, fallback=fallback) as batcher:
        await submit_all(batcher, "abcd")
    kept = {entries.read(value, key, 0.0).text for stored in cache.sets for key, value, _ in stored}
    assert "x" not in kept


@pytest.mark.parametrize("reason", ["length", "content_filter", "tool_calls"])
async def test_a_single_reply_that_did_not_stop_by_itself_is_not_kept(reason):
    cache = Watched()
    transport = ScriptedTransport(lambda _: ("half", mb.Completion(reason)))
    async with batcher_for(transport, cache) as batcher:
        await asyncio.gather(batcher.submit(ask("a")), return_exceptions=True)
    assert cache.sets == []


@pytest.mark.promise(of="single_flight")
async def test_errors_are_not_kept():
    transport = ScriptedTransport(mb.BadRequest("no", status=400))
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        with pytest.raises(mb.BadRequest):
            await batcher.submit(ask("a"))
        assert (await batcher.submit(ask("a"))).route == "single"


# --- what is found but not given


class Forged(mb.MemoryCache):
    """Hands out whatever `forge` makes of what is kept."""

    def __init__(self, forge):
        super().__init__()
        self.forge = forge

    async def get_many(self, keys):
        found = await super().get_many(keys)
        return self.forge(keys, found, self._entries._values)


def others(keys, found, kept):
    """As a connection out of step does: each key gets what another one asked for."""
    return [next((value for other, (value, _) in kept.items() if other != key), None) for key in keys]


FORGERIES = {
    "another key's": others,
    "garbage": lambda keys, found, kept: [b"\xff\x00garbage" if value else None for value in found],
    "empty": lambda keys, found, kept: [b"" if value is not None else None for value in found],
    "half": lambda keys, found, kept: [value and value[: len(value) // 2] for value in found],
    "of another format": lambda keys, found, kept: [value and value[:1] + b"\x03" + value[2:] for value in found],
}


@pytest.mark.promise(of="cross_talk")
@pytest.mark.parametrize("how", FORGERIES)
async def test_what_is_not_the_keys_own_sound_entry_is_a_miss(how):
    transport = ScriptedTransport()
    async with batcher_for(transport, Forged(FORGERIES[how])) as batcher:
        for text in "abab":
            await asyncio.sleep(2 * FRESH)
            reply = await batcher.submit(ask(text))
            assert (reply.output, reply.route) == (text.upper(), "single")
        assert batcher.stats().cache_hits == 0
    assert len(transport.calls) == 4


DAMAGES = {
    "a body that is no JSON": {"body": b'{"choices": ['},
    "a body that is no object": {"body": b"[1]"},
    "a body that is no text": {"body": b"\xff"},
    "no name of a kind": {"lane_kind": b""},
    "a long name of a kind": {"lane_kind": b"k" * 1_000},
}


@each("damage", DAMAGES)
async def test_an_entry_of_which_one_field_is_damaged_is_a_miss_and_no_error(damage):
    def forge(keys, found, _kept):
        return [
            value and entries.encode(msgspec.structs.replace(entries.decode(value), **DAMAGES[damage]))
            for value in found
        ]

    transport = ScriptedTransport(answer=lambda text: text.upper())
    cache = Forged(forge)
    async with batcher_for(transport, cache) as batcher:
        for _ in range(2):
            assert (await batcher.submit(ask("a"), params={"logprobs": True})).route == "single"
            await asyncio.sleep(2 * FRESH)
        found = [result.reply.route async for result in batcher.map([mb.Request(ask("a"), params={"logprobs": True})])]
        assert found == ["single"]
        assert batcher.stats().cache_misses == 3


async def test_an_entry_that_no_longer_fits_the_type_is_a_miss():
    limit = 10

    class Fact(msgspec.Struct):
        number: int

        def __post_init__(self):
            if self.number > limit:
                raise ValueError("too large")

    transport = ScriptedTransport("7", '{"number": 7}', '{"number": 3}', answer=lambda _: 0)
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        assert (await batcher.submit(ask("a"), output_type=Fact)).output == Fact(7)
        limit = 5
        reply = await batcher.submit(ask("a"), output_type=Fact)
    assert (reply.output, reply.route) == (Fact(3), "single")


# --- time


async def test_answers_expire_together_with_their_time_and_not_all_at_once(monkeypatch):
    cache = Watched(ttl=100.0)
    async with batcher_for(ScriptedTransport(), cache) as batcher:
        await submit_all(batcher, map(str, range(200)))
        await batcher.submit(ask("mine"), ttl=10.0)
    times = [ttl for kept in cache.sets for *_, ttl in kept]
    assert 90 <= min(times[:-1]) < 92
    assert 98 < max(times[:-1]) <= 100
    assert 9 <= times[-1] <= 10
    for kept in cache.sets:
        for key, value, ttl in kept:
            entry = entries.read(value, key, 0.0)
            assert entry.expires_at == pytest.approx(entry.stored_at + ttl)
            assert entries.read(value, key, entry.expires_at) is None


async def test_no_ttl_keeps_for_ever():
    cache = Watched(ttl=None)
    async with batcher_for(ScriptedTransport(), cache) as batcher:
        await batcher.submit(ask("a"))
    ((key, value, ttl),) = cache.sets[0]
    assert ttl is None
    assert entries.read(value, key, 1e12).expires_at is None


async def test_who_looked_up_before_the_answer_was_stored_finds_it_all_the_same():
    cache = Watched(delay=0.04)
    transport = ScriptedTransport(delay=0.01)
    async with batcher_for(transport, cache) as batcher:
        # 0.04 looked up, 0.05 answered, 0.09 stored; the others look up before, between and after.
        tasks = [asyncio.ensure_future(batcher.submit(ask("a")))]
        for _ in range(12):
            await asyncio.sleep(0.0078125)
            tasks.append(asyncio.ensure_future(batcher.submit(ask("a"))))
        replies = await asyncio.gather(*tasks)
    assert len(transport.calls) == 1
    assert {reply.route for reply in replies} == {"single", "shared", "cache"}


# --- a cache that fails


class Hanging(Watched):
    async def get_many(self, keys):
        self.gets.append(list(keys))
        await asyncio.get_running_loop().create_future()


class Raising(Watched):
    async def get_many(self, keys):
        raise OSError("no disk")

    async def set_many(self, kept):
        raise OSError("no disk")


@pytest.mark.promise(of="slow_cache")
async def test_a_cache_that_hangs_costs_one_caller_its_time_and_is_left_alone():
    loop = asyncio.get_running_loop()
    cache, transport = Hanging(), ScriptedTransport()
    async with batcher_for(transport, cache) as batcher:
        assert (await batcher.submit(ask("a"))).output == "A"
        assert loop.time() == pytest.approx(LIVE_TIMEOUT)
        await asyncio.sleep(2 * FRESH)
        begun = loop.time()
        assert (await batcher.submit(ask("a"))).output == "A"
        assert loop.time() == begun
        assert batcher.stats().cache_bypassed == 2
    assert len(cache.gets) == 1


class Laborious(Watched):
    """A cache that does one thing after the other, 0.1 ms for each key."""

    def __init__(self):
        super().__init__()
        self.turn = asyncio.Lock()

    async def get_many(self, keys):
        async with self.turn:
            self.delay = len(keys) / 10_000
            return await super().get_many(keys)

    async def set_many(self, kept):
        self.delay = 0.0
        await super().set_many(kept)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 0.1])
@pytest.mark.parametrize("make", [Laborious, lambda: mb.TieredCache(mb.MemoryCache(max_entries=1), Laborious())])
async def test_a_burst_is_looked_up_page_by_page_and_none_of_it_is_asked_again(make, spread):
    """All of it takes 0.5 s, and the time of one look-up is 50 ms."""
    cache, transport, count = make(), ScriptedTransport(), 5_000
    async with batcher_for(transport, cache, max_queued=count) as batcher:
        await batcher.warm([ask(str(number)) for number in range(count)])
        warmed = len(transport.calls)

        async def one(number):
            await asyncio.sleep(spread * number / count)
            return await batcher.submit(ask(str(number)))

        replies = await asyncio.gather(*map(one, range(count)))
        assert batcher.stats().cache_bypassed == 0
    assert {reply.route for reply in replies} == {"cache"}
    assert len(transport.calls) == warmed
    last = cache if isinstance(cache, Laborious) else cache.tiers[-1]
    assert max(len(keys) for keys in last.gets) <= PAGE


@pytest.mark.promise(of="slow_cache")
async def test_a_burst_on_a_cache_that_hangs_is_held_up_for_the_time_of_one_look_up():
    loop = asyncio.get_running_loop()
    cache, count = Hanging(), 5_000
    async with batcher_for(ScriptedTransport(), cache, max_queued=count) as batcher:
        begun = loop.time()
        await submit_all(batcher, map(str, range(count)))
        assert loop.time() - begun == pytest.approx(LIVE_TIMEOUT)
        assert batcher.stats().cache_bypassed == count


class Forgetful(mb.MemoryCache):
    """A cache that is shared, and whose secret may be lost or be another's."""

    secret_bytes = b"a" * 32

    async def secret(self):
        return self.secret_bytes


async def test_a_secret_that_others_have_agreed_on_meanwhile_is_adopted():
    cache, transport = Forgetful(), ScriptedTransport()
    async with batcher_for(transport, cache) as old:
        await old.submit(ask("a"))
        cache._entries = LRU(None)
        cache.secret_bytes = b"b" * 32  # it was emptied, and a newcomer came first
        await asyncio.sleep(1)
        await old.submit(ask("b"))  # stored, and with that found out
        await asyncio.sleep(1)
        await old.submit(ask("a"))
        async with batcher_for(transport, cache) as new:
            assert (await new.submit(ask("a"))).route == "cache"
    assert len(transport.calls) == 3


async def test_a_secret_that_cannot_be_had_again_is_used_on():
    cache, transport = Forgetful(), ScriptedTransport()
    async with batcher_for(transport, cache) as batcher:
        await batcher.submit(ask("a"))
        cache.secret_bytes = b"too short"
        await asyncio.sleep(1)
        await batcher.submit(ask("b"))
        await asyncio.sleep(5)
        assert (await batcher.submit(ask("a"))).route == "cache"


# --- stores


async def test_a_store_that_takes_long_holds_up_nobody_and_is_made():
    loop = asyncio.get_running_loop()
    cache, transport = Watched(), ScriptedTransport()
    async with batcher_for(transport, cache, max_concurrent_batches=1) as batcher:
        cache.delay = 0.0
        await batcher.submit(ask("known"))
        cache.delay = BULK_TIMEOUT - 0.1
        cache.get_many = super(Watched, cache).get_many
        begun = loop.time()
        assert [(await batcher.submit(ask(text))).output for text in "abc"] == list("ABC")
        assert loop.time() == begun
    assert loop.time() == pytest.approx(begun + BULK_TIMEOUT - 0.1)  # closing waits for it
    assert batcher.stats().cache_stores == 4


async def test_answers_of_bulk_work_come_no_faster_than_they_can_be_stored():
    turn = asyncio.Lock()

    class InTurn(Watched):
        async def set_many(self, kept):
            async with turn:
                await asyncio.sleep(BULK_TIMEOUT / 5)
            await super().set_many(kept)

    cache, transport = InTurn(), ScriptedTransport(delay=0.05)
    async with batcher_for(transport, cache, max_batch_size=4, max_concurrent_batches=2) as batcher:
        async for _ in batcher.map([ask(str(number)) for number in range(160)]):
            pass
    assert batcher.stats().cache_stores == 160


async def test_a_store_that_hangs_ends_with_its_time_even_when_the_batcher_closes():
    loop = asyncio.get_running_loop()
    cache = Watched()
    cache.get_many = super(Watched, cache).get_many
    cache.delay = 1e9
    async with batcher_for(ScriptedTransport(), cache) as batcher:
        await batcher.submit(ask("a"))
    assert loop.time() == pytest.approx(BULK_TIMEOUT)


# --- a clock that is set


@pytest.mark.parametrize("ttl", [None, 30.0, 1_000.0])
async def test_an_answer_stored_at_a_time_yet_to_come_is_asked_for_again(ttl):
    """The clock was an hour ahead; else the answer would be given for that hour and its own time."""
    cache, transport = mb.MemoryCache(ttl=None), ScriptedTransport()
    async with batcher_for(transport, cache) as batcher:
        answers = batcher._cache
        right = answers._now
        answers._now = lambda: right() + 3_600
        await batcher.submit(ask("a"), ttl=ttl)
        await asyncio.sleep(1)
        assert (await batcher.submit(ask("a"), ttl=ttl)).route == "cache"
        answers._now = right
        await asyncio.sleep(1)
        assert (await batcher.submit(ask("a"), ttl=ttl)).route == "single"
        await asyncio.sleep(1)
        assert (await batcher.submit(ask("a"), ttl=ttl)).route == "cache"


async def test_clocks_that_differ_a_little_do_no_harm():
    cache, transport = mb.MemoryCache(), ScriptedTransport()
    async with batcher_for(transport, cache) as batcher:
        answers = batcher._cache
        right = answers._now
        answers._now = lambda: right() + MAX_CLOCK_SKEW - 1
        await batcher.submit(ask("a"))
        answers._now = right
        await asyncio.sleep(1)
        assert (await batcher.submit(ask("a"))).route == "cache"


@pytest.mark.promise(of="slow_cache")
async def test_a_cache_that_raises_fails_nobody(caplog):
    with caplog.at_level(logging.WARNING, logger="microbatch"):
        async with batcher_for(ScriptedTransport(), Raising()) as batcher:
            assert [reply.output for reply in await submit_all(batcher, "abab")] == list("ABAB")
            assert [result.unwrap().output async for result in batcher.map([ask("x")])] == ["X"]
    assert len(caplog.records) == 1


@pytest.mark.promise(of="timeout")
async def test_a_deadline_holds_while_a_look_up_hangs():
    loop = asyncio.get_running_loop()
    async with batcher_for(ScriptedTransport(), Hanging()) as batcher:
        with pytest.raises(mb.DeadlineExceeded):
            await batcher.submit(ask("a"), timeout=0.01)
        assert loop.time() == pytest.approx(0.01)


async def test_closing_while_a_look_up_hangs_sends_its_caller_away():
    batcher = batcher_for(ScriptedTransport(), Hanging())
    await batcher.open()
    task = asyncio.ensure_future(batcher.submit(ask("a")))
    await asyncio.sleep(0.01)
    await batcher.aclose()
    with pytest.raises(mb.BatcherClosed):
        await task


async def test_who_leaves_while_they_are_looked_up_takes_nothing_along():
    cache = Watched(delay=0.02)
    async with batcher_for(ScriptedTransport(), cache) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask("a"))) for _ in range(3)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [getattr(end, "output", None) for end in ended] == [None, "A", "A"]
        assert batcher.stats().queued == 0


# --- map and warm


async def test_map_looks_up_what_it_takes_in_together_and_asks_only_for_the_rest():
    cache, transport = Watched(), ScriptedTransport()
    async with batcher_for(transport, cache) as batcher:
        await submit_all(batcher, [f"q{number}" for number in range(0, 40, 2)])
        gets = len(cache.gets)
        requests = [mb.Request(ask(f"q{number}"), id=str(number)) for number in range(40)]
        results = [result async for result in batcher.map(requests, ordered=True)]
        assert batcher.stats().queued == 0
    assert [result.unwrap().output for result in results] == [f"Q{number}" for number in range(40)]
    assert [result.reply.route == "cache" for result in results] == [True, False] * 20
    assert len(cache.gets) - gets == 1
    asked = [text for call in transport.calls for _, text in call.items]
    assert len(asked) == len(set(asked)) == 40


@pytest.mark.parametrize("max_queued", [3, 10_000])
@pytest.mark.parametrize("delay", [0.0, 0.01, 0.2])
async def test_a_map_over_a_slow_cache_beside_other_callers_keeps_to_its_bounds_and_ends(max_queued, delay):
    random.seed(1)
    cache = Watched(delay=delay)
    async with batcher_for(ScriptedTransport(delay=0.3), cache, max_queued=max_queued) as batcher:
        most = 0

        def requests():
            nonlocal most
            for number in range(30):
                most = max(most, batcher.stats().queued)
                yield mb.Request(ask(f"q{number % 7}"))

        others = asyncio.ensure_future(submit_all(batcher, [f"o{number}" for number in range(9)]))
        outputs = [result.unwrap().output async for result in batcher.map(requests(), ordered=True)]
        await others
        assert batcher.stats().queued == 0
    assert outputs == [f"Q{number % 7}" for number in range(30)]
    assert most <= max_queued


async def test_a_map_does_not_send_a_part_while_the_rest_is_looked_up():
    async def source():
        yield ask("a")
        await asyncio.sleep(0.03)
        yield ask("b")

    transport = ScriptedTransport()
    async with batcher_for(transport, Watched(delay=0.04)) as batcher:
        assert [result.unwrap().output async for result in batcher.map(source(), ordered=True)] == ["A", "B"]
    assert [len(call.items) for call in transport.calls] == [2]


@pytest.mark.parametrize("tiered", [False, True])
async def test_bulk_work_waits_for_a_slow_cache_where_a_caller_does_without(tiered):
    slow, transport = Watched(delay=0.5), ScriptedTransport()
    cache = mb.TieredCache(mb.MemoryCache(max_bytes=1), slow) if tiered else slow
    async with batcher_for(transport, cache) as batcher:
        requests = [mb.Request(ask(f"q{number}")) for number in range(8)]
        await batcher.warm(requests)
        await asyncio.sleep(1.0)  # stored by now, and no longer at hand
        assert {result.unwrap().route async for result in batcher.map(requests)} == {"cache"}
        assert batcher.stats().cache_stores == 8
        assert (await batcher.submit(ask("q0"))).route == "single"
    assert len(transport.calls) == 2


async def test_leaving_a_map_while_it_looks_up_gives_every_place_back():
    cache = Watched(delay=0.04)
    async with batcher_for(ScriptedTransport(), cache) as batcher:
        results = batcher.map([mb.Request(ask(f"q{number}")) for number in range(20)])
        task = asyncio.ensure_future(anext(results))
        await asyncio.sleep(0.02)
        assert batcher.stats().queued == 20
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.1)
        assert batcher.stats().queued == 0


async def test_a_map_whose_batcher_closes_while_it_looks_up_ends():
    cache = Watched(delay=0.04)
    batcher = batcher_for(ScriptedTransport(), cache)
    await batcher.open()
    results = batcher.map([mb.Request(ask("q"))])
    task = asyncio.ensure_future(anext(results))
    await asyncio.sleep(0.02)
    await batcher.aclose()
    assert isinstance((await task).error, mb.ShutDown)
    assert [result async for result in results] == []


async def test_warming_asks_in_full_batches_and_only_for_what_is_not_there():
    transport, cache, seen = ScriptedTransport(), Watched(), []
    async with batcher_for(transport, cache) as batcher:
        await batcher.submit(ask("q0"))
        warmed = await batcher.warm((ask(f"q{number}") for number in range(33)), ttl=10.0, progress=seen.append)
        assert warmed == mb.Warmed(items=33, known=1, asked=32, failed=0)
        assert [call.combined for call in transport.calls] == [False, True, True]
        replies = await submit_all(batcher, [f"q{number}" for number in range(33)])
        assert {reply.route for reply in replies} == {"cache"}
        assert [each.items for each in seen] == list(range(1, 34))
        assert all(ttl <= 10.0 for kept in cache.sets[1:] for *_, ttl in kept)
        # Bulk replies are streamed until one has ended by itself.
        await batcher.warm(ask(f"r{number}") for number in range(16))
    assert not transport.calls[-1].call.stream


async def test_warming_from_an_async_source_tells_what_failed():
    async def source():
        yield mb.Request(ask("a"), ttl=3.0)
        yield []

    cache = Watched()
    async with batcher_for(ScriptedTransport(), cache) as batcher:
        assert await batcher.warm(source(), ttl=10.0) == mb.Warmed(items=2, asked=1, failed=1)
    ((_, _, ttl),) = cache.sets[0]
    assert ttl <= 3.0


async def test_warming_without_a_cache_is_a_clear_error():
    async with mb.Microbatcher(ScriptedTransport(), tokens="bytes") as batcher:
        with pytest.raises(mb.ConfigError, match="cache="):
            await batcher.warm([])


# --- figures, settings


@pytest.mark.promise(of="usage")
async def test_hits_and_followers_are_compared_with_a_call_each():
    prices = {"m": mb.Price(input=2.0, output=8.0)}
    transport = ScriptedTransport()
    async with batcher_for(transport, mb.MemoryCache(), prices=prices) as batcher:
        await submit_all(batcher, ["same", "same", "other"], model="m")
        once = batcher.stats()
        await submit_all(batcher, ["same", "other"], model="m")
        twice = batcher.stats()
    assert (once.unbatched_calls, twice.unbatched_calls) == (3, 5)
    assert once.prompt_tokens == twice.prompt_tokens
    # Two of the three were "same", so two thirds of what was compared first, give or take a rounding.
    assert twice.unbatched_prompt_tokens - once.unbatched_prompt_tokens == pytest.approx(
        once.unbatched_prompt_tokens * 2 / 3, rel=0.1
    )
    assert twice.cost_usd == once.cost_usd
    assert twice.unbatched_cost_usd > once.unbatched_cost_usd


async def test_normalize_is_for_finding_only():
    transport = ScriptedTransport()
    async with batcher_for(transport, mb.MemoryCache(), normalize=str.strip) as batcher:
        await batcher.submit(ask(" a "))
        assert (await batcher.submit(ask("a"))).route == "cache"
    assert transport.calls[0].items == [("", " a ")]


async def test_a_cache_is_shared_by_batchers_and_closed_by_the_last():
    closed = 0

    class Counted(mb.MemoryCache):
        async def aclose(self):
            nonlocal closed
            closed += 1

    cache = Counted()
    async with batcher_for(ScriptedTransport(), cache) as one:
        async with batcher_for(ScriptedTransport(), cache) as two:
            await one.submit(ask("a"))
            assert (await two.submit(ask("a"))).route == "cache"
        assert closed == 0
    assert closed == 1


@pytest.mark.parametrize("cache", [{}, "redis://", object()])
def test_what_is_no_cache_is_refused(cache):
    with pytest.raises(mb.ConfigError, match="cache must have"):
        mb.Microbatcher(ScriptedTransport(), cache=cache)


async def test_a_cache_that_cannot_be_opened_is_told_at_once_and_nothing_is_left_open():
    class Broken(mb.MemoryCache):
        async def open(self):
            raise mb.ConfigError("cannot open it")

    transport = ScriptedTransport()
    with pytest.raises(mb.ConfigError, match="cannot open it"):
        async with batcher_for(transport, Broken()):
            pass
    assert transport.closed == 1


async def test_digests_are_made_only_where_there_is_a_cache(monkeypatch):
    def never(*_):
        raise AssertionError("a digest was made")

    monkeypatch.setattr("microbatch.caching.key.Keys.of", never)
    async with mb.Microbatcher(ScriptedTransport(), tokens="bytes", policy=mb.FlushPolicy(share=True)) as batcher:
        assert (await batcher.submit(ask("a"))).output == "A"
