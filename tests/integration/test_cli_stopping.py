"""Ctrl-C: the first one lets what is under way end and keeps the answers, the second one ends at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import time

import pytest
from command_line import QUESTION, here, output, products, summary  # noqa: F401 a fixture
from helpers import serving

from microbatch.cli.bulk_run import BulkRun
from microbatch.cli.main import main
from microbatch.cli.worker import WorkerRun
from microbatch.testing import Latency

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("here")]

FEW = ("--max-concurrent-batches", "4", "--max-batch-size", "4", "--low-max-wait", "0.3", "--json")
UNDER_WAY = 4 * 4
ITEMS = 160


def interrupting(number, after):
    """Return an answer function that sends a signal to this process at one of the items that it is asked about."""
    calls = itertools.count(1)

    def answer(text, _schema):
        if next(calls) == after:
            os.kill(os.getpid(), number)
        return text

    return answer


def ask(command, endpoint, *words):
    asked = ("--model", "m", "--base-url", endpoint.base_url, *FEW)
    if command == "worker":
        return main(["worker", "s.sqlite", "--until-empty", *asked, *words])
    where = ("-o", "out.jsonl") if command == "run" else ("--cache", "c.sqlite")
    return main([command, "in.jsonl", *where, *QUESTION, *asked, *words])


def prepared(command, capsys):
    products(ITEMS)
    if command == "worker":
        assert main(["spool", "s.sqlite", "--put", "in.jsonl", *QUESTION]) == 0
    capsys.readouterr()


def answered(told):
    return told.get("answered", told.get("asked"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["run", "warm", "worker"])
def test_the_first_signal_keeps_every_answer_and_sends_nothing_more(command, number, capsys):
    prepared(command, capsys)
    latency = Latency(first_token=0.2, tokens_per_second=0)
    with serving(answer=interrupting(number, 60), latency=latency) as endpoint:
        assert ask(command, endpoint) == (0 if command == "worker" else 130)
        shown = capsys.readouterr()
        told = json.loads(shown.out.splitlines()[-1])
        assert "under way may end, and the answers are kept. Press Ctrl-C again" in shown.err
        # What the endpoint was asked has come back: no answer that was paid for is lost.
        assert answered(told) == endpoint.items <= 60 + 2 * UNDER_WAY
        assert told["upstream_calls"] == endpoint.calls
        assert ask(command, endpoint, *(["--resume"] if command == "run" else [])) == 0
        assert endpoint.items == ITEMS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["run", "warm", "worker"])
def test_the_second_signal_ends_at_once(command, number, monkeypatch, capsys):
    prepared(command, capsys)
    kind = WorkerRun if command == "worker" else BulkRun

    def stop(self, real=kind._stop):
        real(self)
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), number)

    monkeypatch.setattr(kind, "_stop", stop)
    with serving(latency=Latency(first_token=60)) as endpoint:

        def first():
            os.kill(os.getpid(), number)

        real = endpoint.read

        def read(body):
            if endpoint.calls >= 1:  # few are sent until the first answer has come
                first()
            return real(body)

        endpoint.read = read
        begun = time.monotonic()
        assert ask(command, endpoint) == 130
        assert time.monotonic() - begun < 30  # and not the minute that a call takes
    assert answered(summary(capsys)) == 0
    if command == "run":
        assert output() == []
    if command == "worker":
        assert main(["spool", "s.sqlite", "--json"]) == 0
        found = summary(capsys)
        assert (found["waiting_full"], found["leased"], found["dead"]) == (ITEMS, 0, 0)


def test_a_signal_during_an_outage_does_not_wait_for_its_end(capsys):
    prepared("run", capsys)

    class Nowhere:
        base_url = "http://127.0.0.1:9/v1"

    def stop_soon(*_):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microbatch.spool.endpoint.logger.warning", stop_soon)
        begun = time.monotonic()
        assert ask("run", Nowhere) == 130
        assert time.monotonic() - begun < 30
    told = summary(capsys)
    assert (told["answered"], told["failed"], told["unasked"]) == (0, 0, ITEMS)
