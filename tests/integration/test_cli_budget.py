"""`--max-cost`: a run spends what it may, says what is left, and goes on later without asking anything twice."""

import json

import pytest
from command_line import QUESTION, given, here, output, products, summary  # noqa: F401 a fixture
from helpers import serving

from microbatch.cli.main import main
from microbatch.testing import Faults

pytestmark = [pytest.mark.slow, pytest.mark.promise(of="budget"), pytest.mark.usefixtures("here")]

TOGETHER = ("--merge", "always")  # these questions are so short that they would be cheaper alone
LABELS = ("--system", "Sort.", "--labels", "home,other", "--simulate", "--json", *TOGETHER)


def run(*words, out="out.jsonl"):
    return main(["run", "in.jsonl", "-o", out, *QUESTION, *words])


def priced(capsys, *words, out="whole.jsonl"):
    """Run without a budget, and return the summary."""
    assert run(*words, out=out) == 0
    return summary(capsys)


def test_a_twentieth_of_the_money_answers_a_twentieth_and_the_rest_follows_with_no_call_more(capsys):
    products(3_200)
    whole = priced(capsys, *LABELS)
    budget = whole["cost_usd"] / 20
    assert run(*LABELS, "--max-cost", f"{budget:.9f}") == 3
    told = capsys.readouterr()
    first = json.loads(told.out.splitlines()[-1])
    assert 0.8 * budget < first["cost_usd"] <= budget + whole["cost_usd"] / whole["upstream_calls"]
    assert first["answered"] == len(output()) == 16 * first["upstream_calls"]
    assert (first["failed"], first["unasked"]) == (0, 3_200 - first["answered"])
    assert f"{first['unasked']:,} items left unasked" in told.err
    assert "--resume" in told.err
    assert all(line["error"] is None for line in output())
    assert run(*LABELS, "--max-cost", f"{10 * budget:.9f}", "--resume") == 3
    second = summary(capsys)
    assert second["items"] == first["unasked"]
    assert second["cost_usd"] > 5 * budget
    assert run(*LABELS, "--resume", "--max-cost", "10") == 0
    third = summary(capsys)
    assert (third["items"], third["unasked"]) == (second["unasked"], 0)
    assert first["upstream_calls"] + second["upstream_calls"] + third["upstream_calls"] == whole["upstream_calls"]
    assert first["answered"] + second["answered"] + third["answered"] == 3_200
    lines = output()
    assert len(lines) == len({line["custom_id"] for line in lines}) == 3_200
    assert sum(line["cost_usd"] for line in lines) == pytest.approx(whole["cost_usd"], rel=0.01)


def test_a_budget_that_is_enough_changes_nothing_even_if_answers_of_unknown_length_are_expected_to_cost_more(capsys):
    products(200)
    words = ("--simulate", "--json")
    whole = priced(capsys, *words)
    assert run(*words, "--max-cost", f"{1.2 * whole['cost_usd'] + 0.02:.9f}") == 0
    assert summary(capsys)["answered"] == 200


def test_a_budget_that_pays_for_nothing_asks_nothing(capsys):
    products(20)
    assert run(*LABELS, "--max-cost", "0") == 3
    told = capsys.readouterr()
    figures = json.loads(told.out.splitlines()[-1])
    assert (figures["upstream_calls"], figures["answered"], figures["failed"], figures["unasked"]) == (0, 0, 0, 20)
    assert output() == []


def test_an_unpriced_model_is_refused_before_anything_is_sent(capsys):
    products(20)
    with serving() as endpoint:
        words = ("--labels", "home,other", "--base-url", endpoint.base_url, "--max-cost", "1")
        assert run(*words, "--model", "nobody-knows-it") == 2
        assert "--prices" in capsys.readouterr().err
        given(
            *(
                {"custom_id": f"{n}", "body": {"model": model, "messages": [{"role": "user", "content": f"{n}"}]}}
                for n, model in enumerate(["gpt-4.1-mini"] * 30 + ["nobody-knows-it"])
            )
        )
        assert main(["run", "in.jsonl", "-o", "b.jsonl", "--base-url", endpoint.base_url, "--max-cost", "1"]) == 2
        assert "'nobody-knows-it'" in capsys.readouterr().err
        assert endpoint.calls == 0


def test_failed_attempts_and_asking_again_are_within_the_budget(capsys):
    products(960)
    with serving(faults=Faults("missing", rate=0.2)) as endpoint:
        words = (
            "--labels",
            "home,other",
            "--model",
            "gpt-4.1-mini",
            "--base-url",
            endpoint.base_url,
            "--json",
            *TOGETHER,
        )
        whole = priced(capsys, *words)
        assert whole["fallback_calls"] > 0
        budget = whole["cost_usd"] / 4
        assert run(*words, "--max-cost", f"{budget:.9f}") == 3
        first = summary(capsys)
        assert first["cost_usd"] <= budget + whole["cost_usd"] / 60
        assert first["failed"] == 0
        assert run(*words, "--resume") == 0
    lines = output()
    assert len(lines) == len({line["custom_id"] for line in lines}) == 960
    assert all(line["error"] is None for line in lines)


def test_an_audited_run_stays_within_its_budget_too(capsys):
    products(960)
    whole = priced(capsys, *LABELS, "--audit")
    budget = whole["cost_usd"] / 4
    assert run(*LABELS, "--audit", "--max-cost", f"{budget:.9f}") == 3
    first = summary(capsys)
    assert 0.7 * budget < first["cost_usd"] <= 1.05 * budget
    assert run(*LABELS, "--audit", "--resume") == 0
    assert len({line["custom_id"] for line in output()}) == 960


def test_a_warming_stops_at_its_budget_and_goes_on_where_it_was(capsys):
    products(320)
    words = ["warm", "in.jsonl", "--cache", "answers.sqlite", *QUESTION, *LABELS]
    assert main([*words, "--max-cost", "0.002"]) == 3
    first = summary(capsys)
    assert 0 < first["asked"] < 320
    assert first["unasked"] == 320 - first["asked"]
    assert main(words) == 0
    assert summary(capsys)["known"] == first["asked"]


def test_a_calibration_ends_at_its_budget(capsys):
    products(200)
    words = ["calibrate", "in.jsonl", *QUESTION, *LABELS, "--sample", "180", "--max-cost", "0.005"]
    assert main(words) == 3
    assert "--max-cost: $0.0050 do not suffice" in capsys.readouterr().err
