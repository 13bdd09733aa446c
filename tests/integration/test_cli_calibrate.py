"""`microbatch calibrate` against a simulated endpoint that is wrong in large batches: what a user sees, and what ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_line import given, here, outage, products, refuse  # noqa: F401 a fixture
from helpers import serving
from ports import free_port

from microbatch.audit.means import least_count
from microbatch.cli.main import main
from microbatch.testing import Latency, Mistakes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("here")]

LABELS = ("--labels", "red,green,blue,grey,black,white")
QUICK = ("--max-excess", "0.1", "--sizes", "2,4,8")
LEAST = least_count(0.1)
ITEMS = 60


@pytest.fixture(autouse=True)
def short_rests(monkeypatch):
    monkeypatch.setattr("microbatch.spool.endpoint.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("microbatch.spool.endpoint.LONGEST_PAUSE", 0.1)


def calibrate(endpoint, *words, status=0):
    where = endpoint if isinstance(endpoint, str) else endpoint.base_url
    flags = ["--template", "Product: {name}", "--model", "gpt-4.1-mini", "--base-url", where]
    assert main(["calibrate", "in.jsonl", *flags, *words]) == status


def told(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def wrong_from(size, **options):
    return serving(mistakes=Mistakes(by_size={size: 0.5}), **options)


def test_it_recommends_the_largest_size_that_does_no_harm(capsys):
    products(ITEMS)
    with wrong_from(8) as endpoint:
        calibrate(endpoint, *LABELS, *QUICK)
        calls, tokens = endpoint.calls, endpoint.prompt_tokens + endpoint.completion_tokens
    shown = capsys.readouterr().out
    assert "\nRecommended: --max-batch-size 4. Because of combining at most " in shown
    assert max(map(len, shown.splitlines())) <= 80
    answers, costs = (part.splitlines() for part in shown.split("\n\n")[1:3])
    assert answers[0].split()[:3] == ["size", "prompts", "compared"]
    assert [row.split()[0] for row in answers[2:]] == [row.split()[0] for row in costs[2:]] == ["1", "2", "4", "8"]
    assert [row.split()[-1] for row in answers[3:]] == ["passes", "passes", "fails"]
    columns = [row.replace(",", "").split() for row in costs[2:]]
    assert sum(int(row[1]) for row in columns) == calls
    assert sum(int(row[3]) for row in columns) == tokens


def test_the_figures_as_json(capsys):
    products(ITEMS)
    with wrong_from(4) as endpoint:
        calibrate(endpoint, *LABELS, *QUICK, "--json")
    found = told(capsys)
    assert (found["recommended"], found["needed"], found["sample"], found["max_excess"]) == (2, None, ITEMS, 0.1)
    assert [(row["size"], row["outcome"]) for row in found["sizes"]] == [(2, "passes"), (4, "fails")]
    assert all(row["cost_usd"] > 0 and row["calls"] and row["seconds"] > 0 for row in [found["alone"], *found["sizes"]])


def test_if_the_smallest_size_does_harm_it_recommends_to_ask_alone(capsys):
    products(ITEMS)
    with wrong_from(2) as endpoint:
        calibrate(endpoint, *LABELS, *QUICK)
    assert "\nRecommended: ask alone (--single). Batches of 2 change " in capsys.readouterr().out


def test_it_says_so_if_an_item_costs_more_in_batches_and_a_warning_about_that_names_the_size(capsys, caplog):
    products(ITEMS)
    with serving() as endpoint:
        calibrate(endpoint, *LABELS, "--max-excess", "0.1", "--sizes", "2")
    shown = " ".join(capsys.readouterr().out.split())
    assert [message[:15] for message in caplog.messages] == ["size 2: combini"]
    assert "Recommended: --max-batch-size 2." in shown
    assert "But 1,000 items cost $" in shown


@pytest.mark.parametrize("items", [1, LEAST - 1])
def test_too_small_a_sample_is_told_before_anything_is_sent(items, capsys):
    products(items)
    with serving() as endpoint:
        calibrate(endpoint, *LABELS, *QUICK, status=1)
        calibrate(endpoint, *LABELS, *QUICK, "--sample", "20", "--json", status=1)
        assert endpoint.calls == 0
    shown = capsys.readouterr()
    assert f"10 %, {LEAST} are needed" in " ".join(shown.out.split())
    assert "Nothing was sent." in shown.out
    assert json.loads(shown.out.splitlines()[-1])["needed"] == LEAST


def test_equal_lines_count_once(capsys):
    given(*({"id": f"p{number}", "name": f"thing {number % 50}"} for number in range(200)))
    with serving() as endpoint:
        calibrate(endpoint, *LABELS, *QUICK, "--json")
        assert endpoint.single_calls == 100
    assert told(capsys)["sample"] == 50


def test_long_answers_cannot_be_compared_and_that_is_told_after_one_asking(capsys):
    products(ITEMS)
    with serving(answer=lambda text, schema: "word " * 20) as endpoint:
        calibrate(endpoint, *QUICK, status=1)
        assert endpoint.calls == ITEMS
    shown = " ".join(capsys.readouterr().out.split())
    assert f"The answers to {ITEMS} of {ITEMS} items cannot be compared" in shown
    assert "same=" in shown
    assert "Recommended" not in shown


@pytest.mark.parametrize("limit", [("--max-batch-tokens", "400"), ("--max-latency", "0.3")])
def test_a_size_that_cannot_be_reached_is_told_with_the_limits_that_may_be_the_reason(limit, capsys):
    products(ITEMS)
    with serving(latency=Latency(first_token=0.02, tokens_per_second=500)) as endpoint:
        calibrate(endpoint, *LABELS, "--max-excess", "0.1", "--sizes", "2,32", *limit)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Recommended: --max-batch-size 2." in shown
    assert "Batches of 32 were not reached" in shown
    assert limit[0] in shown


def test_a_size_for_which_too_few_items_have_the_same_instructions_is_told(capsys):
    def line(number):
        messages = [{"role": "system", "content": f"Lane {number % 3}."}, {"role": "user", "content": f"{number}"}]
        url = "/v1/chat/completions"
        return {"custom_id": f"p{number}", "method": "POST", "url": url, "body": {"model": "m", "messages": messages}}

    given(*map(line, range(ITEMS)))
    with serving(answer=lambda text, schema: "a" * (70 if int(text) < 20 else 7)) as endpoint:
        words = ["calibrate", "in.jsonl", "--base-url", endpoint.base_url, "--max-excess", "0.1", "--sizes", "4,32"]
        assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Recommended: --max-batch-size 4." in shown
    assert "Batches of 32 were not reached: so many items of the sample do not have the same instructions." in shown
    assert f"The answers to 20 of {ITEMS} items cannot be compared" in shown
    assert "nothing can be recommended" not in shown


def test_bad_lines_are_named_and_the_others_asked(capsys):
    given("{", *({"id": f"p{number}", "name": f"thing {number}"} for number in range(ITEMS)))
    with serving() as endpoint:
        calibrate(endpoint, *LABELS, *QUICK, "--json")
    shown = capsys.readouterr()
    assert "in.jsonl, line 1: " in shown.err
    assert json.loads(shown.out.splitlines()[-1])["sample"] == ITEMS


def test_neither_a_cache_nor_an_output_is_touched(capsys):
    products(ITEMS)
    with serving() as endpoint:
        calibrate(endpoint, *LABELS, *QUICK, "--cache", "c.sqlite")
        calibrate(endpoint, *LABELS, *QUICK, "--cache", "c.sqlite", "--json")
        assert endpoint.single_calls == 4 * ITEMS
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--single"], "leave out --single"),
        (["--max-batch-size", "8"], "--sizes"),
    ],
)
def test_flags_that_contradict_the_sizes_are_refused(words, message, capsys):
    products(ITEMS)
    calibrate("http://127.0.0.1:1/v1", *LABELS, *words, status=2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--sizes", "1,2"], ["--sizes", "a"], ["--sizes", ""], ["--max-excess", "1"], ["--sample", "0"]]
)
def test_wrong_values_are_refused(words):
    products(ITEMS)
    with pytest.raises(SystemExit) as ended:
        calibrate("http://127.0.0.1:1/v1", *LABELS, *words)
    assert ended.value.code == 2


# --- the endpoint


@pytest.mark.parametrize("code", [503, 404])
@pytest.mark.parametrize("after", [20, 2 * ITEMS + 20])
def test_it_waits_while_the_endpoint_does_not_answer_and_nothing_is_lost(after, code, capsys):
    """A 503 is retried by the batcher; a 404, which could be the request's own fault, ends its batch, which is asked again."""
    products(ITEMS)
    with wrong_from(8) as endpoint:
        asked = refuse(endpoint, outage(80, after=after), code)
        calibrate(endpoint, *LABELS, *QUICK, "--json")
        assert len(asked) > 40
    found = told(capsys)
    assert found["recommended"] == 4
    assert found["failed"] == sum(row["failed"] for row in found["sizes"]) == 0


def test_an_endpoint_that_never_answers_is_given_up(capsys):
    products(ITEMS)
    with serving() as endpoint:
        refuse(endpoint, lambda _: True, 503)
        calibrate(endpoint, *LABELS, *QUICK, "--give-up-after", "0.5", status=1)
    shown = capsys.readouterr()
    assert "microbatch calibrate: ServerError: " in shown.err
    assert "Recommended" not in shown.out


@pytest.mark.parametrize("code", [401, 404])
def test_a_refusal_of_everything_ends_it_at_once(code, capsys):
    products(ITEMS)
    with serving() as endpoint:
        asked = refuse(endpoint, lambda _: True, code)
        calibrate(endpoint, *LABELS, *QUICK, status=1)
        assert len(asked) <= 2 * ITEMS
    assert "microbatch calibrate: " in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_shows_the_sizes_that_were_tried(number, capsys):
    products(ITEMS)
    sized = threading.Event()

    def answer(text, schema):
        if sized.is_set():
            os.kill(os.getpid(), number)
            sized.clear()
        return "red"

    with serving(answer=answer) as endpoint:
        real = endpoint.read

        def read(body):
            if body["messages"][-1]["content"].count("Product: ") == 4 and not done:
                done.append(True)
                sized.set()
            return real(body)

        done = []
        endpoint.read = read
        calibrate(endpoint, *LABELS, *QUICK, status=130)
    shown = capsys.readouterr()
    assert "Stopped before the end." in shown.err
    assert "Traceback" not in shown.err
    rows = [line.split()[0] for line in shown.out.splitlines() if line[:1].isdigit() and " different " not in line]
    assert rows == ["1", "2", "1", "2"]


# --- the command of the simulated endpoint


def test_the_simulated_endpoint_can_be_told_to_be_wrong_in_large_batches(capsys):
    products(ITEMS)
    port = str(free_port())
    words = [
        "--port",
        port,
        "--first-token",
        "0",
        "--tokens-per-second",
        "0",
        "--mistakes",
        "4=0.5",
        "--mistakes",
        "8=0.6",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "microbatch", "simulate", *words, "--noise", "0.05"], stdout=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().strip()
        calibrate(address, *LABELS, *QUICK, "--json")
    finally:
        process.terminate()
        process.communicate()
    found = told(capsys)
    assert found["recommended"] in (2, None)
    assert [row["size"] for row in found["sizes"]] == [2, 4]
    assert found["sizes"][-1]["outcome"] == "fails"


@pytest.mark.parametrize("wrong", ["4", "4=", "=0.5", "0=0.5", "4=2", "four=0.5"])
def test_mistakes_that_cannot_be_read_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--mistakes", wrong])
    assert ended.value.code == 2
    assert ("must be SIZE=SHARE" in capsys.readouterr().err) == ("=" not in wrong)


def test_a_budget_that_does_not_suffice_is_told_by_its_flag(capsys):
    products(ITEMS)
    with wrong_from(8) as endpoint:
        calibrate(endpoint, *LABELS, *QUICK, "--max-cost", "0.0001", status=3)
    shown = capsys.readouterr().err
    assert "--max-cost: $0.0001 do not suffice" in shown
    assert "BudgetExceeded" not in shown
