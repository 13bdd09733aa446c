"""A combined reply is taken apart the same way in whatever pieces it comes, and damage costs only what is damaged."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Literal

import pytest
from helpers import each
from hypothesis import given, settings
from hypothesis import strategies as st

from microbatch.prompt.demultiplexer import Demultiplexer
from microbatch.schema.answer_type import answer_type
from microbatch.testing.faults import Fault, Faults

IDS = ["1kfqzt", "2bcdfg", "3hjkmn", "4pqrst", "5vwxzb"]
LABELS = ["home", "beauty", "sports", "other", "clothing"]


def as_json(raw):
    return json.loads(raw)


class Read:
    """What became of a reply: answers that were out before its end, all answers, faults by item, and the demultiplexer."""

    def __init__(self, *pieces, ids=IDS, decode=as_json, early=True, ended=True):
        self.demultiplexer = Demultiplexer(ids, [decode] * len(ids), early=early)
        delivered = [answer for piece in pieces for answer in self.demultiplexer.feed(piece)]
        self.in_time = dict(delivered)
        delivered += self.demultiplexer.close(ended=ended)
        self.answers = dict(delivered)
        assert len(self.answers) == len(delivered), "an item was answered twice"
        self.said = {index: raw for index, _, raw in self.demultiplexer.faults()}
        self.faults = {index: fault for index, fault, _ in self.demultiplexer.faults()}
        assert sorted([*self.answers, *self.faults]) == list(range(len(ids))), "an item has neither or both"

    @property
    def outcome(self):
        each = self.demultiplexer
        return self.answers, self.faults, each.damaged, each.late_duplicates, each.unknown_ids


def element(index, answer=None):
    return json.dumps({"id": IDS[index], "answer": LABELS[index] if answer is None else answer})


def reply(*elements):
    return '{"results":[' + ",".join(elements) + "]}"


def pieces_of(text, cuts):
    return [text[a:b] for a, b in pairwise(sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)}))]


WHOLE = reply(*map(element, range(5)))


def alive(*indexes):
    return {index: LABELS[index] for index in indexes}


def test_a_sound_reply_answers_every_item_as_soon_as_its_element_closes():
    demultiplexer = Demultiplexer(IDS, [as_json] * 5)
    out = [(at, answer) for at, char in enumerate(WHOLE) for answer in demultiplexer.feed(char)]
    assert [answer for _, answer in out] == list(enumerate(LABELS))
    assert [at + 1 for at, _ in out] == [WHOLE.index(element(index)) + len(element(index)) for index in range(5)]
    assert demultiplexer.close() == []
    assert not demultiplexer.damaged
    assert list(demultiplexer.faults()) == []


@pytest.mark.parametrize("size", [1, 8, 40])
@pytest.mark.parametrize("text", ["a {brace} that closes in the text", 'a "quote" and a {brace}\n' * 40])
def test_a_text_with_braces_is_out_as_soon_as_its_element_closes(text, size):
    whole = reply(*(element(index, text) for index in range(5)))
    read = Read(*pieces_of(whole, range(0, len(whole), size)))
    assert read.in_time == dict.fromkeys(range(5), text)
    assert not read.demultiplexer.damaged


def test_verified_holds_every_answer_to_the_end():
    read = Read(WHOLE, early=False)
    assert (read.in_time, read.answers) == ({}, alive(0, 1, 2, 3, 4))
    assert not read.demultiplexer.damaged


# --- damage, one rule each


def test_an_answer_that_does_not_fit_costs_only_its_item_and_holds_the_rest_to_the_end():
    decode = answer_type(Literal["home", "beauty", "sports", "other", "clothing"]).decode
    read = Read(reply(element(0), element(1, "garden"), *map(element, (2, 3, 4))), decode=decode)
    assert {index: output for index, (output, _) in read.in_time.items()} == alive(0)
    assert {index: output for index, (output, _) in read.answers.items()} == alive(0, 2, 3, 4)
    assert read.faults == {1: "malformed"}
    assert read.said == {1: '"garden"'}
    assert read.demultiplexer.damaged


@pytest.mark.parametrize("answer", [None, "", "  \n", 5, ["home"]])
def test_text_that_is_blank_or_no_text_does_not_fit(answer):
    # json.dumps, because element() reads None as "the usual answer"
    spoiled = json.dumps({"id": IDS[0], "answer": answer})
    read = Read(reply(spoiled, element(1)), ids=IDS[:2], decode=answer_type(str).decode)
    assert (list(read.answers), read.faults) == ([1], {0: "malformed"})


def test_an_element_that_is_no_json_costs_only_its_item():
    read = Read(reply(element(0), '{"id":"2bcdfg","answer":nonsense}', *map(element, (2, 3, 4))))
    assert (read.in_time, read.answers) == (alive(0), alive(0, 2, 3, 4))
    assert read.faults == {1: "malformed"}
    assert "nonsense" in read.said[1]


def test_an_unknown_id_is_dropped_and_counted_and_ends_early_answers():
    read = Read(reply(element(0), '{"id":"9zzzzz","answer":"home"}', *map(element, (1, 2, 3, 4))))
    assert (read.in_time, read.answers) == (alive(0), alive(0, 1, 2, 3, 4))
    assert read.demultiplexer.unknown_ids == 1
    assert read.demultiplexer.damaged


def test_an_id_repeated_before_delivery_is_distrusted_in_all_its_copies():
    read = Read(reply(element(1), element(0), element(2, "one"), element(2, "two"), element(3), element(4)))
    assert read.answers == alive(0, 1, 3, 4)
    assert read.faults == {2: "repeated"}
    assert read.demultiplexer.late_duplicates == 0


@pytest.mark.parametrize("spoiled", ['{"id":"3hjkmn","answer":oops}', '{"id":"3hjkmn"}', '{"id":"3hjkmn","answer":"a'])
def test_a_broken_copy_makes_an_id_seen_twice_as_well(spoiled):
    for pair in ([spoiled, element(2)], [element(2), spoiled]):
        read = Read(reply(element(1), *pair, element(0)))
        assert read.faults == {2: "repeated", 3: "missing", 4: "missing"}


def test_a_repeat_of_a_delivered_id_is_dropped_and_counted():
    read = Read(reply(element(0), element(1), element(0, "another"), *map(element, (2, 3, 4))))
    assert (read.in_time, read.answers) == (alive(0, 1), alive(0, 1, 2, 3, 4))
    assert read.demultiplexer.late_duplicates == 1
    assert read.demultiplexer.damaged


def test_verified_distrusts_a_repeat_however_early_the_first_copy_came():
    read = Read(reply(element(0), element(1), element(0, "another"), *map(element, (2, 3, 4))), early=False)
    assert read.answers == alive(1, 2, 3, 4)
    assert read.faults == {0: "repeated"}


def test_elements_out_of_order_are_answered_at_the_end():
    read = Read(reply(element(0), *map(element, (2, 1, 3, 4))))
    assert (read.in_time, read.answers) == (alive(0), alive(0, 1, 2, 3, 4))
    assert read.demultiplexer.damaged


def test_after_a_gap_everything_waits_for_the_end():
    read = Read(reply(*map(element, (0, 1, 3, 4))))
    assert (read.in_time, read.answers) == (alive(0, 1), alive(0, 1, 3, 4))
    assert read.faults == {2: "missing"}
    assert read.demultiplexer.damaged


def test_items_missing_at_the_end_are_no_damage_to_the_others():
    read = Read(reply(*map(element, (0, 1, 2))))
    assert read.in_time == alive(0, 1, 2)
    assert read.faults == {3: "missing", 4: "missing"}


@pytest.mark.parametrize(
    "around",
    [
        "```json\n%s\n```",
        "\ufeff%s",
        '<think>{ {[["</think>%s',
        "Okay. So </think>\n\n```\n%s\n```\nAnything {else}?",
    ],
)
def test_fences_and_thoughts_around_are_no_damage(around):
    read = Read(around % WHOLE)
    assert (read.in_time, read.demultiplexer.damaged) == (alive(0, 1, 2, 3, 4), False)


@pytest.mark.parametrize(
    "around",
    [
        "Here are the [results] {each}:\n\n```\n%s\n```\nAnything {else}?",
        'As [1] asked, the "results" {"id", "answer"} follow.\n%s',
        "<think>hm</think> Here they are: %s",
    ],
)
def test_what_follows_prose_waits_for_the_end_since_it_may_be_a_draft(around):
    read = Read(around % WHOLE)
    assert (read.in_time, read.answers, read.demultiplexer.damaged) == ({}, alive(0, 1, 2, 3, 4), False)


@pytest.mark.parametrize("between", ["", ",", "\n", " ,\n", "],\n["])
def test_what_stands_between_the_elements_does_not_matter(between):
    read = Read(between.join(map(element, range(5))))
    assert (read.in_time, read.demultiplexer.damaged) == (alive(0, 1, 2, 3, 4), False)


def test_after_prose_between_elements_the_rest_waits_for_the_end():
    read = Read(", and then: ".join(map(element, range(5))))
    assert (read.in_time, read.answers, read.demultiplexer.damaged) == (alive(0), alive(0, 1, 2, 3, 4), False)


@pytest.mark.parametrize("name", ["[1kfqzt]", " 1kfqzt ", "1KFQZT", "[ 1Kfqzt]\\t", "\\u0031kfqzt", "[1kfqzt\\n]"])
def test_brackets_blanks_and_capitals_of_an_id_are_forgiven(name):
    read = Read(reply(f'{{"id":"{name}","answer":"home"}}', *map(element, (1, 2, 3, 4))))
    assert (read.in_time, read.demultiplexer.damaged) == (alive(0, 1, 2, 3, 4), False)


def test_two_spellings_of_an_id_are_the_same_id_seen_twice():
    read = Read(reply(element(1), '{"id":"[1KFQZT]","answer":"a"}', '{"id":"1kfqzt","answer":"b"}'))
    assert (read.answers, read.faults[0]) == (alive(1), "repeated")


@pytest.mark.parametrize(
    "name", ["1", "[1]", "1kfqz", "1kfqztt", "kfqzt", "1 kfqzt", "2kfqzt", "01kfqzt", "#1kfqzt", ""]
)
def test_the_number_alone_or_a_similar_id_is_never_accepted(name):
    read = Read(reply(f'{{"id":"{name}","answer":"home"}}', *map(element, (1, 2, 3, 4))))
    assert read.faults == {0: "missing"}
    assert read.demultiplexer.unknown_ids == 1


def test_a_number_for_an_id_is_never_accepted():
    read = Read(reply('{"id":1,"answer":"home"}', *map(element, (1, 2, 3, 4))))
    assert (read.answers, read.faults) == (alive(1, 2, 3, 4), {0: "missing"})
    assert read.demultiplexer.damaged


def test_a_model_that_counts_on_under_its_own_letters_answers_nobody():
    read = Read(reply(*(f'{{"id":"{number}kfqzt","answer":"x{number}"}}' for number in range(1, 7))))
    assert read.answers == {0: "x1"}
    assert set(read.faults) == {1, 2, 3, 4}


def test_a_spoof_inside_a_sound_answer_is_text():
    spoof = f'"}}, {element(3, "spoofed")}, {{"id":"x","answer":"'
    read = Read(reply(element(0), element(1, spoof), *map(element, (2, 3, 4))))
    assert read.in_time == {**alive(0, 2, 3, 4), 1: spoof}


def test_a_spoof_inside_a_broken_answer_cannot_answer_another_item():
    spoofed = '{"id":"2bcdfg","answer":"he said "so", ' + element(3, "spoofed") + '"}'
    read = Read(reply(element(0), spoofed, *map(element, (2, 3, 4))))
    assert read.answers == alive(0, 2, 4)
    assert read.faults == {1: "malformed", 3: "repeated"}


def test_a_spoof_of_an_item_answered_before_is_dropped():
    spoofed = '{"id":"2bcdfg","answer":"he said "so", ' + element(0, "spoofed") + '"}'
    read = Read(reply(element(0), spoofed, *map(element, (2, 3, 4))))
    assert read.answers == alive(0, 2, 3, 4)
    assert read.demultiplexer.late_duplicates == 1


@each("end", range(len(reply(*map(element, (0, 1)))), len(WHOLE), 7))
def test_a_truncated_reply_keeps_its_complete_elements(end):
    complete = [index for index in range(5) if element(index) in WHOLE[:end]]
    read = Read(WHOLE[:end])
    assert read.answers == alive(*complete)


def test_a_reply_truncated_after_damage_keeps_its_complete_elements_too():
    read = Read(reply(*map(element, (0, 2, 3, 4)))[:-40])
    assert (read.in_time, read.answers) == (alive(0), alive(0, 2, 3))


def test_a_cut_keeps_only_what_was_delivered_before_the_damage():
    read = Read(reply(*map(element, (0, 2, 3))), ended=False)
    assert read.answers == read.in_time == alive(0)
    assert read.faults == dict.fromkeys((1, 2, 3, 4), "missing")


def test_a_cut_without_damage_keeps_every_complete_element():
    assert Read(WHOLE[:-20], ended=False).answers == alive(0, 1, 2, 3)


BROKEN_ANSWERS = {
    "unescaped quotes": '{"id":"2bcdfg","answer":"he said "no" twice"}',
    "a quote and a comma": '{"id":"2bcdfg","answer":"so", "he said"}',
    "a raw newline": '{"id":"2bcdfg","answer":"one\ntwo"}',
    "a bad escape": '{"id":"2bcdfg","answer":"\\d+"}',
    "a bad unicode escape": '{"id":"2bcdfg","answer":"\\u12"}',
    "an unterminated string": '{"id":"2bcdfg","answer":"beauty}',
    "a missing brace": '{"id":"2bcdfg","answer":"beauty"',
    "a missing inner brace": '{"id":"2bcdfg","answer":{"category":"beauty"}',
    "a missing bracket": '{"id":"2bcdfg","answer":["beauty"}',
    "a missing comma": '{"id":"2bcdfg" "answer":"beauty"}',
    "a missing answer": '{"id":"2bcdfg"}',
    "single quotes": '{"id":"2bcdfg","answer":\'beauty\'}',
    "python words": '{"id":"2bcdfg","answer":None}',
    "a trailing comma": '{"id":"2bcdfg","answer":"beauty",}',
    "dots": '{"id":"2bcdfg","answer":...}',
    "a null byte": '{"id":"2bcdfg","answer":"\x00"}',
    "half a surrogate pair": '{"id":"2bcdfg","answer":"\\ud83d"}',
    "a number out of range": '{"id":"2bcdfg","answer":1e999}',
    "too deep nesting": '{"id":"2bcdfg","answer":' + "[" * 100 + "]" * 100 + "}",
    "the wrong type": '{"id":"2bcdfg","answer":{"category":"beauty"}}',
}


@each("name", BROKEN_ANSWERS)
@each("size", [1, 7, 10_000])
def test_one_damaged_element_costs_only_itself(name, size):
    text = reply(element(0), BROKEN_ANSWERS[name], *map(element, (2, 3, 4)))
    read = Read(*pieces_of(text, range(0, len(text), size)), decode=answer_type(str).decode)
    assert {index: output for index, (output, _) in read.answers.items()} == alive(0, 2, 3, 4)
    assert read.faults == {1: "malformed"}


@each("name", BROKEN_ANSWERS)
def test_a_damaged_last_element_costs_only_itself(name):
    text = reply(element(0), BROKEN_ANSWERS[name])
    read = Read(text, ids=IDS[:2], decode=answer_type(str).decode)
    assert (list(read.answers), read.faults) == ([0], {1: "malformed"})


@pytest.mark.parametrize("error", [RuntimeError, BaseException, RecursionError])
def test_whatever_a_decoder_raises_costs_only_its_item(error):
    def decode(raw):
        if "sports" in raw:
            raise error("a validator of the caller's own")
        return json.loads(raw)

    read = Read(WHOLE, decode=decode)
    assert (read.answers, read.faults) == (alive(0, 1, 3, 4), {2: "malformed"})


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_the_end_of_the_program_is_no_malformed_answer(error):
    def decode(raw):
        raise error

    with pytest.raises(error):
        Read(WHOLE, decode=decode)


def test_fields_beside_id_and_answer_and_their_order_do_not_matter_after_the_id():
    odd = '{ "id" : "1kfqzt" , "why": ["{", {"id":"2bcdfg","answer":"no"}], "answer" : "home" , "sure": 0.9 }'
    read = Read(reply(odd, *map(element, (1, 2, 3, 4))))
    assert (read.in_time, read.demultiplexer.damaged) == (alive(0, 1, 2, 3, 4), False)


# --- pieces

FRAGMENTS = st.sampled_from(
    [
        *map(element, range(5)),
        '{"id":"2bcdfg","answer":{"x":1}}',
        '{"id":"3hjkmn","answer":["q",[{}]]}',
        '{"id":"[4PQRST]","answer":"z\\"y"}',
        '{"id":"5vwxzb","answer":"\\ud800"}',
        '{"id":"5vwxzb","answer":1e999,"k":2}',
        '{"id":"1kfqzt","why":"}","answer":0}',
        '{"id":"9xxxxx","answer":"s"}',
        '{"id":"3hjkmn"',
        *('{"id":', '{ "id" :', '{"id":[', '{"results":[', '"id"', '"answer":', '"1kfqzt"', '"2bcdfg"'),
        *',[]{}"\\: \n\x00\x1fx1-é\U0001f600\u2028',
        *("null", "true", "1.5e3", "\\ud800", "\\u00e9", "\\q", "```", "]}", '"}', '"},'),
        '"' + " " * 300,
        "9" * 600,
        "[" * 40,
        '{"a":' * 30,
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=30).map("".join)
CUTS = st.lists(st.integers(0, 1_500), max_size=12)
ANSWERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=1_000)
@given(text=TEXTS, cuts=CUTS, early=st.booleans(), ended=st.booleans())
def test_any_text_is_read_alike_in_any_pieces(text, cuts, early, ended):
    whole = Read(text, early=early, ended=ended)
    assert Read(*pieces_of(text, cuts), early=early, ended=ended).outcome == whole.outcome
    assert Read(*text, early=early, ended=ended).outcome == whole.outcome


@given(text=st.text(), cuts=CUTS)
def test_any_unicode_is_read_alike_in_any_pieces(text, cuts):
    text = element(0, text) + text + element(1, "é" + text)
    assert Read(*pieces_of(text, cuts)).outcome == Read(text).outcome


@given(
    answers=st.lists(ANSWERS, min_size=5, max_size=5),
    cuts=CUTS,
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
    early=st.booleans(),
)
def test_any_answer_comes_back_as_it_was_said_in_any_pieces(answers, cuts, ascii_only, indent, early):
    results = [{"id": name, "answer": answer} for name, answer in zip(IDS, answers, strict=True)]
    text = json.dumps({"results": results}, ensure_ascii=ascii_only, indent=indent, allow_nan=True)
    text = text.replace("Infinity", "0")
    read = Read(*pieces_of(text, cuts), early=early)
    assert read.answers == {index: each["answer"] for index, each in enumerate(json.loads(text)["results"])}
    assert not read.demultiplexer.damaged
    assert not early or read.in_time == read.answers


KINDS = (
    *("missing", "duplicate", "unknown", "renamed", "reordered", "empty_results", "wrong_type", "broken_json"),
    *("fenced", "whitespace", "truncated", "shifted_back", "shifted_forward"),
)


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10_000),
    labels=st.lists(
        # No "}" that a stray quote can come to stand before: that makes a sound element of another answer, and nobody can tell.
        st.sampled_from([*LABELS, 'a "quoted" one', "ünï\u2028", "\\", "{x", "a\nb"]),
        min_size=5,
        max_size=5,
    ),
    cuts=CUTS,
    early=st.booleans(),
)
def test_every_fault_reads_alike_in_any_pieces_and_nobody_gets_what_was_said_under_another_id(
    kind, seed, labels, cuts, early
):
    text, said = spoiled(kind, seed, labels)
    read = Read(text, decode=answer_type(str).decode, early=early)
    assert Read(*pieces_of(text, cuts), decode=answer_type(str).decode, early=early).outcome == read.outcome
    for index, (output, _) in read.answers.items():
        assert output in said[IDS[index]]


def spoiled(kind, seed, labels):
    """Return a spoiled reply, and all that is said in it under each id."""
    fault: Fault = Faults(kind, rate=1, seed=seed).draw(0, 0)
    elements = fault.elements(list(zip(IDS, labels, strict=True)), None)
    said = {name: [answer for each, answer in elements if each.strip("[]").lower() == name] for name in IDS}
    texts = [json.dumps({"id": name, "answer": answer}, ensure_ascii=False) for name, answer in elements]
    if kind == "broken_json":
        at = fault.random.randrange(len(texts))
        texts[at] = fault.broken(texts[at])
    text = reply(*texts)
    if kind == "fenced":
        before, after = fault.fenced()
        text = before + text + after
    if kind == "whitespace":
        text = " \n "
    return text[: fault.cut(len(text))] if kind == "truncated" else text, said


@given(seed=st.integers(0, 10_000))
def test_broken_json_in_one_element_loses_at_most_that_one(seed):
    text, _ = spoiled("broken_json", seed, ['say "hi"', "b\\n", "c\nd", "{e}", "fé"])
    read = Read(text, decode=answer_type(str).decode)
    assert len(read.answers) >= 4


def test_a_long_padded_id_of_a_broken_element_is_read_alike_in_any_pieces():
    # The id of what is no element any more is looked for in its first half kilobyte only.
    for blanks in (10, 400, 490, 500, 510, 600, 3_000):
        text = '{"id":"1kfqzt' + " " * blanks + '","answer":oops} ' + element(1)
        assert Read(*pieces_of(text, range(0, len(text), 40)), ids=IDS[:2]).outcome == Read(text, ids=IDS[:2]).outcome


def test_a_number_of_a_thousand_digits_is_read_alike_in_any_pieces():
    for digits in (999, 1_000, 1_001, 4_000):
        text = f'{{"id":"1kfqzt","answer":{"7" * digits}}} ' + element(1)
        in_pieces = Read(*pieces_of(text, range(0, len(text), 40)), ids=IDS[:2])
        assert in_pieces.outcome == Read(text, ids=IDS[:2]).outcome
        assert (0 in in_pieces.answers) == (digits <= 1_000)


# --- what a hostile reply costs. Every shape once took, or could take, time in the square of its length.

HOSTILE_CHARS = 250_000
HOSTILE = {
    "open elements": ("", '{"id":"1kfqzt","answer":"'),
    "nested openings": ("", '{"id":'),
    "nested arrays of elements": ("", '{"id":['),
    "elements within open ones": ('{"id":[' * 31, '{"id":"2bcdfg","answer":"a"},'),
    "nested objects": ('{"id":"1kfqzt","answer":', '{"a":'),
    "an endless string": ('{"id":"1kfqzt","answer":"', "x}{"),
    "endless escapes": ('{"id":"1kfqzt","answer":"', "\\\\"),
    "an endless number": ('{"id":"1kfqzt","answer":', "1"),
    "an endless id": ('{"id":"', "k"),
    "blanks": ("", " "),
    "blanks within an element": ('{"id":"1kfqzt",', " "),
    "braces": ("", "{"),
    "half openings": ("", '{"id"               '),
    "strangers": ("", '{"id":"x","answer":1},'),
    "repeats": ("", '{"id":"1kfqzt","answer":"a"},'),
    "an endless list": ('{"id":"1kfqzt","answer":[', "1,"),
    "an endless object": ('{"id":"1kfqzt","answer":{', '"a":1,'),
    "openings in strings": ("", '{"id":"{\\"id\\":'),
}


@pytest.mark.parametrize("shape", HOSTILE)
def test_a_hostile_reply_costs_no_more_than_its_length(shape):
    start, rest = HOSTILE[shape]
    text = start + rest * (HOSTILE_CHARS // len(rest))
    began = time.process_time()
    read = Read(*pieces_of(text, range(0, len(text), 40)))
    assert time.process_time() - began < 2  # some 0.1 s; each of these has a way to take seconds
    assert set(read.answers) <= {0, 1}


def elements_of(names):
    return '{"results":[' + ",".join(f'{{"id":"{name}","answer":1}}' for name in names) + "]}"


@each(
    ("names", "past", "disordered"),
    [
        (IDS, False, False),
        (IDS[:3], False, False),
        (IDS[1:], False, False),
        ([*IDS, "6zzzzz"], False, True),
        ([*IDS, "6zzzzz", "7zzzzz"], True, True),
        ([*IDS, IDS[0], IDS[1]], True, True),
        ([f"{number}zzzzz" for number in range(len(IDS))], False, True),
        ([f"{number}zzzzz" for number in range(len(IDS) + 2)], True, True),
        (["8zzzzz", "9zzzzz", *IDS], False, True),
        ([*IDS[:2], "8zzzzz", "9zzzzz", "7zzzzz", *IDS[2:]], False, True),
        ([IDS[-1], *IDS[:-1]], False, True),
        ([IDS[-1], "8zzzzz", "9zzzzz", *IDS[:-1]], False, True),
    ],
)
@each("early", [True, False])
@each("size", [1, 7, 10_000])
def test_it_tells_when_a_reply_goes_on_for_nothing(names, past, disordered, early, size):
    """Two elements past those asked for, and of no use; never while some that were asked for are still coming."""
    demultiplexer, reply = Demultiplexer(IDS, [as_json] * len(IDS), early=early), elements_of(names)
    for start in range(0, len(reply), size):
        demultiplexer.feed(reply[start : start + size])
    assert demultiplexer.past_the_end is past
    assert demultiplexer.disordered is disordered


@pytest.mark.parametrize(
    ("text", "past"),
    [
        ("<think>" + elements_of(IDS) * 3 + "</think>" + elements_of(IDS), False),
        (elements_of(IDS) + "</think>" + elements_of(IDS), False),
        (elements_of(IDS) + "</think>" + elements_of([*IDS, "8zzzzz", "9zzzzz"]), True),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_drafts_in_a_thought_are_no_elements_past_the_end(text, past, size):
    demultiplexer = Demultiplexer(IDS, [as_json] * len(IDS), early=False)
    ever = False
    for start in range(0, len(text), size):
        demultiplexer.feed(text[start : start + size])
        ever = ever or demultiplexer.past_the_end
    demultiplexer.close()
    assert (ever or demultiplexer.past_the_end) == past


@each(
    "broken",
    [
        '{"id":"2bcdfg","answer":"no end}',
        '{"id":"2bcdfg","answer":{"a":}',
        '{"id":"2bcdfg"}',
        '{"id":"2bcdfg","answer":"a raw\nline"}',
        '{"id":"2bcdfg","answer":',
    ],
)
def test_what_is_shown_of_a_broken_element_holds_nothing_of_the_answers_to_others(broken):
    for pieces in ([reply(element(0), broken, element(2))], [*reply(element(0), broken, element(2))]):
        read = Read(*pieces)
        assert read.faults[1] == "malformed"
        assert read.said[1].startswith('{"id":"2bcdfg"')
        assert IDS[2] not in read.said[1]
        assert LABELS[2] not in read.said[1]
