"""`microbatch run --dry-run`: what a run would ask and cost, without sending or writing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import QUESTION, given, here, products, summary  # noqa: F401 a fixture
from helpers import serving

from microbatch.cli.main import main

pytestmark = pytest.mark.usefixtures("here")

WORDS = ("garden", "chair", "of solid oak", "and two green cushions", "for rainy days", "almost new", "from 1960")
SYSTEM = "Name the kind of thing that this is, as a shop would sort it, in JSON. " * 12


def questions(count: int, **body: Any) -> None:
    """Write *count* OpenAI Batch lines of different lengths."""

    def line(number: int) -> dict[str, Any]:
        text = " ".join(WORDS[: 1 + number % len(WORDS)]) + f" no. {number}"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        return {"custom_id": f"r{number}", "body": {"model": "gpt-4.1-mini", "messages": messages, **body}}

    given(*map(line, range(count)))


def dry(capsys: Any, *words: str) -> dict[str, Any]:
    assert main(["run", "in.jsonl", "--dry-run", "--json", *words]) == 0
    return summary(capsys)


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "why": {"type": "string"}},
    "required": ["n", "why"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (products, (*QUESTION, "--system", SYSTEM, "--labels", "home,garden,other")),
        (products, (*QUESTION, "--labels", "home,garden,other", "--single")),
        (products, (*QUESTION, "--labels", "home,garden,other", "--merge", "when-cheaper")),
        (products, (*QUESTION, "--labels", "home,garden,other", "--max-batch-size", "5", "--canary")),
        (products, (*QUESTION, "--labels", "home,garden,other", "--tpm", "20000000")),
        (products, (*QUESTION, "--system", SYSTEM)),
        (questions, ()),
        (lambda count: questions(count, max_tokens=10), ()),
        (lambda count: questions(count, max_tokens=1_000), ()),
        (lambda count: questions(count, response_format=FORM), ()),
        (lambda count: questions(count, response_format={"type": "json_object"}), ()),
        (lambda count: questions(count, response_format={"type": "json_object"}, max_tokens=500), ()),
        (lambda count: questions(count, seed=7), ()),
    ],
)
def test_its_figures_are_those_of_a_simulated_run(capsys, make, words):
    make(203)
    counted = dry(capsys, *words, "--model", "gpt-4.1-mini")
    assert main(["run", "in.jsonl", "-o", "out.jsonl", "--json", "--simulate", *words]) in (0, 1)
    simulated = summary(capsys)
    for name in ("items", "answered", "failed", "upstream_calls", "batches", "alone_by_field"):
        assert counted[name] == simulated[name], name
    for name in ("prompt_tokens", "completion_tokens", "unbatched_prompt_tokens", "cost_usd", "unbatched_cost_usd"):
        assert counted[name] == pytest.approx(simulated[name], rel=0.02), name


def test_nothing_is_sent_and_nothing_written(capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    products(40)
    Path("out.jsonl").write_text('{"custom_id":"p1"}\n')
    files = {path: path.read_bytes() for path in Path().iterdir()}
    words = (*QUESTION, "--model", "gpt-4.1-mini", "-o", "out.jsonl", "--cache", "answers.sqlite", "--audit")
    with serving() as endpoint:
        for more in ((), ("--base-url", endpoint.base_url), ("--base-url", endpoint.base_url, "--resume")):
            assert main(["run", "in.jsonl", "--dry-run", *words, *more]) == 0
            assert "nothing was sent" in capsys.readouterr().out
        assert endpoint.calls == 0
    assert {path: path.read_bytes() for path in Path().iterdir()} == files


@pytest.mark.parametrize("tokens", [1, 7, 30, 400])
def test_answers_in_free_text_have_the_length_that_is_expected(capsys, tokens):
    questions(64)
    told = dry(capsys, "--single", "--expect-tokens", str(tokens))
    assert told["completion_tokens"] == 64 * tokens
    combined = dry(capsys, "--expect-tokens", str(tokens))
    assert 64 * tokens < combined["completion_tokens"] < 64 * (tokens + 25)
    assert combined["unbatched_completion_tokens"] == pytest.approx(64 * tokens, abs=64)


def test_but_no_more_than_requests_allow(capsys):
    questions(64, max_tokens=20)
    told = dry(capsys, "--expect-tokens", "400")
    assert (told["upstream_calls"], told["fallback_calls"]) == (4, 0)
    assert told["completion_tokens"] < 64 * 40


def test_it_counts_the_kinds_of_questions_and_says_what_goes_alone(capsys):
    def line(number: int, **body: Any) -> dict[str, Any]:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"thing {number}"}]
        return {"custom_id": f"r{number}", "body": {"model": "gpt-4.1-mini", "messages": messages, **body}}

    lines = [line(number) for number in range(40)]
    lines += [line(number, max_tokens=50) for number in range(40, 60)]
    lines += [line(number, model="gpt-4o-mini") for number in range(60, 80)]
    lines += [line(number, stop=["x"]) for number in range(80, 85)]
    given(*lines)
    told = dry(capsys)
    assert (told["lanes"], told["alone_by_field"]) == (3, {"stop": 5})
    assert told["singles_by_reason"]["not_combinable"] == 5
    assert main(["run", "in.jsonl", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "85 items in 3 lanes" in shown
    assert "stop: 5" in shown


def test_a_rate_limit_takes_no_time_but_the_time_is_told(capsys):
    products(1_600)
    told = dry(capsys, *QUESTION, "--model", "gpt-4.1-mini", "--rpm", "10")
    assert told["upstream_calls"] == 100
    assert 500 < told["wait_s"] < 700
    assert main(["run", "in.jsonl", "--dry-run", *QUESTION, "--model", "gpt-4.1-mini", "--rpm", "10"]) == 0
    assert "at least 9 min" in capsys.readouterr().out
    assert main(["run", "in.jsonl", "--dry-run", *QUESTION, "--model", "gpt-4.1-mini", "--single"]) == 0
    assert "rate limit" not in capsys.readouterr().out  # the time that calls take is none of a limit


def test_what_the_run_would_not_ask_about_is_told(capsys):
    given({"id": 1, "name": "x" * 500}, {"id": 2, "name": " "}, {"id": 3, "name": None}, {"id": 4, "name": "y" * 500})
    words = (*QUESTION, "--model", "gpt-4.1-mini")
    told = dry(capsys, *words)
    assert (told["items"], told["skipped"], told["unpriced_calls"]) == (2, 2, 0)
    for more, remark in (
        (("--max-cost", "0.00001"), "ends the run before all is asked"),
        (("--resume",), "the answers in the output,"),
        (("--resume", "-o", "out.jsonl"), "the answers in out.jsonl,"),
    ):
        assert main(["run", "in.jsonl", "--dry-run", *words, *more]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert remark in shown
        assert "2 records skipped" in shown
    assert main(["run", "in.jsonl", "--dry-run", *words, "--max-cost", "1"]) == 0
    assert "--max-cost" not in capsys.readouterr().out


def test_calls_without_a_price_are_told_as_a_run_tells_them(capsys):
    def line(number: int, model: str) -> dict[str, Any]:
        return {"custom_id": f"r{number}", "body": {"model": model, "messages": [{"role": "user", "content": "x"}]}}

    given(line(1, "gpt-4.1-mini"), line(2, "nobody's own"))
    assert main(["run", "in.jsonl", "--dry-run"]) == 0
    assert "1 call of unpriced models is not included in the dollars, see --prices" in capsys.readouterr().out
    given(line(1, "nobody's own"))
    assert main(["run", "in.jsonl", "--dry-run"]) == 0
    assert "The cost is unknown: there is no price for this model; see --prices FILE" in capsys.readouterr().out


def test_equal_questions_are_asked_once_where_there_is_a_cache(capsys):
    given(*({"id": number, "name": f"thing {number % 10}"} for number in range(400)))
    words = (*QUESTION, "--model", "gpt-4.1-mini", "--merge", "always")
    assert dry(capsys, *words)["upstream_calls"] == 25
    assert dry(capsys, *words, "--cache", "answers.sqlite")["upstream_calls"] < 3
    assert not Path("answers.sqlite").exists()


def test_lines_that_cannot_be_asked_are_counted_and_a_model_without_a_price_costs_an_unknown_sum(capsys):
    given({"id": "a", "name": "x"}, "{broken", {"id": "b"}, {"id": "c", "name": "z"})
    told = dry(capsys, *QUESTION, "--model", "nobody's own", "--base-url", "http://127.0.0.1:9/v1")
    assert (told["items"], told["answered"], told["failed"], told["cost_usd"]) == (4, 2, 2, None)
    assert main(["run", "in.jsonl", "--dry-run", *QUESTION, "--model", "nobody's own"]) == 0
    shown = capsys.readouterr()
    assert "2 cannot be asked" in shown.out
    assert "cost is unknown" in shown.out
    assert 'the field "name" is missing' in shown.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-o", "out.jsonl", "--expect-tokens", "9"), "--expect-tokens is for --dry-run"),
        (("--dry-run", "--labels", "a,a"), "occurs twice"),
    ],
)
def test_a_wrong_command_ends_with_2(capsys, words, told):
    products(2)
    assert main(["run", "in.jsonl", *QUESTION, "--model", "m", *words]) == 2
    assert told in capsys.readouterr().err


def test_otherwise_an_output_is_needed(capsys):
    products(2)
    with pytest.raises(SystemExit) as ended:
        main(["run", "in.jsonl", *QUESTION, "--model", "m"])
    assert ended.value.code == 2
    assert "no output: give -o" in capsys.readouterr().err
