"""Whatever goes wrong with a combined reply, every item still gets its own answer, for few calls.

Virtual time and the simulated model: what it says to an item depends on the item's text and schema alone, so the right answer
is the one the item would have got alone.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
from itertools import cycle, islice
from typing import get_args

import msgspec
import pytest
from helpers import ask
from shop import TEXTS, TYPES, Label, Product, right

import microbatch as mb
from microbatch.testing import Faults, Latency, ScriptedTransport, SimulatedModel, SimulatedTransport, simulated_answer
from microbatch.testing.faults import Kind
from microbatch.testing.reading import EndpointError, understand

COMBINED_KINDS = (
    *(
        "missing",
        "duplicate",
        "previous_id",
        "next_id",
        "unknown",
        "renamed",
        "reordered",
        "empty_results",
        "wrong_type",
    ),
    *("broken_json", "fenced", "whitespace", "truncated", "refusal", "filtered", "cut", "reset", "http_400"),
)
"""Kinds that spoil a combined reply and can be told from its words."""

SHIFTS = ("shifted_back", "shifted_forward")


def simulated(*kinds, **options):
    faults = Faults(kinds, **{name: options.pop(name) for name in ("rate", "on", "seed", "limit") if name in options})
    return SimulatedModel(faults=faults, record=True, **options)


async def outcomes(model, texts, types=str, *, resolve=None, policy=None):
    """Submit all *texts* at once, for answers of these *types*; return what each ended with, and the batcher's figures."""
    types = types if isinstance(types, list) else [types] * len(texts)
    async with mb.Microbatcher(
        SimulatedTransport(model),
        policy=policy,
        retry=mb.RetryPolicy(reserve=1_000),  # up to all replies are cut here, and asking again is paid from it
        fallback=mb.FallbackPolicy(resolve=resolve),
        tokens="bytes",
    ) as batcher:
        asked = (batcher.submit(ask(text), output_type=each) for text, each in zip(texts, types, strict=True))
        ended = await asyncio.gather(*asked, return_exceptions=True)
    return ended, batcher.stats()


def heard(model):
    """Return the answers the model gave to each text in elements under the id of its line, and the texts it was asked alone."""
    said: dict[str, list[object]] = {}
    alone = set()
    for body, reply in zip(model.requests, model.replies, strict=True):
        prompt = understand(body, tokens=0, max_tokens=None)
        if not prompt.combined:
            alone.add(prompt.items[0][1])
            continue
        texts = dict(prompt.items)
        for name, answer in elements(reply):
            if name in texts:
                said.setdefault(texts[name], []).append(answer)
    return said, alone


def elements(reply):
    """Yield ids and answers of a combined reply, found without the library."""
    for opening in re.finditer(r'\{"id":', reply):
        try:
            each, _ = json.JSONDecoder().raw_decode(reply, opening.start())
        except ValueError:
            continue
        yield each["id"].strip("[] ").lower(), each["answer"]


def assert_nobody_has_a_strangers_answer(model, texts, ended):
    said, alone = heard(model)
    for text, reply in zip(texts, ended, strict=True):
        if isinstance(reply, mb.Reply):
            assert text in alone or msgspec.to_builtins(reply.output) in said[text]


# Of a reply that is not streamed nothing has come when the connection breaks: that is a failed call and no damage.
DAMAGE = [(kind, resolve) for kind in COMBINED_KINDS for resolve in ("stream", "verified")]
DAMAGE.remove(("reset", "verified"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "resolve"), DAMAGE)
@pytest.mark.promise(of="cross_talk")
async def test_every_item_gets_its_own_answer_whatever_happens_to_combined_replies(kind, resolve):
    for rate, count in ((0.2, 240), (1.0, 96)):
        model = simulated(kind, rate=rate)
        texts, types = TEXTS[:count], list(islice(cycle(TYPES.values()), count))
        ended, stats = await outcomes(model, texts, types, resolve=resolve)
        assert [reply.output for reply in ended] == list(map(right, texts, types))
        assert model.faulted >= rate * 6
        assert stats.answered == count
        assert stats.upstream_calls == model.calls
        assert_nobody_has_a_strangers_answer(model, texts, ended)


@pytest.mark.parametrize("resolve", ["stream", "verified"])
@pytest.mark.parametrize("kind", SHIFTS)
async def test_a_shifted_reply_gives_nobody_what_stood_under_another_id(kind, resolve):
    """That a model wrote its answers under ids that are in order but not theirs cannot be seen from the reply alone."""
    model = simulated(kind, rate=1.0)
    texts = TEXTS[:200]
    ended, _ = await outcomes(model, texts, resolve=resolve)
    assert all(isinstance(reply, mb.Reply) for reply in ended)
    assert_nobody_has_a_strangers_answer(model, texts, ended)


@pytest.mark.parametrize("kind", ["renamed", "unknown"])
async def test_the_number_of_an_id_alone_answers_nobody(kind):
    model = simulated(kind, rate=1.0, seed=5)
    ended, stats = await outcomes(model, TEXTS[:300])
    assert [reply.output for reply in ended] == list(map(right, TEXTS[:300]))
    names = [name for reply in model.replies for name, _ in elements(reply)]
    assert any(name.isdigit() for name in names), "the model never tried"
    assert stats.unknown_ids > 0


@pytest.mark.parametrize("output", TYPES)
@pytest.mark.parametrize("seed", range(3))
async def test_with_single_calls_spoiled_too_every_item_ends_right_or_with_a_typed_error(seed, output):
    output_type = TYPES[output]
    kinds = (*COMBINED_KINDS, "http_429", "http_500")
    model = simulated(*kinds, rate=0.3, on="all", seed=seed)
    texts = TEXTS[:300]
    ended, stats = await outcomes(model, texts, output_type)
    for text, reply in zip(texts, ended, strict=True):
        if isinstance(reply, mb.Reply):
            assert reply.output == right(text, output_type) or reply.finish_reason == "length"
        else:
            assert isinstance(reply, mb.RequestFailed)
            assert type(reply) is not mb.RequestFailed, "more specific than that"
            assert reply.attempts >= 1
    assert_nobody_has_a_strangers_answer(model, texts, ended)
    assert (stats.answered + stats.failed, stats.queued, stats.in_flight) == (300, 0, 0)


async def test_errors_are_objects_of_each_callers_own_and_name_no_other_item():
    model = simulated("http_500", rate=1.0, on="all")
    ended, _ = await outcomes(model, TEXTS[:20])
    assert {type(error) for error in ended} == {mb.ServerError}
    assert len(set(map(id, ended))) == 20
    assert not any(text[:20] in repr(error) for error in ended for text in TEXTS[:20])


@pytest.mark.parametrize("output", TYPES)
@pytest.mark.parametrize("unsupported", ["400", "500"])
async def test_without_json_schema_the_shape_in_words_is_enough(unsupported, output):
    model = simulated("broken_json", "fenced", rate=0.3, json_schema=unsupported)
    texts = TEXTS[:100]
    ended, _ = await outcomes(model, texts, TYPES[output])
    assert [reply.output for reply in ended] == [right(text, TYPES[output]) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMBINED_KINDS)
async def test_batches_of_every_size_survive_every_fault(kind):
    for size in (2, 5, 50):
        policy = mb.FlushPolicy(max_batch_size=size, max_output_tokens=10**6, max_batch_tokens=10**6)
        model = simulated(kind, rate=0.5, seed=size)
        ended, _ = await outcomes(model, TEXTS[:100], Label, policy=policy)
        assert [reply.output for reply in ended] == [right(text, Label) for text in TEXTS[:100]]


async def test_a_stream_of_arrivals_under_mixed_faults_ends_right():
    model = simulated(*COMBINED_KINDS, rate=0.3, latency=Latency(first_token=0.3, tokens_per_second=200))
    draw = random.Random(7)
    async with mb.Microbatcher(SimulatedTransport(model), tokens="bytes") as batcher:

        async def caller(number, text):
            await asyncio.sleep(draw.random() * 5)
            output_type = (str, Label, Product)[number % 3]
            reply = await batcher.submit(ask(text), output_type=output_type)
            assert reply.output == right(text, output_type)

        await asyncio.gather(*(caller(number, text) for number, text in enumerate(islice(cycle(TEXTS), 500))))
        assert batcher.stats().answered == 500


# --- how the calls are spent


def scripted(*script):
    return ScriptedTransport(*script, answer=str.upper)


async def asked(transport, count, *, resolve=None, **options):
    policy = mb.FlushPolicy(max_batch_size=count)
    async with mb.Microbatcher(
        transport, policy=policy, fallback=mb.FallbackPolicy(resolve=resolve), tokens="bytes", **options
    ) as batcher:
        texts = [f"item {number}" for number in range(count)]
        replies = await asyncio.gather(*map(batcher.submit, map(ask, texts)), return_exceptions=True)
        return replies, batcher.stats()


def without(*numbers):
    """Return a step that leaves the items with these *numbers* unanswered."""
    return lambda call: call.reply(
        (name, text.upper()) for number, (name, text) in enumerate(call.items) if number not in numbers
    )


async def test_up_to_a_quarter_missing_is_asked_again_one_by_one():
    transport = scripted(without(1, 5, 9, 13))
    replies, stats = await asked(transport, 16)
    assert [reply.output for reply in replies] == [f"ITEM {number}" for number in range(16)]
    assert [reply.route for reply in replies].count("fallback") == 4
    assert [call.combined for call in transport.calls] == [True] + [False] * 4
    assert (stats.fallback_calls, stats.singles_by_reason) == (4, {"fallback": 4})


async def test_more_than_a_quarter_missing_is_asked_again_together_first_shuffled_and_under_new_ids():
    transport = scripted(without(*range(8, 16)))
    replies, stats = await asked(transport, 16)
    assert [reply.output for reply in replies] == [f"ITEM {number}" for number in range(16)]
    assert [len(call.items) for call in transport.calls] == [16, 8]
    first, again = (call.items for call in transport.calls)
    assert not {name for name, _ in first} & {name for name, _ in again}
    assert sorted(text for _, text in again) == sorted(text for _, text in first[8:])
    assert stats.fallback_calls == 1
    orders = set()
    for secret in "abcde":
        transport = scripted(without(*range(8, 16)))
        await asked(transport, 16, id_secret=secret)
        orders.add(tuple(text for _, text in transport.calls[1].items))
    assert len(orders) == 5


@pytest.mark.parametrize("reply", ["", "I cannot do that.", without(*range(16))], ids=["blank", "prose", "no results"])
async def test_after_a_reply_without_one_answer_everybody_is_asked_alone(reply):
    """What could not be answered together is not asked together once more: every item would be paid three times."""
    transport = scripted(reply)
    replies, stats = await asked(transport, 16)
    assert [reply.output for reply in replies] == [f"ITEM {number}" for number in range(16)]
    assert [len(call.items) for call in transport.calls] == [16] + [1] * 16
    assert stats.upstream_calls == 17


async def test_an_item_alone_is_sent_as_its_callers_own_messages():
    transport = scripted(without(0))
    await asked(transport, 8)
    assert transport.calls[1].call.messages == ask("item 0")
    assert transport.calls[1].call.schema is None


async def test_a_reply_at_the_token_limit_halves_the_batches_of_its_lane():
    def limited(call):
        return call.reply((name, text.upper()) for name, text in call.items[:8]), mb.Completion("length")

    transport = scripted(limited)
    async with mb.Microbatcher(transport, policy=mb.FlushPolicy(max_batch_size=16), tokens="bytes") as batcher:
        for _ in range(2):
            await asyncio.gather(*(batcher.submit(ask(f"item {number}")) for number in range(16)))
        sizes = [len(call.items) for call in transport.calls]
    assert sizes[:2] == [16, 8]
    assert max(sizes[2:]) <= 9
    assert sum(sizes[2:]) == 16


async def test_after_a_cut_the_finished_answers_stand_and_the_others_are_asked_again():
    def broken(call):
        answers = [(name, text.upper()) for name, text in call.items]
        return call.reply(answers)[: -len("xxxxxxxxxxxxxxxxxxxx")], mb.ConnectFailed("reset")

    transport = scripted(broken)
    replies, _ = await asked(transport, 8)
    assert [reply.output for reply in replies] == [f"ITEM {number}" for number in range(8)]
    assert [reply.route for reply in replies] == ["batch"] * 7 + ["fallback"]


async def test_what_a_cut_has_lost_is_not_asked_again_without_retry_budget_and_its_callers_are_told():
    def broken(call):
        answers = [(name, text.upper()) for name, text in call.items]
        return call.reply(answers[:6])[: -len("]}")], mb.Completion(None)

    transport = scripted(broken)
    retry = mb.RetryPolicy(reserve=0, budget=0)
    async with mb.Microbatcher(transport, retry=retry, tokens="bytes") as batcher:
        asked = (batcher.submit(ask(f"item {number}")) for number in range(8))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        stats = batcher.stats()
    assert [reply.output for reply in outcomes[:6]] == [f"ITEM {number}" for number in range(6)]
    for error in outcomes[6:]:
        assert type(error) is mb.TransportError
        (note,) = error.__notes__
        assert "retry budget is used up" in note
        error.add_note("the caller's own")
    assert [len(error.__notes__) for error in outcomes[6:]] == [2, 2]  # each has notes of its own
    assert (stats.upstream_calls, stats.retries_denied) == (1, 2)


async def test_a_cut_after_damage_keeps_only_what_was_delivered_before_it():
    def broken(call):
        answers = [(name, text.upper()) for name, text in call.items]
        del answers[3]
        return call.reply(answers)[:-2], mb.Completion(None)

    replies, _ = await asked(scripted(broken), 8)
    assert [reply.output for reply in replies] == [f"ITEM {number}" for number in range(8)]
    assert [reply.route for reply in replies] == ["batch"] * 3 + ["fallback"] * 5


@pytest.mark.parametrize("error", [mb.RateLimited, mb.ServerError, mb.ConnectFailed, mb.TransportTimeout])
@pytest.mark.promise(of="poison")
async def test_a_failure_that_is_no_items_fault_fails_them_all_and_is_never_split(error):
    transport = scripted(*(error("no") for _ in range(50)))
    replies, _ = await asked(transport, 8)
    assert {type(reply) for reply in replies} == {error}
    assert {len(call.items) for call in transport.calls} == {8}


@pytest.mark.parametrize("error", [mb.AuthFailed, mb.QuotaExhausted])
async def test_a_refusal_that_another_attempt_cannot_change_costs_one_call(error):
    transport = scripted(error("no"))
    replies, stats = await asked(transport, 8)
    assert {type(reply) for reply in replies} == {error}
    assert stats.upstream_calls == 1


async def test_a_404_names_the_model_and_is_not_bisected():
    transport = scripted(mb.BadRequest("no such model", status=404))
    replies, stats = await asked(transport, 8)
    assert {type(reply) for reply in replies} == {mb.BadRequest}
    assert stats.upstream_calls == 1


# --- callers who leave


@pytest.mark.parametrize(("count", "gone"), [(3, [0]), (1, [0]), (2, [0, 1]), (17, [0]), (17, [16])])
async def test_a_caller_who_leaves_in_the_turn_in_which_the_batch_leaves_harms_nobody(count, gone):
    async with mb.Microbatcher(scripted(), tokens="bytes") as batcher:
        callers = [asyncio.ensure_future(batcher.submit(ask(f"item {number}"))) for number in range(count)]
        await asyncio.sleep(0)  # all have been accepted; the scheduler runs next
        for number in gone:
            callers[number].cancel()
        async with asyncio.timeout(60):
            replies = await asyncio.gather(*callers, return_exceptions=True)
        for number, reply in enumerate(replies):
            assert isinstance(reply, asyncio.CancelledError) if number in gone else reply.output == f"ITEM {number}"
        assert (await batcher.submit(ask("still there"))).output == "STILL THERE"
        assert (batcher.stats().cancelled, batcher.stats().queued) == (len(gone), 0)


# --- poison

POISON = "☠"
REFUSALS = {
    "content_filter": (EndpointError(400, "filtered", code="content_filter"), mb.Filtered),
    "bad request": (EndpointError(400, "Invalid prompt.", param="messages", code="invalid_value"), mb.BadRequest),
    "too large": (EndpointError(413, "too large"), mb.BadRequest),
    "unprocessable": (EndpointError(422, "no"), mb.BadRequest),
    "context": (EndpointError(400, "too long", param="messages", code="context_length_exceeded"), mb.ContextTooLong),
}


def poisoned(error):
    def answer(text, schema):
        if POISON in text:
            raise error
        return simulated_answer(text, schema)

    return answer


@pytest.mark.slow
@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("output", ["str", "label"])
@pytest.mark.promise(of="poison")
async def test_poison_is_found_within_the_bound_and_fails_alone(refusal, output):
    endpoint_error, error = REFUSALS[refusal]
    draw = random.Random(refusal)
    for count in (2, 3, 7, 16, 33):
        for bad in {1, 2, 3, count // 2, count}:
            if bad > count:
                continue
            culprits = set(draw.sample(range(count), bad))
            texts = [f"{POISON if number in culprits else ''}{TEXTS[number]}" for number in range(count)]
            model = SimulatedModel(answer=poisoned(endpoint_error))
            policy = mb.FlushPolicy(max_batch_size=count, max_output_tokens=10**6, max_batch_tokens=10**6)
            ended, stats = await outcomes(model, texts, TYPES[output], policy=policy)
            for number, reply in enumerate(ended):
                if number in culprits:
                    assert type(reply) is error
                else:
                    assert reply.output == right(texts[number], TYPES[output])
            assert stats.upstream_calls <= 1 + 2 * bad * math.ceil(math.log2(count))
            assert (stats.answered, stats.failed) == (count - bad, bad)


async def test_a_model_that_declines_for_one_item_declines_for_that_one_only():
    def step(call):
        if any("item 3" in text for _, text in call.items):
            return mb.Completion("stop", refusal="I can't help with that.")
        if not call.combined:
            return call.items[0][1].upper()
        return call.reply((name, text.upper()) for name, text in call.items)

    transport = scripted(*[step] * 20)
    replies, stats = await asked(transport, 16)
    assert [getattr(reply, "output", type(reply)) for reply in replies] == [
        mb.Refused if number == 3 else f"ITEM {number}" for number in range(16)
    ]
    assert stats.upstream_calls <= 1 + 2 * 4


# --- the same answers as one by one


@pytest.mark.parametrize("output", TYPES)
async def test_batched_answers_equal_single_answers_item_by_item(output):
    output_type = TYPES[output]
    together, _ = await outcomes(SimulatedModel(), TEXTS, output_type)
    alone, stats = await outcomes(SimulatedModel(), TEXTS, output_type, policy=mb.FlushPolicy(max_batch_size=1))
    assert {reply.route for reply in together} == {"batch"}
    assert {reply.route for reply in alone} == {"single"}
    assert stats.batches == 0
    assert [reply.output for reply in together] == [reply.output for reply in alone]


def test_every_kind_of_fault_is_tried_here_but_the_silent_ones():
    tried = {*COMBINED_KINDS, *SHIFTS, "http_429", "http_500", "strange_ids", "rambling"}  # the last two in test_bounds
    assert set(get_args(Kind)) - tried == {"stall", "hang"}
