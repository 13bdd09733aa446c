"""`microbatch run --cache`: what was ever asked is not asked again."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from command_line import QUESTION, given, here, output, products, summary, summary_with_reuse  # noqa: F401 a fixture
from helpers import serving

from microbatch.caching import guard
from microbatch.cli.main import main
from microbatch.cli.writing.output import NotWritten, OutputFile

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("here")]

LABELS = ("--labels", "home,other", "--system", "Sort.")


def run(*words, out="out.jsonl", cache="c.sqlite"):
    return main(["run", "in.jsonl", "-o", out, "--cache", cache, *words])


def outputs(path="out.jsonl"):
    return {line["custom_id"]: line["output"] for line in output(path)}


@pytest.fixture(params=["sqlite", "redis"])
def cache(request):
    """Return where a cache may be: a file that is not there yet, an empty server."""
    return "c.sqlite" if request.param == "sqlite" else request.getfixturevalue("redis_url")


@pytest.mark.parametrize("shape", [LABELS, ("--schema", "schema.json"), ()])
def test_a_second_run_asks_nothing_and_writes_the_same(cache, shape, capsys):
    products(300)
    Path("schema.json").write_text('{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}')
    assert run(*QUESTION, *shape, "--simulate", "--json", cache=cache) == 0
    first = summary_with_reuse(capsys)
    assert (first["cache_hits"], first["upstream_calls"] > 0) == (0, True)
    assert run(*QUESTION, *shape, "--simulate", "--json", cache=cache, out="again.jsonl") == 0
    second = summary_with_reuse(capsys)
    assert (second["answered"], second["failed"], second["upstream_calls"], second["cache_hits"]) == (300, 0, 0, 300)
    assert (second["prompt_tokens"], second["completion_tokens"], second["cost_usd"]) == (0, 0, 0)
    assert second["unbatched_calls"] == 300
    assert outputs("again.jsonl") == outputs()
    assert {line["route"] for line in output("again.jsonl")} == {"cache"}


def test_the_table_tells_what_came_from_the_cache(capsys):
    products(40)
    assert run(*QUESTION, "--simulate") == 0
    assert "cache: 0 of 40 found (0%), 40 stored" in capsys.readouterr().out
    assert run(*QUESTION, "--simulate", out="again.jsonl") == 0
    shown = capsys.readouterr().out
    assert "cache: 40 of 40 found (100%, " in shown
    assert " old on average), 0 stored" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith("calls")] == [
        ["calls", "0", "40", "-100", "%"]
    ]


def test_equal_lines_are_asked_once(capsys):
    given(*({"id": str(number), "name": f"thing {number % 10}"} for number in range(200)))
    assert run(*QUESTION, "--simulate", "--json") == 0
    told = summary_with_reuse(capsys)
    assert told["shared"] + told["cache_hits"] == 190
    assert len(set(outputs().values())) <= 10


@pytest.mark.parametrize(
    "other",
    [
        ("--model", "gpt-4.1"),
        ("--system", "Sort well."),
        ("--labels", "home,garden"),
        ("--max-tokens", "9"),
        ("--temperature", "0.5"),
        ("--template", "Thing: {name}"),
    ],
)
def test_who_asks_otherwise_finds_nothing(other, capsys):
    products(20)
    asked = {"--template": "Product: {name}", "--labels": "home,other", "--system": "Sort."}
    words = [word for pair in asked.items() for word in pair]
    assert run(*words, "--simulate") == 0
    capsys.readouterr()
    words = [word for pair in (asked | dict([other])).items() for word in pair]
    assert run(*words, "--simulate", "--json", out="other.jsonl") == 0
    told = summary_with_reuse(capsys)
    assert (told["cache_hits"], told["upstream_calls"] > 0) == (0, True)


def test_answers_belong_to_the_endpoint_that_gave_them(capsys):
    products(20)
    assert run(*QUESTION, "--simulate") == 0
    with serving() as endpoint:
        words = ("--model", "gpt-4.1-mini", "--base-url", endpoint.base_url, "--json")
        assert run(*QUESTION, *words, out="other.jsonl") == 0
        assert endpoint.calls > 0
        capsys.readouterr()
        before = endpoint.calls
        assert run(*QUESTION, *words, out="again.jsonl") == 0
        assert endpoint.calls == before


def test_failures_are_not_kept_and_asked_again(capsys):
    products(20)
    with serving(api_keys=["right"]) as endpoint:
        words = (*QUESTION, "--model", "m", "--base-url", endpoint.base_url, "--json")
        assert run(*words) == 1
        endpoint.api_keys = None
        assert run(*words, "--resume") == 0
        capsys.readouterr()
        assert run(*words, out="again.jsonl") == 0
    assert summary(capsys)["upstream_calls"] == 0


def test_a_run_that_is_resumed_with_a_cache_asks_the_rest_only(monkeypatch, capsys):
    products(100)
    space = 30

    def write(self, line, real=OutputFile.write):
        if self.written == space:
            raise NotWritten("cannot write 'out.jsonl': No space left on device")
        real(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "write", write)
        words = (*QUESTION, "--simulate", "--merge", "always", "--json")
        assert run(*words, "--max-concurrent-batches", "1") == 1
    capsys.readouterr()
    assert run(*words, "--resume") == 0
    told = summary_with_reuse(capsys)
    # Two of the second batch's answers were lost to the output, and not to the cache.
    assert (told["items"], told["answered"], told["cache_hits"] >= 2) == (70, 70, True)
    assert len(outputs()) == 100


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere/c.sqlite", "cannot open 'nowhere/c.sqlite'"),
        ("in.jsonl", "cannot open 'in.jsonl'"),
        ("redis://127.0.0.1:1/0", "the cache cannot be used: Redis"),
        ("redis://127.0.0.1:none/0", "malformed"),
        ("valkey://127.0.0.1:1/0", "the cache cannot be used: Redis"),
        ("redis+sentinel://127.0.0.1/0", "Sentinels are not asked"),
        ("http://127.0.0.1/", "unknown scheme http://"),
        ("127.0.0.1:6379", "looks like the address of a server"),
        ("redis:127.0.0.1", "looks like the address of a server"),
    ],
)
def test_a_cache_that_cannot_be_used_is_told_before_anything_is_paid_for(place, message, monkeypatch, capsys):
    # So the first failure counts, and not how the last one ended.
    monkeypatch.setattr(guard, "_RETRY_PAUSE", guard._CHECK_PATIENCE)
    products(3)
    with serving() as endpoint:
        assert run(*QUESTION, "--model", "m", "--base-url", endpoint.base_url, cache=place) == 2
        assert endpoint.calls == 0
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert {path.name for path in Path().iterdir()} <= {"in.jsonl", "out.jsonl", "out.jsonl.digest"}


def test_a_cache_that_dies_in_mid_run_costs_no_answer(own_redis, monkeypatch, capsys):
    monkeypatch.setattr("microbatch.cli.plan.CACHE_PATIENCE", 3.0)
    products(400)

    def write(self, line, real=OutputFile.write):
        real(self, line)
        if self.written == 20:
            own_redis.kill()

    monkeypatch.setattr(OutputFile, "write", write)
    words = ("--max-batch-size", "4", "--max-concurrent-batches", "2", "--json")
    assert run(*QUESTION, "--simulate", *words, cache=own_redis.url) == 0
    told = summary(capsys)
    assert (told["answered"], told["failed"]) == (400, 0)
    assert len(outputs()) == 400


def test_a_cache_that_another_process_holds_for_a_while_loses_no_answer(monkeypatch, capsys):
    products(400)
    words = (*QUESTION, "--simulate", "--max-batch-size", "4", "--max-concurrent-batches", "2", "--json")
    timers = []

    def hold():
        other = sqlite3.connect("c.sqlite", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        timers.append(threading.Timer(0.5, other.close))
        timers[0].start()

    def write(self, line, real=OutputFile.write):
        real(self, line)
        if self.written == 20:
            hold()

    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "write", write)
        assert run(*words) == 0
    timers[0].join()
    assert summary(capsys)["wall_s"] > 0.5
    assert run(*words, out="again.jsonl") == 0
    assert summary(capsys)["upstream_calls"] == 0


def test_what_is_kept_is_for_its_owner_only():
    products(3)
    assert run(*QUESTION, "--simulate") == 0
    assert Path("c.sqlite").stat().st_mode & 0o077 == 0


def test_openai_batch_lines_are_kept_too(capsys):
    def line(number, **body):
        messages = [{"role": "user", "content": f"thing {number}"}]
        return {"custom_id": f"r{number}", "body": {"model": "m", "messages": messages, **body}}

    given(*map(line, range(20)), line(20, n=2), line(21, seed=1))
    assert run("--simulate") == 0
    assert run("--simulate", "--json", out="again.jsonl") == 0
    assert summary(capsys)["upstream_calls"] == 0
    assert outputs("again.jsonl") == outputs()


@pytest.mark.parametrize("flag", [["--single"], ["--max-batch-size", "1"]])
def test_a_run_that_asks_alone_to_compare_is_served_no_answers_of_batches(flag, cache, capsys):
    products(40)
    assert run(*QUESTION, *LABELS, "--simulate", "--json", "--merge", "always", cache=cache) == 0
    batched = summary_with_reuse(capsys)
    assert batched["upstream_calls"] < 40
    assert run(*QUESTION, *LABELS, "--simulate", "--json", *flag, cache=cache, out="single.jsonl") == 0
    single = summary_with_reuse(capsys)
    assert (single["upstream_calls"], single["cache_hits"]) == (40, 0)
    assert run(*QUESTION, *LABELS, "--simulate", "--json", *flag, cache=cache, out="again.jsonl") == 0
    assert summary_with_reuse(capsys)["cache_hits"] == 40
