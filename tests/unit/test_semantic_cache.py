"""`SemanticCache`: shadow, hits, walls between requests, and what governs the entries."""

import asyncio
import contextlib
import logging

import msgspec
import pytest
from helpers import each, now, opened
from similar_world import (
    SYSTEM,
    THINGS,
    Embedder,
    Naming,
    ask_about,
    one_point,
    prove,
    question,
    semantic,
    settled,
    similar_batcher,
    thing_of,
)

import microbatch as mb


async def routes(batcher, thing, numbers, **options):
    return [(await batcher.submit(ask_about(thing, number), **options)).route for number in numbers]


# --- shadow and hits


async def test_answers_are_handed_out_once_the_kind_is_proven_and_not_before():
    transport, embed = Naming(), Embedder()
    async with similar_batcher(transport, semantic(embed)) as batcher:
        numbers = await prove(batcher)
        stats = batcher.stats()
        (kind,) = stats.similar
        assert kind.state == "proven"
        assert stats.similar_hits == 0
        assert stats.shadow_pairs == kind.pairs >= 100
        asked = len(transport.calls)
        for thing in THINGS:
            reply = await batcher.submit(ask_about(thing, next(numbers[thing])))
            assert (reply.route, reply.text) == ("similar", thing.upper())
            assert kind.threshold <= reply.score <= 1.0
        await settled(batcher)
        stats = batcher.stats()
        assert stats.similar_hits == len(THINGS)
        assert len(transport.calls) - asked == stats.similar_checks
        assert stats.answered == stats.items


async def test_a_question_is_never_answered_with_the_answer_to_one_about_something_else():
    async with similar_batcher() as batcher:
        await prove(batcher)
        reply = await batcher.submit(ask_about("marsh", 0))
        assert (reply.route, reply.text) == ("single", "MARSH")
        assert await routes(batcher, "marsh", [1]) == ["similar"]
        assert batcher.stats().similar_hits == 1


async def test_questions_that_differ_in_a_fact_are_asked():
    async with similar_batcher() as batcher:
        await prove(batcher)
        asked = [f"{question('amber', 900)} {fact}" for fact in ("", "not", "with 3 kg", "and John", "in order AB-12")]
        found = [await batcher.submit([SYSTEM, {"role": "user", "content": text}]) for text in asked]
        assert [reply.route for reply in found] == ["similar", *["single"] * 4]
        assert sum(batcher.stats().guard_refusals.values()) == 4


async def test_an_equal_question_is_an_exact_hit_and_not_looked_up():
    embed = Embedder()
    async with similar_batcher(cache=semantic(embed)) as batcher:
        assert await routes(batcher, "amber", [1, 1]) == ["single", "cache"]
        await settled(batcher)
        assert embed.lists == [[question("amber", 1)]]


async def test_all_texts_of_a_step_are_embedded_together_and_equal_ones_once():
    embed = Embedder()
    async with similar_batcher(cache=semantic(embed)) as batcher:
        numbers = [*range(40), *range(40)]
        replies = await asyncio.gather(*(batcher.submit(ask_about("amber", number)) for number in numbers))
        assert {reply.text for reply in replies} == {"AMBER"}
        assert [len(texts) for texts in embed.lists] == [40]


async def test_full_batches_are_held_while_their_answers_may_be_found():
    transport = Naming()
    async with similar_batcher(transport, semantic(Embedder(delay=0.03)), max_batch_size=4) as batcher:
        await prove(batcher)
        before, begun = len(transport.calls), now()
        replies = await asyncio.gather(*(batcher.submit(ask_about("cedar", number)) for number in range(900, 920)))
        assert {reply.route for reply in replies} == {"similar"}
        assert now() - begun == pytest.approx(0.03)
        await settled(batcher)
        assert len(transport.calls) - before == batcher.stats().similar_checks


async def test_requests_of_a_kind_in_shadow_are_not_held():
    plain, watched = Naming(), Naming()
    async with similar_batcher(watched, semantic(Embedder(delay=0.4))) as batcher:
        begun = now()
        await batcher.submit(ask_about("amber", 0))
        await batcher.submit(ask_about("amber", 1))
        assert now() - begun == pytest.approx(0.4)  # two calls
    async with similar_batcher(plain, mb.MemoryCache()) as batcher:
        begun = now()
        await batcher.submit(ask_about("amber", 0))
        await batcher.submit(ask_about("amber", 1))
        assert now() - begun == pytest.approx(0.4)


async def test_high_priority_is_not_held():
    embed = Embedder()
    async with similar_batcher(cache=semantic(embed)) as batcher:
        await prove(batcher)
        embed.delay = 0.3
        begun = now()
        reply = await batcher.submit(ask_about("amber", 900), priority="high")
        assert (reply.route, now() - begun) == ("single", pytest.approx(0.2))


@each("options", [{"params": {"seed": 1}}, {"params": {"stop": ["x"]}}, {"output_type": str}])
async def test_requests_that_go_alone_by_their_form_take_part(options):
    async with similar_batcher() as batcher:
        await prove(batcher, **options)
        assert await routes(batcher, "amber", [900], **options) == ["similar"]


async def test_all_callers_of_a_question_are_answered_each_in_its_own_type():
    class One(msgspec.Struct):
        name: str

    class Other(msgspec.Struct):
        name: str

    transport = Naming()
    transport._answer = lambda text: {"name": thing_of(text)}
    async with similar_batcher(transport) as batcher:
        await prove(batcher, output_type=One)
        asking = [batcher.submit(ask_about("amber", 900), output_type=kind) for kind in (One, Other, One)]
        replies = await asyncio.gather(*asking)
        assert [reply.route for reply in replies] == ["similar"] * 3
        assert [reply.output for reply in replies] == [One("amber"), Other("amber"), One("amber")]
        assert replies[0].output is not replies[2].output
        assert batcher.stats().similar_hits == 3
        assert batcher.stats().shared == 0


# --- walls


@each(
    "one, other",
    [
        ({}, {"tenant": "b"}),
        ({"tenant": "a"}, {"tenant": "b"}),
        ({}, {"headers": {"x-team": "b"}}),
        ({}, {"model": "other"}),
        ({}, {"max_tokens": 50}),
        ({}, {"temperature": 0.5}),
        ({}, {"params": {"top_p": 0.5}}),
        ({}, {"output_type": str | None}),
    ],
)
async def test_no_answer_crosses_a_difference_in_anything_but_the_last_text(one, other):
    async with similar_batcher() as batcher:
        await prove(batcher, **one)
        assert await routes(batcher, "amber", [900], **one) == ["similar"]
        assert "similar" not in await routes(batcher, "amber", [901], **other)


async def test_no_answer_crosses_a_difference_in_the_messages_before_the_last():
    async with similar_batcher() as batcher:
        await prove(batcher)
        other = {"role": "system", "content": "Name the thing!"}
        assert (await batcher.submit(ask_about("amber", 900, other))).route == "single"


async def test_evidence_is_pooled_over_tenants_and_entries_are_not():
    async with similar_batcher() as batcher:
        await prove(batcher, tenant="a")
        assert await routes(batcher, "amber", [900, 901], tenant="b") == ["single", "similar"]


async def test_with_isolate_each_tenant_has_its_own_evidence():
    async with similar_batcher(cache=semantic(isolate=True)) as batcher:
        await prove(batcher, tenant="a")
        assert await routes(batcher, "amber", [900, 901], tenant="b") == ["single", "single"]
        assert await routes(batcher, "amber", [901], tenant="a") == ["similar"]
        await settled(batcher)
        assert sorted(kind.state for kind in batcher.stats().similar) == ["proven", "shadow"]


# --- what governs the entries


async def test_use_cache_false_takes_no_part_and_refresh_stores_without_looking():
    embed, transport = Embedder(), Naming()
    async with similar_batcher(transport, semantic(embed)) as batcher:
        await prove(batcher)
        before = len(embed.lists)
        assert await routes(batcher, "amber", [900], use_cache=False) == ["single"]
        assert len(embed.lists) == before
        assert await routes(batcher, "marsh", [900], use_cache="refresh") == ["single"]
        assert await routes(batcher, "marsh", [901], use_cache="refresh") == ["single"]
        assert await routes(batcher, "marsh", [902]) == ["similar"]


@each("way", ["delete", "clear", "clear tenant", "exact delete", "expire"])
async def test_an_entry_that_is_gone_is_not_handed_out(way):
    exact = mb.MemoryCache(ttl=1e9)
    cache = semantic(exact=exact)
    async with similar_batcher(cache=cache) as batcher:
        await prove(batcher, tenant="a")
        assert await routes(batcher, "marsh", [900], tenant="a", ttl=100.0 if way == "expire" else None) == ["single"]
        assert await routes(batcher, "marsh", [901], tenant="a") == ["similar"]
        before = len(cache.index)
        await asyncio.sleep(1)
        (key,) = [key for page in [page async for page in exact.entries()] for key, value in page if b"MARSH" in value]
        match way:
            case "delete":
                assert await cache.delete([key]) == 1
                assert len(cache.index) == before - 1
            case "clear":
                await cache.clear()
                assert len(cache.index) == 0
            case "clear tenant":
                assert await cache.clear("b") == 0
                assert len(cache.index) == before
                await cache.clear("a")
                assert len(cache.index) == 0
            case "exact delete":
                assert await exact.delete([key]) == 1
            case "expire":
                await asyncio.sleep(200)
        assert await routes(batcher, "marsh", [902], tenant="a") == ["single"]
        await settled(batcher)
        if way in ("exact delete", "expire"):
            assert len(cache.index) == before  # that of the new answer, in place of the one that was gone


class Unreadable(mb.MemoryCache):
    """Fails while it is told to."""

    fails = False

    async def get_many(self, keys):
        if self.fails:
            raise OSError("no route to the cache")
        return await super().get_many(keys)


@each("proven, tiers", [(True, False), (False, False), (True, True)])
async def test_while_the_exact_cache_fails_no_vector_is_lost(proven, tiers):
    """That its entry was not found says nothing then."""
    exact = Unreadable()
    cache = semantic(exact=mb.TieredCache(exact) if tiers else exact)
    async with similar_batcher(cache=cache) as batcher:
        await prove(batcher, most=2_000 if proven else 60)
        kept, removed = len(cache.index), []
        remove = cache.index.remove
        cache.index.remove = lambda keys: (removed.extend(keys), remove(keys))
        await asyncio.sleep(1)  # what was stored lately is at hand without the cache
        exact.fails = True
        for number in range(900, 910):
            assert await routes(batcher, THINGS[number - 900], [number]) == ["single"]
            await settled(batcher)
        assert removed == []
        assert batcher.stats().cache_bypassed >= 10
        exact.fails = False
        await asyncio.sleep(60)
        assert len(cache.index) >= kept
        if proven:
            await routes(batcher, "marsh", [900])
            assert await routes(batcher, "amber", [920]) == ["similar"]


async def test_an_entry_deleted_while_it_is_looked_up_is_a_miss():
    embed = Embedder(delay=0.02)
    cache = semantic(embed)
    async with similar_batcher(cache=cache) as batcher:
        await prove(batcher)
        asking = asyncio.ensure_future(batcher.submit(ask_about("amber", 900)))
        await asyncio.sleep(0.01)
        await cache.clear()
        assert (await asking).route == "single"


async def test_evidence_outlives_a_batcher():
    cache = semantic()
    async with similar_batcher(cache=cache) as batcher:
        await prove(batcher)
    async with similar_batcher(cache=cache) as batcher:
        assert await routes(batcher, "amber", [900]) == ["similar"]


# --- embedders that fail


def _raise(error):
    def fault(_vectors):
        raise error

    return fault


FAULTS = [
    _raise(RuntimeError("down")),
    _raise(asyncio.CancelledError()),
    _raise(TimeoutError()),
    lambda vectors: vectors[:-1],
    lambda vectors: [*vectors, vectors[0]],
    lambda vectors: [],
    lambda vectors: None,
    lambda vectors: "no vectors",
    lambda vectors: [None] * len(vectors),
    lambda vectors: [[float("nan")] * 32 for _ in vectors],
    lambda vectors: [[float("inf")] * 32 for _ in vectors],
    lambda vectors: [[0.0] * 32 for _ in vectors],
    lambda vectors: [[1e200] * 32 for _ in vectors],
    lambda vectors: [[1.0] * 31 for _ in vectors],
    lambda vectors: [[[1.0] * 32] for _ in vectors],
    lambda vectors: [["x"] * 32 for _ in vectors],
    lambda vectors: [[] for _ in vectors],
]


async def test_what_an_embedder_gets_wrong_is_a_miss_and_delays_nothing(caplog):
    embed = Embedder()
    async with similar_batcher(cache=semantic(embed)) as batcher:
        await prove(batcher)
        for number, fault in enumerate(FAULTS):
            embed.fault = fault
            begun = now()
            reply = await batcher.submit(ask_about("amber", 900 + number))
            assert (reply.route, reply.text, now() - begun) == ("single", "AMBER", pytest.approx(0.2)), number
        assert batcher.stats().look_ups_failed == len(FAULTS)
        embed.fault = None
        assert await routes(batcher, "amber", [990]) == ["similar"]
    assert len([record for record in caplog.records if "vectors" in record.message]) == 1


async def test_a_vector_of_another_length_than_those_stored_since_takes_nothing_from_the_questions_beside_it():
    embed = Embedder()
    async with similar_batcher(cache=semantic(embed)) as batcher:
        asking = [asyncio.ensure_future(batcher.submit(ask_about("amber", 0)))]
        await asyncio.sleep(0.1)
        for number, fault in ((1, lambda vectors: [vector[:5] for vector in vectors]), (2, None)):
            embed.fault = fault
            asking.append(asyncio.ensure_future(batcher.submit(ask_about("amber", number))))
            await asyncio.sleep(0.001)
        assert [reply.batch_size for reply in await asyncio.gather(*asking)] == [1, 2, 2]
        await settled(batcher)
        assert batcher.stats().shadow_pairs == 1
        assert len(batcher.look_ups._cache.index) == 2


async def test_vectors_of_one_list_that_differ_in_length_are_not_used():
    embed = Embedder(fault=lambda vectors: [vectors[0][:5], *vectors[1:]])
    async with similar_batcher(cache=semantic(embed)) as batcher:
        await asyncio.gather(*(batcher.submit(ask_about("amber", number)) for number in range(3)))
        assert batcher.stats().look_ups_failed == 3
        embed.fault = None
        for number in range(3, 6):  # no wrong length is known by now
            await routes(batcher, "amber", [number])
            await settled(batcher)
        assert batcher.stats().shadow_pairs == 2
        assert batcher.stats().look_ups_failed == 3


async def test_a_late_vector_is_a_miss_and_holds_nothing_after_the_first():
    embed = Embedder()
    async with similar_batcher(cache=semantic(embed, lookup_timeout=0.1)) as batcher:
        await prove(batcher)
        embed.delay = 60.0
        took = []
        for number in range(900, 903):
            begun = now()
            assert await routes(batcher, "amber", [number]) == ["single"]
            took.append(now() - begun)
        assert took == [pytest.approx(0.21), pytest.approx(0.2), pytest.approx(0.2)]
        await asyncio.sleep(1)
        assert batcher.stats().look_ups_late == 3
        embed.delay = 0.0
        await routes(batcher, "amber", [903])
        assert await routes(batcher, "amber", [904]) == ["similar"]


async def test_a_look_up_that_is_slower_than_the_answer_adds_to_the_evidence_all_the_same():
    async with similar_batcher(cache=semantic(Embedder(delay=0.4))) as batcher:
        assert await routes(batcher, "amber", [0]) == ["single"]
        await asyncio.sleep(1)
        assert await routes(batcher, "amber", [1]) == ["single"]
        await asyncio.sleep(1)
        assert batcher.stats().shadow_pairs == 1


async def test_a_hit_that_comes_when_the_request_is_sent_is_not_used(caplog):
    embed = Embedder()
    async with similar_batcher(cache=semantic(embed)) as batcher:
        await prove(batcher)
        embed.delay = 0.15  # the answer takes 0.2 s, and a request is held for 0.01 s
        begun = now()
        reply = await batcher.submit(ask_about("amber", 900))
        assert (reply.route, now() - begun) == ("single", pytest.approx(0.21))
        assert batcher.stats().similar_hits == 0
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


# --- what cannot be handed out


async def test_an_embedder_that_maps_everything_to_one_point_closes_the_kind(caplog):
    transport, embed = Naming(), Embedder(fault=one_point)
    async with similar_batcher(transport, semantic(embed)) as batcher:
        await prove(batcher)
        (kind,) = batcher.stats().similar
        assert (kind.state, kind.pairs <= 40) == ("closed", True)
        assert kind.why is not None
        before = len(embed.lists)
        assert "similar" not in await routes(batcher, "amber", range(900, 930))
        assert len(embed.lists) == before  # nothing is embedded for nothing
        assert batcher.stats().similar_hits == 0
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


async def test_long_texts_are_not_measurable_without_same():
    transport = Naming()
    transport._answer = lambda text: thing_of(text).upper() + " in many words" * 10
    async with similar_batcher(transport) as batcher:
        await routes(batcher, "amber", range(3))
        await settled(batcher)
        (kind,) = batcher.stats().similar
        assert (kind.state, kind.pairs) == ("not measurable", 0)
        await prove(batcher, most=300)
        assert batcher.stats().similar_hits == 0
        assert batcher.stats().similar[0].state == "not measurable"


async def test_long_texts_are_compared_by_same():
    transport = Naming()
    transport._answer = lambda text: thing_of(text).upper() + " in many words" * 10
    cache = semantic(same=lambda one, other: one.split()[0] == other.split()[0])
    async with similar_batcher(transport, cache) as batcher:
        await prove(batcher)
        assert await routes(batcher, "amber", [900]) == ["similar"]


async def test_an_answer_that_cannot_be_compared_is_not_handed_out_even_if_the_kind_is_proven():
    transport = Naming()
    async with similar_batcher(transport) as batcher:
        await prove(batcher)
        transport._answer = lambda text: "MARSH " * 20
        assert await routes(batcher, "marsh", [900, 901]) == ["single", "single"]
        assert batcher.stats().similar[0].not_comparable == 1


class Filtering(Naming):
    """Refuses texts in which `forbidden` is found."""

    forbidden = "nothing of the kind"

    async def send(self, call, on_text):
        if self.forbidden in call.messages[-1]["content"]:
            raise mb.Filtered("this is not answered", status=400)
        return await super().send(call, on_text)


async def test_questions_that_the_endpoint_does_not_answer_are_evidence_against_their_neighbours():
    transport = Filtering()
    async with similar_batcher(transport) as batcher:
        transport.forbidden = "hint"
        for number in range(300):
            with contextlib.suppress(mb.Filtered):
                await batcher.submit(ask_about("amber", number))
            await settled(batcher)
        (kind,) = batcher.stats().similar
        assert kind.state == "closed"
        assert batcher.stats().similar_hits == 0


async def test_a_hit_whose_question_is_not_answered_when_it_is_asked_again_was_wrong():
    transport = Filtering()
    async with similar_batcher(transport) as batcher:
        await prove(batcher)
        transport.forbidden = "amber"
        for number in range(400):
            with contextlib.suppress(mb.Filtered):
                await batcher.submit(ask_about("amber", 500 + number))
            await settled(batcher)
            if batcher.stats().false_hits:
                break
        assert batcher.stats().false_hits == 1
        assert batcher.stats().similar[0].state != "proven"


async def test_same_that_fails_is_no_evidence_for_anything():
    def same(one, other):
        raise RuntimeError

    async with similar_batcher(cache=semantic(same=same)) as batcher:
        await prove(batcher, most=300)
        assert batcher.stats().similar[0].state == "closed"


# --- checks


async def test_a_wrong_answer_that_is_asked_again_removes_its_entry_and_ends_the_hits():
    transport, cache = Naming(), semantic()
    async with similar_batcher(transport, cache) as batcher:
        await prove(batcher)
        transport._answer, before = lambda text: "SOMETHING ELSE", len(cache.index)
        for number in range(400):
            await batcher.submit(ask_about("amber", 500 + number))
            await settled(batcher)
            await asyncio.sleep(1)
            if batcher.stats().false_hits:
                break
        stats = batcher.stats()
        assert stats.false_hits == 1
        # The entry is gone, and the questions that were answered with it have none.
        assert len(cache.index) == before - 1
        assert stats.similar[0].state != "proven"
        assert await routes(batcher, "amber", [990]) == ["single"]
        low, high = stats.false_hit_interval
        assert 0 <= low < high <= 1


async def test_five_per_cent_of_the_hits_are_asked_again_and_nothing_is_lost_of_the_usage():
    transport = Naming()
    async with similar_batcher(transport) as batcher:
        await prove(batcher)
        await asyncio.gather(*(batcher.submit(ask_about("amber", number)) for number in range(100, 999)))
        await asyncio.sleep(10)
        stats = batcher.stats()
        assert stats.similar_hits == 899
        assert 20 <= stats.similar_checks <= 80
        assert stats.prompt_tokens == sum(
            sum(len(str(message["content"])) for message in call.call.messages) // 4 for call in transport.calls
        )
        assert stats.check_usage.prompt_tokens > 0
        assert stats.unclaimed.prompt_tokens == stats.check_usage.prompt_tokens
        assert stats.singles_by_reason["check"] >= stats.similar_checks


# --- leaving and closing


async def test_a_caller_that_leaves_during_its_look_up_leaves_nothing_behind():
    embed = Embedder()
    async with similar_batcher(cache=semantic(embed)) as batcher:
        await prove(batcher)
        embed.delay = 0.005
        asking = [asyncio.ensure_future(batcher.submit(ask_about("amber", 900 + n % 3))) for n in range(9)]
        await asyncio.sleep(0.002)
        for each_ in asking[:3]:
            each_.cancel()
        replies = await asyncio.gather(*asking, return_exceptions=True)
        assert [isinstance(reply, asyncio.CancelledError) for reply in replies] == [True] * 3 + [False] * 6
        assert {reply.route for reply in replies[3:]} == {"similar"}
        await asyncio.sleep(1)
        assert batcher.stats().queued == 0


async def test_a_queue_of_requests_that_go_alone_is_gone_when_those_that_were_held_have_left():
    embed, alone = Embedder(), {"params": {"seed": 1}}
    async with similar_batcher(cache=semantic(embed)) as batcher:
        await prove(batcher, **alone)
        embed.delay = 0.005
        asking = asyncio.ensure_future(batcher.submit(ask_about("amber", 900), **alone))
        await asyncio.sleep(0.002)
        assert len(batcher._engine.singles) == 1
        asking.cancel()
        await asyncio.wait([asking])
        assert len(batcher._engine.singles) == 0


@pytest.mark.parametrize("grace", [0, 30])
async def test_closing_during_a_look_up_ends_every_request(grace):
    embed = Embedder()
    batcher = similar_batcher(cache=semantic(embed))
    async with batcher:
        await prove(batcher)
        embed.delay = 0.005
        asking = [asyncio.ensure_future(batcher.submit(ask_about("amber", 900 + n))) for n in range(9)]
        await asyncio.sleep(0.002)
        await batcher.aclose(grace)
        replies = await asyncio.gather(*asking, return_exceptions=True)
        ended = {reply.route if isinstance(reply, mb.Reply) else type(reply) for reply in replies}
        assert ended == ({mb.ShutDown} if grace == 0 else {"similar"})
    assert batcher.stats().queued == 0


async def test_a_deadline_passes_during_a_look_up():
    embed = Embedder()
    async with similar_batcher(cache=semantic(embed)) as batcher:
        await prove(batcher)
        embed.delay = 0.008
        with pytest.raises(mb.DeadlineExceeded):
            await batcher.submit(ask_about("amber", 900), timeout=0.004)
        await asyncio.sleep(1)
        assert batcher.stats().queued == 0


async def test_map_is_answered_with_similar_answers_too():
    async with similar_batcher() as batcher:
        await prove(batcher)
        found = [result.reply.route async for result in batcher.map([ask_about("amber", 900 + n) for n in range(40)])]
        assert found == ["similar"] * 40


# --- hooks


async def test_hooks_see_the_route():
    class Notes:
        def __init__(self):
            self.settled, self.called, self.saved = [], [], 0.0

        def on_settle(self, event):
            self.settled.append(event.route)
            self.saved += event.unbatched_cost_usd or 0.0

        def on_call(self, event):
            self.called.append(event.route)

    notes = Notes()
    async with similar_batcher(hooks=[notes], prices=lambda _: mb.Price(1.0, 2.0)) as batcher:
        await prove(batcher, model="m")
        await asyncio.gather(*(batcher.submit(ask_about("amber", number), model="m") for number in range(100, 300)))
        await asyncio.sleep(10)
        assert notes.saved == pytest.approx(batcher.stats().similar_saved_usd)
        assert notes.saved > 0
    assert notes.settled.count("similar") == 200
    assert "check" in notes.called


# --- arguments


def test_arguments_are_checked():
    exact = mb.MemoryCache()
    for options in ({"max_error": 0}, {"max_error": 1}, {"lookup_timeout": 0}, {"embed": 3}, {"isolate": 1}):
        with pytest.raises(mb.ConfigError, match=next(iter(options))):
            mb.SemanticCache(exact, **options)
    with pytest.raises(mb.ConfigError, match="exact"):
        mb.SemanticCache(mb.SemanticCache(exact, embed=Embedder()), embed=Embedder())
    with pytest.raises(mb.ConfigError, match="model"):
        mb.SemanticCache(exact, embed=Embedder(), model="m")

    async def same(one, other):
        return True

    with pytest.raises(mb.ConfigError, match="same"):
        mb.SemanticCache(exact, embed=Embedder(), same=same)


async def test_the_exact_cache_can_be_used_through_it():
    cache = semantic()
    async with opened(cache):
        await cache.set_many([(b"k", b"v", None)])
        assert await cache.get_many([b"k", b"x"]) == [b"v", None]
        assert [page async for page in cache.entries()] == [[(b"k", b"v")]]
        assert len(await cache.secret()) == 32
        assert await cache.clear() == 1
