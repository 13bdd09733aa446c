"""`run --resume`: every row of the output belongs to its own question, and no question is asked twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from command_line import QUESTION, given, here, output, products, summary  # noqa: F401 a fixture
from helpers import serving

from microbatch.cli.main import main

pytestmark = pytest.mark.usefixtures("here")


class Questions(list):
    """The questions that an endpoint was asked, one by one, and its address."""

    base_url = ""

    def answer(self, text, _schema):
        self.append(text)
        return f"re: {text}"


@pytest.fixture
def asked():
    """Serve an endpoint that repeats each question."""
    questions = Questions()
    with serving(answer=questions.answer) as endpoint:
        questions.base_url = endpoint.base_url
        yield questions


def run(asked, *words, question=QUESTION, path="in.jsonl", status=0):
    flags = ["--model", "m", "--base-url", asked.base_url, "--json"]
    assert main(["run", path, "-o", "out.jsonl", *question, *flags, *words]) == status


def names(*texts, path="in.jsonl"):
    """Write lines without ids."""
    given(*({"name": text} for text in texts), path=path)


def rows():
    """Return the answers by id; there is one row for each."""
    lines = output()
    assert set(Counter(line["custom_id"] for line in lines).values()) <= {1}
    assert all(line["error"] is None for line in lines)
    return {line["custom_id"]: line["output"] for line in lines}


def belong(*texts):
    """Return the rows that belong to lines without ids."""
    return {str(number): f"re: Product: {text}" for number, text in enumerate(texts, 1)}


CHANGES = {
    "a line inserted at the top": ("new a b c d", {"new"}),
    "a line inserted in the middle": ("a b new c d", {"new"}),
    "the first line removed": ("b c d", set()),
    "sorted the other way": ("d c b a", set()),
    "two lines swapped and one edited": ("b a C d", {"C"}),
    "one line edited": ("a b C d", {"C"}),
    "another file": ("w x y z q", {"w", "x", "y", "z", "q"}),
    "another file that is shorter": ("x y", {"x", "y"}),
    "a line that comes again": ("a a b c d", set()),
    "appended": ("a b c d new", {"new"}),
    "as it was": ("a b c d", set()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_without_ids_belong_to_their_lines_and_only_new_questions_are_asked(asked, change, capsys):
    texts, new = CHANGES[change]
    names(*"abcd")
    run(asked)
    asked.clear()
    names(*texts.split())
    run(asked, "--resume")
    assert rows() == belong(*texts.split())
    assert set(asked) == {f"Product: {text}" for text in new}
    capsys.readouterr()
    run(asked, "--resume")
    told = summary(capsys)
    assert (told["items"], told["upstream_calls"], told["changed"], told["reused"]) == (0, 0, 0, 0)


def test_it_is_told_how_many_changed_and_the_old_output_is_kept(asked, capsys):
    names(*"abcd")
    run(asked)
    before = Path("out.jsonl").read_bytes()
    names("new", *"abcd")
    capsys.readouterr()
    run(asked, "--resume")
    shown = capsys.readouterr()
    told = json.loads(shown.out.splitlines()[-1])
    assert (told["items"], told["answered"], told["changed"], told["reused"]) == (1, 1, 4, 4)
    assert "4 ids had the answer to another question" in shown.err
    assert "4 questions answered before under another id" in shown.err
    assert "the output as it was is now 'out.jsonl.old1'" in shown.err
    assert Path("out.jsonl.old1").read_bytes() == before
    assert Path("out.jsonl.old1.digest").read_bytes() == Path("out.jsonl.digest").read_bytes()


def test_explicit_ids_keep_their_answers_wherever_they_stand(asked):
    products(6)
    run(asked)
    asked.clear()
    lines = Path("in.jsonl").read_text().splitlines()
    given(*reversed(lines), {"id": "p9", "name": "thing 9"})
    run(asked, "--resume")
    assert asked == ["Product: thing 9"]
    assert rows() == {f"p{number}": f"re: Product: thing {number}" for number in (*range(6), 9)}


def test_a_prompt_that_changes_under_its_id_is_asked_anew_and_so_is_whatever_else_decides_the_answer(asked, capsys):
    def line(name, text, **body):
        return {"custom_id": name, "body": {"messages": [{"role": "user", "content": text}], **body}}

    kept = [line("same", "a"), line("n", "b", n=1), line("typed", "c")]
    before = [line("text", "d"), line("max", "e"), line("params", "f", user="u"), line("model", "g")]
    after = [
        line("text", "D"),
        line("max", "e", max_tokens=900),
        line("params", "f", user="v"),
        line("model", "g", model="m2"),
    ]
    given(*kept, *before)
    run(asked, question=())
    asked.clear()
    given(*after, *kept)
    capsys.readouterr()
    run(asked, "--resume", question=())
    told = summary(capsys)
    assert (told["items"], told["answered"], told["changed"]) == (4, 4, 4)
    assert sorted(asked) == ["D", "e", "f", "g"]
    assert rows() == {line["custom_id"]: f"re: {line['body']['messages'][0]['content']}" for line in (*after, *kept)}


def test_a_line_that_cannot_be_asked_about_any_more_keeps_no_answer(asked):
    given({"id": "a", "name": "x"}, {"id": "b", "name": "y"})
    run(asked)
    given({"id": "a", "title": "x"}, {"id": "b", "name": "y"})
    run(asked, "--resume", status=1)
    assert {line["custom_id"]: line["error"] is None for line in output()} == {"a": False, "b": True}


def test_what_failed_is_asked_again_and_the_last_line_of_an_id_counts(asked):
    products(3)
    run(asked)
    failed = {"custom_id": "p1", "output": None, "error": {"type": "X"}, "route": None, "usage": None, "cost_usd": None}
    with Path("out.jsonl").open("a") as file:
        file.write(json.dumps(failed) + "\n")
    asked.clear()
    run(asked, "--resume")
    assert output()[-1]["custom_id"] == "p1"
    assert output()[-1]["error"] is None
    assert asked == []  # the same question was answered before


def without_digests():
    """Write the output as a release did that kept no digests."""
    lines = [{name: value for name, value in line.items() if name != "digest"} for line in output()]
    given(*lines, path="out.jsonl")


def test_answers_that_do_not_say_to_what_are_asked_for_anew_unless_that_is_forced(asked, capsys):
    names(*"abcd")
    run(asked)
    without_digests()
    asked.clear()
    run(asked, "--resume", "--force")
    assert asked == []
    assert rows() == belong(*"abcd")
    names("new", *"abcd")
    capsys.readouterr()
    run(asked, "--resume")
    shown = capsys.readouterr()
    assert rows() == belong("new", *"abcd")
    assert len(asked) == 5
    assert json.loads(shown.out.splitlines()[-1])["changed"] == 4
    assert "4 answers of an older release, which did not record the question" in shown.err


def test_a_changed_prompt_that_is_forced_keeps_answers_by_their_ids_and_says_so(asked, capsys):
    products(4)
    run(asked)
    asked.clear()
    products(5)
    capsys.readouterr()
    run(asked, "--resume", "--force", question=("--template", "Thing: {name}"))
    assert asked == ["Thing: thing 4"]
    assert "--force: answers are kept by their ids, although --template" in capsys.readouterr().err


def test_a_changed_policy_that_is_forced_keeps_no_answer_to_another_question(asked):
    names(*"abcd")
    run(asked)
    asked.clear()
    names("new", *"abcd")
    run(asked, "--resume", "--force", "--max-batch-size", "2")
    assert asked == ["Product: new"]
    assert rows() == belong("new", *"abcd")


def test_another_model_for_all_lines_is_another_question(asked, capsys):
    names(*"ab")
    run(asked)
    run(asked, "--resume", "--model", "other", status=2)
    assert "--model (was m, is other)" in capsys.readouterr().err
    assert rows() == belong(*"ab")


def test_a_stop_between_is_no_reason_to_ask_twice(asked):
    names(*"abcd")
    run(asked)
    Path("out.jsonl.new").write_text("left over by a crash")
    asked.clear()
    names("new", *"abcd")
    run(asked, "--resume")
    assert asked == ["Product: new"]
    assert not Path("out.jsonl.new").exists()
