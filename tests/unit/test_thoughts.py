"""What a model thinks aloud is told from its answer, and nothing but a thought is taken away."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from helpers import each
from hypothesis import given
from hypothesis import strategies as st

from microbatch.prompt.demultiplexer import Demultiplexer
from microbatch.schema.answer_type import answer_type
from microbatch.thoughts import MARK, MARK_CHARS, after_leading_thought, after_thoughts, is_unfinished_thought

PAIRS = [
    ("<think>", "</think>"),
    ("<THINKING>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reflection>", "</reflection>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>"),
    ("Here is my thought process:", "Here is my response:"),
]
IDS = ["1kfqzt", "2bcdfg", "3hjkmn", "4pqrst"]
TEXT = answer_type(str).decode


def results(word: str, *, count: int = 4) -> str:
    return json.dumps({"results": [{"id": name, "answer": f"{word} {at}"} for at, name in enumerate(IDS[:count])]})


def right(*, count: int = 4) -> dict[int, str]:
    return {at: f"right {at}" for at in range(count)}


class Read:
    """What became of a combined reply: answers out before its end, all answers, and the demultiplexer."""

    def __init__(self, *pieces: str, early: bool = True, complete: bool = True) -> None:
        self.demultiplexer = Demultiplexer(IDS, [TEXT] * len(IDS), early=early)
        given = [answer for piece in pieces for answer in self.demultiplexer.feed(piece)]
        self.in_time = {at: text for at, (_, text) in given}
        given += self.demultiplexer.close(complete=complete)
        self.answers = {at: text for at, (_, text) in given}
        assert len(self.answers) == len(given)


# Plain texts


@pytest.mark.parametrize(("begin", "end"), PAIRS)
def test_a_leading_thought_is_taken_from_a_plain_text(begin: str, end: str) -> None:
    """With its marks and the blanks behind it."""
    assert after_leading_thought(f"\n{begin}Hm, {{oh}}.\nWell.{end}\n\nThe answer.") == "The answer."
    assert after_leading_thought(f"{begin}{end}{begin}Once more.{end} The answer.") == "The answer."
    assert after_leading_thought(f"{begin}Only this.{end}\n") == ""


@pytest.mark.parametrize("end", [end for begin, end in PAIRS if begin.startswith("<t")])
def test_a_thought_without_its_first_mark_ends_with_a_mark_on_a_line_of_its_own(end: str) -> None:
    """A mark within a line may be what the answer is about."""
    assert after_leading_thought(f"Okay, let me see.\n  {end} \n\nThe answer.") == "The answer."
    for about in (
        f"Write {end} at the end.",
        f"`{end}` ends it.\n",
        f"```\nx\n{end}\n```\nso",
        f"Use <think>\nx\n{end}\ny",
    ):
        assert after_leading_thought(about) == about


def test_a_thought_ends_with_its_own_mark() -> None:
    """A thought may speak of other marks, and an answer of its own."""
    assert after_leading_thought("<think>I need </thinking>?</think>It is </think>.") == "It is </think>."
    assert after_leading_thought("<think>x</thinking>y") == "y"


def test_gpt_oss_without_its_special_tokens_is_read() -> None:
    """Some servers drop them and leave the words between."""
    assert after_leading_thought("analysisWe need one word.assistantfinalYes") == "Yes"
    for text in ("Analysis of the market", "analysis: 1. x\n</think>y"):
        assert after_leading_thought(text) == text


@pytest.mark.parametrize("text", ["<think>", "<think> is the tag.", "analysis"])
def test_a_text_that_begins_with_a_mark_and_does_not_end_it_stays(text: str) -> None:
    """It may be the answer, unless it was cut off."""
    assert after_leading_thought(text) == text
    assert is_unfinished_thought(text) == text.startswith("<think>")


PIECES = ["a", "\n", " ", "`", "{", '"', "</think>", "<think>", "```", "analysis", "assistantfinal"]


@given(text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_nothing_but_a_beginning_is_ever_taken_away(text: str) -> None:
    """What is left is an end of the text."""
    assert text.endswith(after_leading_thought(text))


# Typed answers


DRAFT, ANSWER = '{"answer": "draft"}', '{"answer": "right"}'


@each(("begin", "end"), PAIRS)
@each(
    "text",
    [
        "{begin}Maybe {draft}?{end}{answer}",
        "Maybe {draft}?\n{end}\n```json\n{answer}\n```",
        "{draft} no.{end}{begin}or {draft}{end}So: {answer}",
        "{answer}\n{begin}{draft}{end}",
        "{answer}\n{begin}{draft}",
        "{answer}\n{end}\n",
        '{{"answer": "cut {end} {answer}',
        "{begin}{{[[ {end}{answer}",
    ],
)
def test_a_typed_answer_is_looked_for_behind_the_thoughts(begin: str, end: str, text: str) -> None:
    """Drafts have the form of the answer."""
    said = text.format(begin=begin, end=end, draft=DRAFT, answer=ANSWER)
    assert answer_type(list[str] | str).decode_single(said)[0] == "right"


@pytest.mark.parametrize("end", [end for _, end in PAIRS])
def test_a_mark_inside_a_json_string_never_counts(end: str) -> None:
    """It is a part of the answer, wherever the answer stands."""
    values = ((f"x {end} y", list[int] | str), ([f"{end}"], list[str]), ([[f'"{end}{{']], list[list[str]]))
    for value, kind in values:
        written = json.dumps(value)
        wrapped = json.dumps({"answer": value})
        for text in (wrapped, f"<think>x</think>{wrapped}", f"```json\n{wrapped}\n```", f"Well: {wrapped} Done."):
            assert answer_type(kind).decode_single(text)[0] == value
        assert after_thoughts(written) == written
        assert after_thoughts(f"hm{end}{written}") == written


def test_drafts_in_a_thought_without_an_answer_are_none() -> None:
    """A reply may end with its thought."""
    with pytest.raises(ValueError):  # noqa: PT011 the words are the decoder's
        answer_type(list[str] | str).decode_single(f"<think>{DRAFT}</think>\n")


# Combined replies


@each(("begin", "end"), PAIRS)
@each(
    "text",
    [
        "{begin}First: {draft} no.{end}\n{answer}",
        "Okay, first: {draft} hm.\n{end}\n```json\n{answer}\n```",
        "{begin}{draft}{end}{begin}{draft}{end}{answer}",
        "x {end} so {draft} y\n{end}\n{answer}",
        "{begin}{one} or {answer}? {end}{answer}",
        "{answer}\n{end}\n",
        "{answer}\n{begin}{draft}{end}\n",
        "{answer}\n{begin}{draft}",
    ],
)
@each("early", [True, False])
def test_no_draft_is_an_answer(begin: str, end: str, text: str, early: bool) -> None:
    """Whatever mark it is, whether or not there is a first one, and whether or not answers go out early."""
    said = text.format(
        begin=begin, end=end, draft=results("draft"), answer=results("right"), one=results("draft", count=1)
    )
    for pieces in ([said], list(said), [said[at : at + 7] for at in range(0, len(said), 7)]):
        read = Read(*pieces, early=early)
        assert read.answers == right()
        assert read.demultiplexer.thought
        assert not read.demultiplexer.drafts


def test_after_a_thought_answers_go_out_as_they_come() -> None:
    """The end of the thought is known, and nothing but scaffolding follows."""
    assert Read(f"<think>{results('draft')}</think>\n\n```json\n{results('right')}\n```").in_time == right()
    assert Read(f"Hm.\n</think>\n{results('right')}").in_time == right()


def test_nothing_goes_out_early_where_it_may_be_a_draft() -> None:
    """Prose may be a thought without its first mark."""
    for text in (
        f"Sure: {results('right')}",
        f"<think>hm</think>Well, {results('right')}",
        f"<think>{results('right')}",
    ):
        read = Read(text)
        assert (read.in_time, read.answers) == ({}, right())


def test_a_thought_that_begins_with_its_draft_is_known_afterwards() -> None:
    """What went out cannot be taken back, so the lane has to learn from it."""
    for text in (f"{results('draft')} no.\n</think>\n{results('right')}", f"{results('draft')}{results('right')}"):
        read = Read(text)
        assert (read.in_time, read.demultiplexer.drafts) == ({at: f"draft {at}" for at in range(4)}, True)
        assert Read(text, early=False).answers == (right() if "think" in text else {})
    same = Read(results("right") + results("right").replace(" ", "").replace("right", "right "))
    assert (same.answers, same.demultiplexer.late_duplicates, same.demultiplexer.drafts) == (right(), 4, False)


@pytest.mark.parametrize(
    "text",
    [
        "<think>First: {draft}",
        "Okay, first: {draft} hm",
        "Okay: {draft} hm\n</think>\n",
        "<think>{draft}</think>",
        "a</think>b {draft}",
    ],
)
def test_a_reply_cut_in_its_thought_has_no_answers(text: str) -> None:
    """Though they look like answers: at the token limit, what follows them was still to come."""
    read = Read(text.format(draft=results("draft")), complete=False)
    assert read.answers == {}
    assert Read(results("right"), early=False, complete=False).answers == right()


@pytest.mark.parametrize("end", [end for _, end in PAIRS])
def test_marks_in_answers_are_a_part_of_them(end: str) -> None:
    """Escaped or not, in elements of any shape."""
    said = dict.fromkeys(range(4), f"use {end} here {{")
    plain = json.dumps({"results": [{"id": IDS[at], "answer": said[at]} for at in range(4)]}, ensure_ascii=False)
    odd = json.dumps(
        {"results": [{"id": IDS[at], "why": [said[at]], "answer": said[at]} for at in range(4)], "note": said[0]}
    )
    for text in (plain, odd, f"<think>x</think>{plain}", f"{plain}\n{end}"):
        for pieces in ([text], list(text)):
            assert Read(*pieces).answers == said
            assert Read(*pieces, early=False).answers == said


PARTS = [
    *(
        "<think>",
        "</think>",
        "[THINK]",
        "[/THINK]",
        "<|channel|>final<|message|>",
        "Hm, so ",
        "\n",
        "```json\n",
        "{",
        '"',
        "</thi",
        "nk>",
    ),
    *(
        results("a"),
        results("b", count=2),
        json.dumps({"id": IDS[0], "answer": "c </think>"}),
        f'{{"id":"{IDS[1]}","answer":"cut',
    ),
]


@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=8),
    cuts=st.lists(st.integers(0, 2_000), max_size=12),
    early=st.booleans(),
    complete=st.booleans(),
)
def test_the_pieces_never_change_the_answers(parts: list[str], cuts: list[int], early: bool, complete: bool) -> None:
    """Thoughts, drafts, marks and broken elements, in any order and any pieces."""
    text = "".join(parts)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    read, other = (
        Read(*pieces, early=early, complete=complete)
        for pieces in ([text], [text[a:b] for a, b in itertools.pairwise(edges)])
    )
    mine, theirs = read.demultiplexer, other.demultiplexer
    assert (read.in_time, read.answers) == (other.in_time, other.answers)
    assert [fault[:2] for fault in mine.faults()] == [fault[:2] for fault in theirs.faults()]
    assert (mine.damaged, mine.drafts, mine.thought) == (theirs.damaged, theirs.drafts, theirs.thought)


def test_no_mark_is_longer_than_what_is_kept_for_it() -> None:
    """Or one that comes in two pieces would be missed."""
    longest = ["<|channel|>final <|constrain|> json <|message|>", "Here's my thought process:", "</thinking>"]
    for mark in [*longest, *(mark for pair in PAIRS for mark in pair)]:
        found = MARK.search(mark)
        assert found is not None
        assert len(found[0]) <= MARK_CHARS


@pytest.mark.parametrize(
    "thought",
    ["hm <thin", "{[", '{"a":"', "</think>", "<think>", '{"id":"1kfqzt","answer":"x"} ', "`", "```", "\n</think>x"],
)
def test_the_work_grows_with_the_text_and_not_faster(thought: str) -> None:
    """A thought of a megabyte is read in about a hundred times the time of ten kilobytes."""

    def spent(size: int) -> float:
        text = thought * (size // len(thought)) + "</think>" + results("right")
        best = 1e9
        for _ in range(3):
            begun = time.perf_counter()
            assert Read(*(text[at : at + 40] for at in range(0, len(text), 40)), early=False).answers in (right(), {})
            after_thoughts(text)
            after_leading_thought(text)
            best = min(best, time.perf_counter() - begun)
        return best

    small, large = spent(20_000), spent(200_000)
    assert large < 60 * small + 0.5
