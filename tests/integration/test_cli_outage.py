"""An endpoint that does not answer costs no item its answer: `run`, `warm` and `worker` wait for it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from command_line import QUESTION, given, here, outage, output, products, refuse, summary  # noqa: F401 a fixture
from helpers import serving

from microbatch.cli.bulk_run import BulkRun
from microbatch.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("here")]

STATUSES = (500, 503, 524, 408, 429)  # `test_outage.py` says which others are alike
PATIENCE = ("--give-up-after", "60")


@pytest.fixture(autouse=True)
def short_rests(monkeypatch):
    monkeypatch.setattr("microbatch.spool.endpoint.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("microbatch.spool.endpoint.LONGEST_PAUSE", 0.1)
    monkeypatch.setattr("microbatch.spool.worker.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("microbatch.spool.worker.LONGEST_PAUSE", 0.1)


def run(endpoint, *words, status=0):
    flags = [*QUESTION, "--model", "m", "--base-url", endpoint.base_url, "--json"]
    assert main(["run", "in.jsonl", "-o", "out.jsonl", *flags, *words]) == status


def warm(endpoint, *words, status=0):
    flags = [*QUESTION, "--model", "m", "--base-url", endpoint.base_url, "--json"]
    assert main(["warm", "in.jsonl", "--cache", "c.sqlite", *flags, *words]) == status


def worker(endpoint, *words, status=0):
    flags = ["--model", "m", "--base-url", endpoint.base_url, "--json", "--until-empty", "--low-max-wait", "0.3"]
    assert main(["worker", "s.sqlite", *flags, *words]) == status


def put(*words):
    assert main(["spool", "s.sqlite", "--put", "in.jsonl", *QUESTION, *words]) == 0


@pytest.fixture(autouse=True)
def short_retries(monkeypatch):
    from microbatch.policy import RetryPolicy

    monkeypatch.setitem(RetryPolicy.__init__.__kwdefaults__, "base", 0.05)


def counted(patch, kind, name):
    """Return a list that grows by each call of a method."""
    calls, real = [], getattr(kind, name)

    def call(self, *args):
        calls.append(args)
        return real(self, *args)

    patch.setattr(kind, name, call)
    return calls


def dead(capsys):
    capsys.readouterr()
    assert main(["spool", "s.sqlite", "--dead", "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- run


@pytest.mark.parametrize("code", STATUSES)
def test_a_run_outlasts_an_outage_and_makes_few_calls_more(code, capsys):
    products(1_600)
    with serving(answer=lambda text, _: text) as endpoint:
        refuse(endpoint, outage(12, after=20), code)
        run(endpoint, *PATIENCE)
    told = summary(capsys)
    assert (told["items"], told["answered"], told["failed"], told["unasked"]) == (1_600, 1_600, 0, 0)
    assert told["upstream_calls"] <= 100 + 12 + 4
    assert {line["custom_id"]: line["output"] for line in output()} == {
        f"p{number}": f"Product: thing {number}" for number in range(1_600)
    }


def test_an_outage_from_the_start_is_outlasted_too(capsys):
    products(200)
    with serving() as endpoint:
        refuse(endpoint, outage(15), 500)
        run(endpoint, *PATIENCE)
    assert summary(capsys)["answered"] == len(output()) == 200


def test_an_endpoint_that_comes_up_late_is_waited_for(capsys):
    products(20)
    with serving() as endpoint:
        port = int(endpoint.base_url.removesuffix("/v1").rpartition(":")[2])
    # Nothing listens there any more; the probe of the next rest finds the endpoint that is opened meanwhile.
    opened = []

    class Late:
        base_url = f"http://127.0.0.1:{port}/v1"

    def come_up(*_):
        if not opened:
            opened.append(serving(port=port))
            opened[0].__enter__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microbatch.spool.endpoint.logger.warning", come_up)
        try:
            run(Late, *PATIENCE)
        finally:
            opened[0].__exit__(None, None, None)
    assert summary(capsys)["answered"] == 20


def test_a_run_gives_up_an_endpoint_that_never_answers_and_can_be_resumed(capsys):
    products(500)
    with serving() as endpoint:
        refuse(endpoint, lambda _: True, 503)
        run(endpoint, "--give-up-after", "0.3", status=1)
        shown = capsys.readouterr()
        told = json.loads(shown.out.splitlines()[-1])
        assert (told["items"], told["answered"], told["failed"], told["unasked"]) == (500, 0, 0, 500)
        assert told["upstream_calls"] == endpoint.calls < 60
        assert output() == []
        assert "0 of 500 items answered, 0 failed, 500 left unasked" in shown.err
        assert "microbatch run: nothing was answered for" in shown.err
        assert "status 503" in shown.err
        assert shown.err.splitlines()[-1].endswith("--resume")
        del endpoint.read
        run(endpoint, "--resume")
    assert len(output()) == 500


def test_an_endpoint_that_is_not_there_is_told_once_and_writes_no_failures(capsys):
    products(200)

    class Nowhere:
        base_url = "http://127.0.0.1:9/v1"

    run(Nowhere, "--give-up-after", "0.2", status=1)
    shown = capsys.readouterr()
    assert shown.err.count("microbatch run: nothing was answered for") == 1
    assert "the last error was ConnectFailed: could not connect to 127.0.0.1:9" in shown.err
    assert "200 items left unasked." in shown.err
    assert output() == []


@pytest.mark.parametrize("code", [401, 402, 403, 404])
def test_who_is_refused_from_the_start_is_told_at_once(code, capsys):
    products(2_000)
    with serving() as endpoint:
        refuse(endpoint, lambda _: True, code)
        run(endpoint, status=1)  # would wait for ten minutes, were it an outage
        shown = capsys.readouterr()
        assert endpoint.calls <= 16
    told = json.loads(shown.out.splitlines()[-1])
    assert (told["answered"], told["failed"], told["unasked"]) == (0, 0, 2_000)
    (why,) = [line for line in shown.err.splitlines() if line.startswith("microbatch run: ")]
    assert "the endpoint refuses to answer: " in why
    assert f"status {code}" in why
    assert output() == []


def test_a_key_that_is_refused_in_mid_run_costs_no_item_its_answer(capsys):
    products(400)
    with serving() as endpoint:
        refuse(endpoint, outage(10**9, after=10), 401)
        with pytest.MonkeyPatch.context() as patch:
            probes = counted(patch, BulkRun, "_probe")
            run(endpoint, "--give-up-after", "0.5", status=1)
        assert 2 <= len(probes) <= 12  # after rests that grow to 0.1 s, though calls fail at once, unsent
        told = summary(capsys)
        assert (told["answered"], told["failed"], told["unasked"]) == (160, 0, 240)
        del endpoint.read
        run(endpoint, "--resume")
    assert len(output()) == 400


@pytest.mark.parametrize("words", [(), ("--single",)])
def test_an_item_that_fails_alone_while_others_are_answered_fails_and_takes_no_other_along(words, capsys):
    products(100)
    with serving() as endpoint:
        refuse(endpoint, lambda text: "thing 13" in text)
        run(endpoint, *PATIENCE, *words, status=1)
    told = summary(capsys)
    assert (told["answered"], told["failed"], told["unasked"]) == (99, 1, 0)
    assert [(line["custom_id"], line["error"]["status"]) for line in output() if line["error"]] == [("p13", 500)]


def test_a_file_of_one_batch_with_a_bad_item_is_answered_but_for_that(capsys):
    products(10)
    with serving() as endpoint:
        refuse(endpoint, lambda text: "thing 3" in text)
        run(endpoint, *PATIENCE, status=1)
    told = summary(capsys)
    assert (told["answered"], told["failed"], told["unasked"]) == (9, 1, 0)
    assert [line["custom_id"] for line in output() if line["error"]] == ["p3"]


def test_lines_that_are_refused_in_so_many_words_fail_at_once_and_are_no_outage(capsys):
    products(40)
    with serving() as endpoint:
        refuse(endpoint, lambda _: True, 400)
        run(endpoint, status=1)
    told = summary(capsys)
    assert (told["answered"], told["failed"], told["unasked"]) == (0, 40, 0)
    assert Counter(line["error"]["status"] for line in output()) == {400: 40}


# --- warm


def test_a_warming_outlasts_an_outage_and_gives_up_like_a_run(capsys):
    products(300)
    with serving() as endpoint:
        refuse(endpoint, outage(10, after=5), 503)
        warm(endpoint, *PATIENCE)
        told = summary(capsys)
        assert (told["asked"], told["failed"], told["stored"], told["unasked"]) == (300, 0, 300, 0)
        products(350)
        refuse(endpoint, lambda _: True, 401)
        warm(endpoint, status=1)
    shown = capsys.readouterr()
    told = json.loads(shown.out.splitlines()[-1])
    assert (told["known"], told["failed"], told["unasked"]) == (300, 0, 50)
    assert "the endpoint refuses to answer: AuthFailed" in shown.err
    assert "run the same command again" in shown.err


# --- worker


@pytest.mark.parametrize("code", [503, 429])
def test_an_outage_makes_no_dead_letters(code, capsys):
    products(400)
    put()
    capsys.readouterr()
    with serving() as endpoint:
        refuse(endpoint, outage(45, after=3), code)
        worker(endpoint)
    told = summary(capsys)
    assert (told["answered"], told["failed"], told["dead"], told["depth"]) == (400, 0, 0, 0)
    assert told["upstream_calls"] == endpoint.calls <= 25 + 45 + 5


def test_bad_requests_become_dead_letters_during_and_after_an_outage(capsys):
    products(60)
    put()
    with serving() as endpoint:
        down = outage(10, after=6)
        refuse(endpoint, lambda text: down(text) or "thing 17" in text)
        worker(endpoint, "--max-alone", "1", status=1)
    letters = dead(capsys)
    assert [letter["custom_id"] for letter in letters] == ["p17"]
    assert "status 500" in letters[0]["error"]


def test_a_worker_that_only_has_to_empty_the_spool_gives_up_in_the_end(capsys):
    products(50)
    put()
    capsys.readouterr()
    with serving() as endpoint:
        refuse(endpoint, lambda _: True, 500)
        worker(endpoint, "--give-up-after", "0.3", status=1)
        shown = capsys.readouterr()
        told = json.loads(shown.out.splitlines()[-1])
        assert (told["answered"], told["failed"], told["dead"], told["depth"]) == (0, 0, 0, 50)
        assert "nothing was answered for" in shown.err
        assert "50 requests left in the spool as they were" in shown.err
        del endpoint.read
        worker(endpoint)
    assert summary(capsys)["answered"] == 50


@pytest.mark.parametrize("code", [401, 402])
def test_a_worker_that_is_refused_from_the_start_ends_and_says_why(code, capsys):
    products(50)
    put()
    capsys.readouterr()
    with serving() as endpoint:
        refuse(endpoint, lambda _: True, code)
        worker(endpoint, status=1)
        assert endpoint.calls <= 8
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["depth"] == 50
    assert "the endpoint refuses to answer" in shown.err


def test_a_spool_whose_requests_name_no_model_is_not_touched_without_one(capsys):
    products(3)
    put("--model", "theirs")
    with serving() as endpoint:
        words = ["worker", "s.sqlite", "--base-url", endpoint.base_url, "--until-empty", "--low-max-wait", "0.3"]
        assert main(words) == 0
        given({"id": "x", "name": "y"})
        put()
        assert main(words) == 2
        assert endpoint.calls == 1
        assert "give the worker one with --model NAME" in capsys.readouterr().err
        assert main(["spool", "s.sqlite", "--json"]) == 0
        found = summary(capsys)
        assert (found["waiting_full"], found["dead"]) == (1, 0)
        assert main([*words, "--model", "m"]) == 0
    assert Path("s.sqlite").exists()
