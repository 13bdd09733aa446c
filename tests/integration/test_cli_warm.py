"""`microbatch warm`: what it has asked, nobody pays for again."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from command_line import QUESTION, given, here, output, products, summary, summary_with_reuse  # noqa: F401 a fixture
from helpers import serving

from microbatch.caching import guard
from microbatch.cli import plan
from microbatch.cli.bulk_run import BulkRun
from microbatch.cli.main import main
from microbatch.cli.simulated import SimulatedChat
from microbatch.testing import Faults

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("here")]

SIMULATED = (*QUESTION, "--system", "Sort.", "--labels", "home,other", "--simulate")
FEW_AT_A_TIME = ("--max-batch-size", "4", "--max-concurrent-batches", "1")


def warm(*words, cache="c.sqlite"):
    return main(["warm", "in.jsonl", "--cache", cache, *words])


def run(*words, out="out.jsonl", cache="c.sqlite"):
    return main(["run", "in.jsonl", "-o", out, "--cache", cache, *words])


@pytest.fixture(params=["sqlite", "redis"])
def cache(request):
    """Return where a cache may be: a file that is not there yet, an empty server."""
    return "c.sqlite" if request.param == "sqlite" else request.getfixturevalue("redis_url")


def once_taken(count, act, monkeypatch):
    """Let *act* happen when *count* answers have come."""
    taken = 0

    async def settle(self, result, real=BulkRun._settle):
        nonlocal taken
        taken += result.reply is not None
        if taken == count and result.reply is not None:
            act()
        await real(self, result)

    monkeypatch.setattr(BulkRun, "_settle", settle)


def test_after_a_warming_a_run_asks_nothing(cache, capsys):
    products(300)
    assert warm(*SIMULATED, "--json", cache=cache) == 0
    told = summary_with_reuse(capsys)
    assert (told["items"], told["known"], told["asked"], told["failed"], told["stored"]) == (300, 0, 300, 0, 300)
    assert told["upstream_calls"] == told["batches"] == 19
    assert told["cost_usd"] > 0
    assert run(*SIMULATED, "--json", cache=cache) == 0
    told = summary_with_reuse(capsys)
    assert (told["answered"], told["upstream_calls"], told["cache_hits"]) == (300, 0, 300)
    assert {line["output"] for line in output()} == {"home", "other"}


def test_what_is_known_is_not_asked_again(capsys):
    products(40)
    assert warm(*SIMULATED) == 0
    assert "40 items: 0 known already, 40 asked, 0 failed, in " in capsys.readouterr().out
    products(60)
    assert warm(*SIMULATED, "--json") == 0
    told = summary(capsys)
    assert (told["items"], told["known"], told["asked"], told["stored"]) == (60, 40, 20, 20)
    assert warm(*SIMULATED) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("60 items: 60 known already, 0 asked, 0 failed, in ")
    assert len(shown.out.splitlines()) == 1
    assert shown.err == ""


def test_what_a_run_has_asked_is_known(capsys):
    products(40)
    assert run(*SIMULATED) == 0
    capsys.readouterr()
    assert warm(*SIMULATED, "--json") == 0
    assert summary(capsys)["upstream_calls"] == 0


def test_equal_lines_are_asked_once(capsys):
    given(*({"id": str(number), "name": f"thing {number % 10}"} for number in range(100)))
    assert warm(*SIMULATED, "--json") == 0
    told = summary(capsys)
    assert (told["known"], told["asked"], told["stored"]) == (90, 10, 10)


def test_openai_batch_lines_are_taken_as_they_are(capsys):
    def line(number, **body):
        messages = [{"role": "system", "content": "Sort."}, {"role": "user", "content": f"thing {number}"}]
        return {"custom_id": f"r{number}", "body": {"model": "gpt-4.1-mini", "messages": messages, **body}}

    given(*map(line, range(20)), line(20, n=2), {"custom_id": "bad", "body": {"model": "m", "messages": []}})
    with serving() as endpoint:
        assert warm("--base-url", endpoint.base_url, "--json") == 1
        shown = capsys.readouterr()
        told = json.loads(shown.out.splitlines()[-1])
        assert (told["asked"], told["failed"], told["stored"]) == (21, 1, 21)
        assert 'in.jsonl, line 22: the field "body.messages" must be a list of chat messages' in shown.err
        before = endpoint.calls
        assert run("--base-url", endpoint.base_url) == 1
        assert endpoint.calls == before


def test_bad_lines_are_told_with_file_line_and_field_and_the_others_are_asked(capsys):
    given({"id": "a", "name": "x"}, "{broken", {"id": "b"}, {"id": None, "name": "y"}, {"id": "c", "name": "z"})
    assert warm(*SIMULATED, "--json") == 1
    shown = capsys.readouterr()
    told = json.loads(shown.out.splitlines()[-1])
    assert (told["items"], told["asked"], told["failed"]) == (5, 2, 3)
    for words in ('in.jsonl, line 3: the field "name" is missing', "in.jsonl, line 2: it is not JSON", 'field "id"'):
        assert words in shown.err


def test_more_kinds_of_failures_than_anyone_reads_are_counted(capsys):
    fields = "".join(f"{{f{number}}}" for number in range(30))
    given(*({f"f{number}": "x" for number in range(30) if number != missing} for missing in range(31)))
    assert warm("--template", fields, "--simulate") == 1
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1] == "and 10 failures of other kinds"
    assert len(shown) == 21


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (QUESTION, "no model: give --model NAME"),
        ((*QUESTION, "--model", "m"), "OPENAI_API_KEY"),
        (("--simulate",), "--template"),
        ((*QUESTION, "--simulate", "--max-batch-size", "0"), "--max-batch-size"),
    ],
)
def test_a_wrong_setting_is_named_and_leaves_no_trace(words, message, capsys):
    products(2)
    assert warm(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("microbatch warm: ")
    assert message in error
    assert not Path("c.sqlite").exists()


def test_a_repeated_id_is_refused_before_anything_is_sent(capsys):
    given({"id": "a", "name": "x"}, {"id": "a", "name": "y"})
    assert warm(*SIMULATED) == 2
    assert "lines 1 and 2" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "seconds"), [((), 7 * 86_400), (("--ttl", "3600"), 3_600)])
def test_the_answers_are_good_as_long_as_they_are_told_to(words, seconds):
    products(20)
    begun = time.time()
    assert warm(*SIMULATED, *words) == 0
    with closing(sqlite3.connect("c.sqlite")) as db:
        ends = [expires for (expires,) in db.execute("SELECT expires FROM entries")]
    assert len(ends) == 20
    assert all(begun + 0.9 * seconds <= end <= time.time() + seconds for end in ends)


def test_answers_that_were_cut_off_are_not_kept_and_that_is_told(capsys):
    products(5)
    with serving() as endpoint:
        words = (*QUESTION, "--model", "m", "--base-url", endpoint.base_url)
        assert warm(*words, "--single", "--max-tokens", "2") == 0
    assert "5 answers not stored: they were cut off" in capsys.readouterr().out


def test_damaged_replies_end_in_answers_or_errors_and_only_good_ones_are_kept(capsys):
    products(120)
    with serving(faults=Faults(["missing", "broken_json", "truncated"], rate=0.3, on="combined")) as endpoint:
        words = (*QUESTION, "--labels", "a,b", "--model", "m", "--base-url", endpoint.base_url, "--json")
        warm(*words)
        told = summary_with_reuse(capsys)
        assert told["known"] + told["asked"] + told["failed"] == 120
        endpoint.faults = None
        run(*words)
    assert summary_with_reuse(capsys)["cache_hits"] == told["stored"]


def test_ctrl_c_keeps_what_is_answered_and_the_same_command_goes_on(monkeypatch, capsys):
    products(400)
    with monkeypatch.context() as patch:
        once_taken(20, lambda: signal.raise_signal(signal.SIGINT), patch)
        assert warm(*SIMULATED, *FEW_AT_A_TIME, "--json") == 130
    shown = capsys.readouterr()
    stopped = json.loads(shown.out.splitlines()[-1])
    assert 20 <= stopped["asked"] < 400
    assert shown.err.splitlines()[-1] == "Answers so far are in the cache. For the rest, run the same command again."
    assert "Traceback" not in shown.err
    assert warm(*SIMULATED, "--json") == 0
    told = summary(capsys)
    assert told["known"] + told["asked"] == 400
    assert told["known"] >= 16
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_cache_that_cannot_be_used_is_told_before_anything_is_paid_for(monkeypatch, capsys):
    # So the first failure counts, and not how the last one ended.
    monkeypatch.setattr(guard, "_RETRY_PAUSE", guard._CHECK_PATIENCE)
    products(3)
    with serving() as endpoint:
        words = (*QUESTION, "--model", "m", "--base-url", endpoint.base_url)
        assert warm(*words, cache="redis://127.0.0.1:1/0") == 2
        assert endpoint.calls == 0
    assert "the cache cannot be used: Redis" in capsys.readouterr().err


def test_a_cache_that_dies_ends_the_warming_as_there_is_nothing_left_to_pay_for(own_redis, monkeypatch, capsys):
    products(2_000)

    def die():
        own_redis.kill()
        monkeypatch.setattr(guard, "_RETRY_PAUSE", plan.CACHE_PATIENCE)  # so the first failure counts

    once_taken(20, die, monkeypatch)
    assert warm(*SIMULATED, *FEW_AT_A_TIME, "--json", cache=own_redis.url) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["asked"] < 2_000
    assert "microbatch warm: cannot use the cache any more: Redis: " in shown.err
    assert "run the same command again" in shown.err


def test_a_cache_that_dies_before_the_last_answer_is_kept_is_told(own_redis, monkeypatch, capsys):
    products(1)

    async def send(self, call, on_text, real=SimulatedChat.send):
        completion = await real(self, call, on_text)
        own_redis.kill()
        monkeypatch.setattr(guard, "_RETRY_PAUSE", plan.CACHE_PATIENCE)  # so the first failure counts
        return completion

    monkeypatch.setattr(SimulatedChat, "send", send)
    assert warm(*SIMULATED, "--json", cache=own_redis.url) == 1
    shown = capsys.readouterr()
    told = json.loads(shown.out.splitlines()[-1])
    assert (told["asked"], told["stored"]) == (1, 0)
    assert "cannot use the cache any more" in shown.err


def test_a_cache_that_comes_back_in_time_has_lost_nothing(durable_redis, monkeypatch, capsys):
    products(200)

    def restart():
        durable_redis.kill()
        durable_redis.start()

    with monkeypatch.context() as patch:
        once_taken(20, restart, patch)
        assert warm(*SIMULATED, *FEW_AT_A_TIME, cache=durable_redis.url) == 0
    capsys.readouterr()
    assert run(*SIMULATED, "--json", cache=durable_redis.url) == 0
    assert summary(capsys)["upstream_calls"] == 0


def test_progress_is_shown_where_it_is_wanted(capsys):
    products(20)
    assert warm(*SIMULATED, "--progress") == 0
    assert "20/20" in capsys.readouterr().err
