"""Ids: the same for the same batch, others for any other, and nothing that can be guessed."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from typing import Literal

import pytest
from helpers import ask, batcher_for

import microbatch as mb
from microbatch.assembly import Settings
from microbatch.batching.request import read_options
from microbatch.prompt.codec import ChatCodec
from microbatch.prompt.compose import ALPHABET, item_line
from microbatch.prompt.ids import IdKey
from microbatch.spool.payload import Payload
from microbatch.spool.provider.input_file import Composer
from microbatch.spool.records import Delivery, Name
from microbatch.testing import Faults, ScriptedTransport, SimulatedModel, SimulatedTransport
from microbatch.transports.chat_wire import BatchWire

SYSTEM = [{"role": "system", "content": "Label each product."}]
TEXTS = [f"item {number}" for number in range(16)]


def endings(ids):
    return [name.lstrip("0123456789") for name in ids]


def ids_of(
    texts=("a", "b", "c"),
    shared=SYSTEM,
    *,
    secret="s",
    canary=False,
    apart=(),
    output_type=str,
    model="m",
    headers=None,
):
    settings = read_options(output_type, model, None, None, None, headers, None, "normal")
    codec = ChatCodec(key=IdKey(secret), canary=canary)
    composed = codec.compose(settings, shared, [item_line(text) for text in texts], apart=apart)
    return [*endings(composed.ids), composed.canary]


# --- what ids depend on


@pytest.mark.parametrize("canary", [False, True])
def test_the_same_batch_has_the_same_ids(canary):
    assert ids_of(canary=canary) == ids_of(canary=canary)


OTHERS = {
    "an item": {"texts": ("a", "b", "d")},
    "the order": {"texts": ("b", "a", "c")},
    "a longer batch": {"texts": ("a", "b", "c", "d")},
    "a shorter batch": {"texts": ("a", "b")},
    "lines run together": {"texts": ("a", 'b"\n"c')},
    "a line that looks like two": {"texts": ("ab", "c")},
    "the shared messages": {"shared": [{"role": "system", "content": "Label each product!"}]},
    "the role of a shared message": {"shared": [{"role": "developer", "content": "Label each product."}]},
    "an item among the shared messages": {"texts": ("b", "c"), "shared": [*SYSTEM, {"role": "user", "content": "a"}]},
    "no shared messages": {"shared": []},
    "the secret": {"secret": "t"},
    "the form of an answer": {"output_type": Literal["home", "other"]},
    "the model": {"model": "n"},
    "a caller's key": {"headers": {"authorization": "Bearer k"}},
    "the attempt": {"apart": (None, (0,))},
    "another attempt": {"apart": (None, (0, 0))},
    "the tenant": {"apart": ("t", ())},
    "a tenant that looks like none": {"apart": ("None", ())},
}


@pytest.mark.parametrize("canary", [False, True])
def test_whatever_differs_between_two_batches_all_of_their_ids_differ(canary):
    found = {name: ids_of(canary=canary, **options) for name, options in {"": {}, **OTHERS}.items()}
    for (one, ids), (other, others) in itertools.combinations(found.items(), 2):
        assert not {*ids} & {*others} - {None}, (one, other)


def test_a_codec_that_composes_for_several_lanes_in_turn_takes_each_for_itself():
    codec, settings, lines = ChatCodec(), read_options(str, None, None, None, None, None, None, "normal"), [b'"a"']
    shared = [[{"role": "system", "content": text}] for text in ("one", "two", "one")]
    first, second, third = (codec.compose(settings, each, lines).ids for each in shared)
    assert first == third != second


def test_equal_items_of_one_batch_have_ids_of_their_own():
    ids = ids_of(["a"] * 1_000)[:-1]
    assert len(set(ids)) > 990  # of 19**5: one pair in five such batches


def test_an_empty_secret_is_refused_and_text_and_bytes_are_the_same():
    for empty in ("", b""):
        with pytest.raises(mb.ConfigError, match="id_secret must not be empty"):
            mb.Microbatcher(ScriptedTransport(), id_secret=empty)
    with pytest.raises(mb.ConfigError, match="id_secret must be"):
        mb.Microbatcher(ScriptedTransport(), id_secret=7)
    assert ids_of(secret="é") == ids_of(secret="é".encode()) != ids_of(secret="e")
    assert ids_of(secret="\ud800" * 100)  # of any length, and whatever a command line holds
    assert ids_of(secret=b"x" * 64) != ids_of(secret=b"x" * 65)


def test_the_secret_is_not_shown():
    batcher = mb.Microbatcher(ScriptedTransport(), id_secret="hush")
    assert "hush" not in repr(batcher._parts.settings)
    assert isinstance(batcher._parts.settings, Settings)


# --- what they look like


def test_endings_are_even_over_all_places_and_letters():
    drawn = IdKey("s").draws(b"batch")(38_000)
    assert {len(ending) for ending in drawn} == {5}
    for place in range(5):
        letters = [ending[place] for ending in drawn]
        assert all(1_700 < letters.count(letter) < 2_300 for letter in ALPHABET)  # 2,000 expected, deviation 44


def test_the_first_endings_of_many_batches_are_even_too():
    drawn = [IdKey("s").draws(str(number).encode())(1)[0] for number in range(9_500)]
    assert len(set(drawn)) > 9_450
    for place in range(5):
        letters = [ending[place] for ending in drawn]
        assert all(380 < letters.count(letter) < 620 for letter in ALPHABET)  # 500 expected, deviation 22


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 1_000])
def test_as_many_are_drawn_as_are_asked_for_and_others_each_time(count):
    draw = IdKey("s").draws(b"batch")
    first, second = draw(count), draw(count)
    assert len(first) == len(second) == count
    assert not set(first) & set(second) or count > 100


# --- through a batcher


async def prompts(texts=TEXTS, *, times=1, faults=None, canary=False, **options):
    """Return the texts of all prompts that are sent for *texts*, asked *times* times."""
    model = SimulatedModel(faults=faults, record=True)
    options |= {"fallback": mb.FallbackPolicy(canary=canary), "retry": mb.RetryPolicy(reserve=1_000)}
    async with batcher_for(SimulatedTransport(model), max_concurrent_batches=1, **options) as batcher:
        for _ in range(times):
            await asyncio.gather(*(batcher.submit(ask(text)) for text in texts))
    return [body["messages"] for body in model.requests]


@pytest.mark.parametrize("canary", [False, True])
async def test_the_same_batch_asked_twice_in_one_process_is_the_same_prompt(canary):
    first, second = await prompts(times=2, canary=canary)
    assert first == second
    assert await prompts(canary=canary) == [first]
    (other,) = await prompts(canary=canary, id_secret="s")
    assert other != first


SPOILED = ("missing", "unknown", "wrong_type", "broken_json", "truncated", "refusal", "cut", "http_400", "filtered")


@pytest.mark.parametrize("canary", [False, True])
@pytest.mark.parametrize("kind", SPOILED)
async def test_with_one_secret_a_run_is_repeated_to_the_byte_its_fallback_included(kind, canary):
    async def run(secret):
        texts = [f"item {number}" for number in range(64)]
        faults = Faults(kind, rate=0.7, on="combined")
        return await prompts(texts, faults=faults, canary=canary, id_secret=secret)

    first, second, other = await run("s"), await run("s"), await run("t")
    assert first == second
    assert first != other
    assert len(first) > 4  # some were asked again


def without_some(call):
    return call.reply((name, text.upper()) for name, text in call.items[:9])


async def combined_calls(*script, texts=TEXTS, **options):
    """Return the ids and the texts of each combined call."""
    transport = ScriptedTransport(*script)
    async with batcher_for(transport, **options) as batcher:
        await asyncio.gather(*(batcher.submit(ask(text)) for text in texts))
    return [call.items for call in transport.calls if call.combined]


async def test_what_is_asked_again_together_is_shuffled_by_the_key():
    """In an order that is neither that of the batch nor the same for every secret, and the same for the same one."""
    orders = []
    for secret in (None, None, "a", "b", "b"):
        first, again = await combined_calls(without_some, id_secret=secret)
        orders.append([text for _, text in again])
        assert sorted(orders[-1]) == sorted(text for _, text in first[9:])
        assert not {*endings(name for name, _ in first)} & {*endings(name for name, _ in again)}
    assert orders[0] == orders[1]
    assert orders[3] == orders[4]
    assert len({*map(tuple, orders)} | {tuple(text for _, text in first[9:])}) == 4


async def test_the_same_batch_asked_again_because_its_bound_was_too_low_has_other_ids():
    def cut(call):
        return "", mb.Completion("length", usage=mb.Usage(100, call.call.bound), bound=call.call.bound)

    first, again = await combined_calls(cut)
    assert [text for _, text in first] == [text for _, text in again]
    assert not {*endings(name for name, _ in first)} & {*endings(name for name, _ in again)}


async def test_calls_that_ask_again_about_equal_texts_have_ids_of_their_own():
    refused = mb.BadRequest("no", status=400)
    calls = await combined_calls(refused, texts=["same"] * 8, share=False)
    assert [len(call) for call in calls] == [8, 4, 4]
    found = [*itertools.chain.from_iterable(endings(name for name, _ in call) for call in calls)]
    assert len(set(found)) == 16


async def test_a_call_sent_again_after_a_cut_that_left_nothing_is_the_same_to_the_byte():
    transport = ScriptedTransport(mb.Completion(None))
    async with batcher_for(transport) as batcher:
        await asyncio.gather(*(batcher.submit(ask(text)) for text in TEXTS))
    first, second = transport.calls
    assert first.call.messages == second.call.messages


async def test_the_same_batch_of_another_trust_domain_has_other_ids():
    transport = ScriptedTransport()
    domains = [{}, {"tenant": "t"}, {"headers": {"authorization": "Bearer k"}}, {"headers": {"x-api-key": "k"}}]
    async with batcher_for(transport) as batcher:
        for options in (*domains, *domains):
            await asyncio.gather(*(batcher.submit(ask(text), **options) for text in TEXTS))
    found = [tuple(name for name, _ in call.items) for call in transport.calls]
    assert found[:4] == found[4:]
    assert len({*itertools.chain.from_iterable(map(endings, found))}) == 4 * 16


async def test_ids_that_are_drawn_by_the_caller_take_precedence():
    def draw(count):
        return ["kfqzt"] * count

    ((first, *_),) = await combined_calls(draw_ids=draw, id_secret="s")
    assert first == ("1kfqzt", "item 0")


# --- other processes, and provider batches

_PRINT = """
import asyncio, microbatch as mb
from microbatch.testing import ScriptedTransport

async def main():
    transport = ScriptedTransport()
    async with mb.Microbatcher(transport, tokens="bytes", id_secret={secret!r}) as batcher:
        messages = [[{{"role": "user", "content": text}}] for text in "abc"]
        await asyncio.gather(*(batcher.submit(each, params={{"top_p": 1, "user": "u"}}) for each in messages))
    print(*(name for name, _ in transport.calls[0].items))

asyncio.run(main())
"""


def in_process(secret):
    words = [sys.executable, "-c", _PRINT.format(secret=secret)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()


def test_other_processes_have_other_ids_unless_they_share_a_secret():
    one, other, seeded, again = in_process(None), in_process(None), in_process("s"), in_process("s")
    assert len(one) == 3
    assert not {*one} & {*other}
    assert seeded == again
    assert not {*seeded} & {*one}


async def written(*, deliveries=1, tenant=None, key=None):
    payload = [Payload.of(ask(text), model="m") for text in TEXTS[:3]]
    taken = [
        Delivery(each.item(Name(tenant, str(number))), deliveries, "lease", 0.0) for number, each in enumerate(payload)
    ]
    (draft,), _ = await Composer(BatchWire(None, where="x"), mb.FlushPolicy(), canary=True, key=key).drafts(taken)
    (line,) = draft.lines
    return endings(line.ids), line.canary


async def test_the_ids_of_provider_batches_come_from_the_key_too():
    assert await written(key=IdKey("s")) == await written(key=IdKey("s"))
    assert await written() == await written()
    found = [
        await written(),
        await written(deliveries=2),
        await written(tenant="t"),
        await written(key=IdKey("s")),
    ]
    for (ids, word), (others, other_word) in itertools.combinations(found, 2):
        assert not {*ids} & {*others}
        assert word != other_word
