"""Whether requests may share a prompt: the short look at most submits sees what the long one sees."""

from __future__ import annotations

import copy
from typing import Literal

import msgspec
import pytest
from helpers import ask, batcher_for
from hypothesis import example, given
from hypothesis import strategies as st

import microbatch as mb
from microbatch.batching.estimates import Budget
from microbatch.batching.lane import Lane
from microbatch.batching.lane_history import LaneHistory
from microbatch.batching.request import PLAIN, own_text, read_messages, read_options, remembering, spec_of
from microbatch.batching.ticket import FlushReason, InFlightIndex
from microbatch.testing import ScriptedTransport

# Few words, so that messages are often equal, and values that are equal in Python but not in JSON.
words = st.sampled_from(["", "a", "b", "user", "system"])
odd = st.sampled_from([None, 1, 1.0, True, [], ["a"]])
messages = st.one_of(
    st.fixed_dictionaries({"role": words, "content": words}),
    st.fixed_dictionaries({"role": words, "content": words}, optional={"name": words | odd}),
    st.fixed_dictionaries({"role": words, "content": words | odd}),
    st.builds(mb.Message, words, words),
)
conversations = st.lists(messages, max_size=2).flatmap(
    lambda shared: st.sampled_from(["own", "other"]).map(lambda text: [*shared, {"role": "user", "content": text}])
)
options = st.builds(
    lambda model, tenant, priority: read_options(str, model, None, None, None, None, tenant, priority),
    *(st.sampled_from([None, "a"]), st.sampled_from([None, "a"]), st.sampled_from(["normal", "low"])),
)


def short_look(spec, messages, options):
    """Do what `Intake.accept` does with the lane of the latest request."""
    lane = Lane(
        *(spec, None, LaneHistory(), Budget(16, 1_000, FlushReason.SIZE)),
        count=len,
        index=InFlightIndex(),
        calls=None,
        owner=None,
    )
    return own_text(messages, spec.plain) if lane.serves(options) else None


def named(name):
    return [{"role": "a", "content": "a", "name": name}, {"role": "user", "content": "own"}]


@given(first=conversations, second=conversations, theirs=options, ours=options)
@example(first=named(1), second=named(True), theirs=PLAIN, ours=PLAIN)  # equal in Python, but not in JSON
def test_the_short_look_never_sees_a_lane_that_the_long_one_does_not(first, second, theirs, ours):
    read, other = read_messages(first, theirs), read_messages(second, ours)
    if isinstance(read, str):
        return
    text = short_look(spec_of(read[2][:-1], theirs, read[0]), second, ours)
    assert text is None or other[:2] == (read[0], text)


def test_the_short_look_sees_the_usual_lane():
    first = ask("one")
    key, _, _ = read_messages(first, PLAIN)
    assert short_look(spec_of(first[:-1], PLAIN, key), ask("two"), PLAIN) == "two"


@pytest.mark.promise(of="lane")
@pytest.mark.parametrize(
    "change",
    [
        lambda asked: asked[0].update(content="Whisper."),
        lambda asked: asked[0].update(role="developer"),
        lambda asked: asked[0].update(name="boss"),
        lambda asked: asked.insert(0, asked[0]),
        lambda asked: asked.pop(0),
    ],
)
async def test_whatever_differs_before_the_last_message_makes_another_lane(change):
    transport = ScriptedTransport()
    async with batcher_for(transport, idle="wait", max_wait=1.0) as batcher:
        await batcher.submit(ask("first"))
        other = copy.deepcopy(ask("second"))
        change(other)
        await batcher.submit(other)
        await batcher.submit(ask("third"))
    assert [list(each.call.messages) for each in transport.calls] == [ask("first"), other, ask("third")]


async def test_of_the_lanes_that_rest_only_the_latest_is_kept():
    async with batcher_for(ScriptedTransport()) as batcher:
        lanes = batcher._engine.lanes
        for number in range(10):
            await batcher.submit(ask("x", f"Lane {number}."))
            assert [lane.spec.shared[0]["content"] for lane in lanes._by_key.values()] == [f"Lane {number}."]
        assert not list(lanes)
        kept = batcher._intake._chat.latest
        await batcher.submit(ask("y", "Lane 9."))
        assert batcher._intake._chat.latest is kept


settings_given = st.tuples(
    *(
        st.sampled_from([str, int, Literal["a", "b"], 7]),  # 7 is no type
        st.sampled_from([None, "a", 1]),
        st.sampled_from([None, 1, True, 1.0, 300]),
        st.sampled_from([None, 0, 0.0, False, 1]),
        st.sampled_from([None, {}, {"seed": 1}, {"stop": "x"}]),
        st.sampled_from([None, {"X-Team": "a"}]),
        st.sampled_from([None, "acme"]),
        st.sampled_from(["normal", "low", "urgent"]),
    )
)


def outcome(read, given):
    try:
        return msgspec.structs.astuple(read(*given))
    except mb.ConfigError as error:
        return str(error)


def given_limit(max_tokens):
    return (str, None, max_tokens, None, None, None, None, "normal")


@given(st.lists(settings_given, max_size=6))
@example([given_limit(1), given_limit(True)])
def test_options_that_come_again_are_read_as_at_first(several):
    reader = remembering(read_options)
    for given_now in several:
        for _ in range(2):
            assert outcome(reader, given_now) == outcome(read_options, given_now)


def test_options_of_the_submit_before_are_known_and_a_mapping_that_changed_is_not():
    reader, params = remembering(read_options), {"top_p": 0.1}
    read = [reader(int, "m", None, None, None, None, None, "normal") for _ in range(2)]
    assert read[0] is read[1]
    before = reader(int, "m", None, None, params, None, None, "normal")
    params["top_p"] = 0.2
    assert reader(int, "m", None, None, params, None, None, "normal").content != before.content


def test_a_lanes_own_copy_cannot_be_changed_from_outside():
    first = ask("one")
    spec = spec_of(first[:-1], PLAIN, read_messages(first, PLAIN)[0])
    first[0]["content"] = "Whisper."
    assert own_text(first, spec.plain) is None
    assert spec.shared == msgspec.json.decode(msgspec.json.encode(ask("one")))[:1]
