"""`microbatch spool`: files go in, what is where is told, files come out; on SQLite and on Redis."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Literal

import pytest
from command_line import QUESTION, given, here, output, products, summary  # noqa: F401 a fixture

import microbatch as mb
from microbatch.cli.main import main
from microbatch.cli.plan import spool_at
from microbatch.spool.payload import Answer, Payload
from microbatch.spool.records import Name, Stage
from microbatch.spool.sqlite import SQLiteSpool
from microbatch.testing import SimulatedEndpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("here")]

LABELS = (*QUESTION, "--system", "Sort.", "--labels", "home,other")
EMPTY = {
    "waiting_full": 0,
    "waiting_half": 0,
    "waiting_alone": 0,
    "leased": 0,
    "in_job": 0,
    "depth": 0,
    "done": 0,
    "dead": 0,
    "oldest_s": None,
    "lost": 0,
}


@pytest.fixture(params=["sqlite", "redis"])
def place(request):
    """Return where a spool may be: a file that is not there yet, an empty server that keeps what it is told."""
    return "s.sqlite" if request.param == "sqlite" else request.getfixturevalue("durable_redis").url


def spool(place, *words):
    return main(["spool", place, *words])


def put(place, *words):
    return spool(place, "--put", "in.jsonl", *words)


def figures(place, capsys):
    capsys.readouterr()
    assert spool(place, "--json") == 0
    return summary(capsys)


def exported(place, capsys, *words):
    capsys.readouterr()
    assert spool(place, "--export", "-", *words) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def with_spool(place, work):
    """Return what *work*, a coroutine function, does with the spool at *place*."""

    async def go():
        opened = spool_at(place, max_alone=3)
        await opened.open()
        try:
            return await work(opened)
        finally:
            await opened.aclose()

    return asyncio.run(go())


def answer(place, most, *, text="yes"):
    """Answer as many requests as a worker would that is given *most*."""

    async def work(opened):
        deliveries = await opened.take(Stage.FULL, most, lease=60)
        kept = Answer(text=text, answered_at=1_700_000_000.0, usage=mb.Usage(3, 2), cost_usd=0.5)
        await opened.finish([(delivery, kept.encode()) for delivery in deliveries])

    with_spool(place, work)


def fail(place, *, times=5, error="ServerError: the endpoint said 500"):
    """Let everything fail so often."""

    async def work(opened):
        for deliveries in range(times):
            taken = await opened.take(Stage.after(deliveries), 1_000, lease=60)
            await opened.give_back(taken, error=error, counted=True)

    with_spool(place, work)


# --- in


def test_a_file_is_queued_once_however_often_it_is_put(place, capsys):
    products(1_200)
    assert put(place, *LABELS) == 0
    assert capsys.readouterr().out == "1,200 items: 1,200 queued, 0 known already, 0 conflicts, 0 cannot be asked\n"
    products(1_201)
    assert put(place, *LABELS, "--json") == 0
    assert summary(capsys) == {"items": 1201, "new": 1, "known": 1200, "conflicts": 0, "failed": 0, "skipped": 0}
    assert figures(place, capsys)["waiting_full"] == 1_201


def test_what_is_queued_is_what_run_would_ask(place):
    products(1)
    assert put(place, *LABELS, "--model", "m", "--max-tokens", "9", "--temperature", "0", "--tenant", "shop") == 0
    messages = [{"role": "system", "content": "Sort."}, {"role": "user", "content": "Product: thing 0"}]
    name = Name("shop", "p0")
    expected = Payload.of(
        messages, output_type=Literal["home", "other"], model="m", max_tokens=9, temperature=0.0
    ).item(name)

    async def work(opened):
        return (await opened.take(Stage.FULL, 9, lease=60))[0].item

    item = with_spool(place, work)
    assert (item.name, item.digest, item.payload) == (expected.name, expected.digest, expected.payload)


def test_openai_batch_lines_are_queued_as_they_ask_and_need_no_model(place, capsys):
    body = {"messages": [{"role": "user", "content": "Hi."}], "n": 2, "max_completion_tokens": 7}
    given({"custom_id": "a", "body": {"model": "their own", **body}}, {"custom_id": "b", "body": body})
    assert put(place, "--model", "flag") == 0
    lines = {line["custom_id"] for line in exported(place, capsys)}
    assert lines == {"a", "b"}

    async def work(opened):
        return [Payload.decode(each.item.payload) for each in await opened.take(Stage.FULL, 9, lease=60)]

    first, second = with_spool(place, work)
    assert (first.model, second.model) == ("their own", "flag")
    assert (first.max_tokens, first.params) == (7, {"n": 2})


def test_without_a_model_the_workers_own_is_asked():
    products(1)
    assert put("s.sqlite", *QUESTION) == 0

    async def work(opened):
        return Payload.decode((await opened.take(Stage.FULL, 9, lease=60))[0].item.payload).model

    assert with_spool("s.sqlite", work) is None


def test_another_request_under_a_known_id_is_a_conflict_that_names_the_line(place, capsys):
    products(3)
    assert put(place, *QUESTION) == 0
    capsys.readouterr()
    given({"id": "new", "name": "x"}, {"id": "p1", "name": "another thing"}, {"id": "p2", "name": "thing 2"})
    assert put(place, *QUESTION, "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"items": 3, "new": 1, "known": 1, "conflicts": 1, "failed": 0, "skipped": 0}
    assert "in.jsonl, line 2: the spool holds another request under this id" in shown.err


def test_the_same_ids_of_another_tenant_are_others(place, capsys):
    products(3)
    assert put(place, *QUESTION, "--tenant", "a") == 0
    assert put(place, *QUESTION, "--tenant", "b", "--json") == 0
    assert summary(capsys)["new"] == 3
    assert [line["tenant"] for line in exported(place, capsys, "--tenant", "b")] == ["b"] * 3


def test_bad_lines_are_told_with_file_line_and_field_and_the_others_are_queued(capsys):
    given({"id": "a", "name": "x"}, "{broken", {"id": "b"}, {"id": None, "name": "y"}, {"id": "c", "name": "z"})
    assert put("s.sqlite", *QUESTION, "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"items": 5, "new": 2, "known": 0, "conflicts": 0, "failed": 3, "skipped": 0}
    for words in ('in.jsonl, line 3: the field "name" is missing', "in.jsonl, line 2: it is not JSON", 'field "id"'):
        assert words in shown.err


def test_lines_that_no_endpoint_would_take_are_bad_lines_too(capsys):
    def line(name, **body):
        return {"custom_id": name, "body": {"messages": [{"role": "user", "content": "Hi."}], **body}}

    given(line("a"), line("b", temperature="hot"), line("c", messages=["Hi."]), line("d", max_tokens=0))
    assert put("s.sqlite", "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"items": 4, "new": 1, "known": 0, "conflicts": 0, "failed": 3, "skipped": 0}
    assert "in.jsonl, line 2: temperature must be a number" in shown.err
    assert "in.jsonl, line 3: " in shown.err
    assert "in.jsonl, line 4: max_tokens must be" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--put", "missing.jsonl", *QUESTION), "cannot read 'missing.jsonl'"),
        (("--put", "in.jsonl"), 'no line has a "body"'),
        (("--put", "in.jsonl", "--template", "{title}"), 'no line has the field "title"'),
        (("--put", "in.jsonl", "--labels", "a,b"), "--labels needs a --template"),
        (("--put", "in.jsonl", *QUESTION, "--schema", "odd.json"), "--schema odd.json"),
        ((), "there is no spool 's.sqlite'; microbatch spool s.sqlite --put INPUT.jsonl makes one"),
        (("--dead",), "there is no spool"),
        (("--requeue",), "there is no spool"),
        (("--export", "out.jsonl"), "there is no spool"),
        (("--template", "{name}"), "--template says what is asked; it needs --put"),
        (("--export", "-", "--max-tokens", "3"), "--max-tokens says what is asked"),
    ],
)
def test_a_wrong_setting_is_named_and_no_spool_is_made(words, message, capsys):
    products(2)
    Path("odd.json").write_text('{"type": 5}')
    assert spool("s.sqlite", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("microbatch spool: ")
    assert message in error
    assert not Path("s.sqlite").exists()
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize("words", [("--until-empty",), ("--provider-batch", "--until-empty"), ("--max-alone", "2")])
def test_a_worker_makes_no_spool(words, capsys):
    assert main(["worker", "typo.sqlite", "--simulate", *words]) == 2
    assert "microbatch worker: there is no spool 'typo.sqlite'" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_putting_says_that_it_has_made_a_spool(capsys):
    products(2)
    assert put("s.sqlite", *QUESTION) == 0
    assert "made the spool 's.sqlite'" in capsys.readouterr().err
    assert put("s.sqlite", *QUESTION) == 0
    assert "made" not in capsys.readouterr().err


def test_a_file_that_is_no_spool_is_left_alone(capsys):
    products(2)
    before = Path("in.jsonl").read_bytes()
    assert spool("in.jsonl") == 2
    assert "cannot open 'in.jsonl'" in capsys.readouterr().err
    assert Path("in.jsonl").read_bytes() == before


@pytest.mark.parametrize("words", [(), ("--put", "in.jsonl", *QUESTION)])
@pytest.mark.parametrize("address", ["redis+sentinel://h/0", "memcached://h", "127.0.0.1:6379"])
def test_what_is_no_address_of_a_server_that_is_taken_makes_no_file(words, address, capsys):
    products(2)
    assert spool(address, *words) == 2
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--put", "in.jsonl", *QUESTION)])
@pytest.mark.parametrize("scheme", ["redis", "valkey"])
def test_a_server_that_is_not_there_is_told(words, scheme, capsys):
    products(2)
    assert spool(f"{scheme}://127.0.0.1:1/0", *words) == 2
    error = capsys.readouterr().err
    assert "the spool cannot be used: Redis" in error
    assert "Traceback" not in error


def test_a_server_that_may_lose_what_it_is_given_is_warned_of(redis_url, caplog):
    products(2)
    with caplog.at_level(logging.WARNING):
        assert put(redis_url, *QUESTION) == 0
    assert "appendonly" in caplog.text


def test_a_spool_that_cannot_be_written_keeps_what_it_has_and_the_same_command_goes_on(monkeypatch, capsys):
    products(1_200)
    written = 0

    async def full(self, items, real=SQLiteSpool.put):
        nonlocal written
        written += len(items)
        if written > 500:
            raise mb.StorageError("s.sqlite: database or disk is full")
        return await real(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(SQLiteSpool, "put", full)
        assert put("s.sqlite", *QUESTION, "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["new"] == 500
    assert "database or disk is full" in shown.err
    assert "run the same command again" in shown.err
    assert put("s.sqlite", *QUESTION, "--json") == 0
    assert summary(capsys) == {"items": 1200, "new": 700, "known": 500, "conflicts": 0, "failed": 0, "skipped": 0}


def test_ctrl_c_keeps_what_is_queued_and_the_same_command_goes_on(monkeypatch, capsys):
    products(1_200)

    async def interrupted(self, items, real=SQLiteSpool.put):
        outcomes = await real(self, items)
        signal.raise_signal(signal.SIGINT)
        return outcomes

    with monkeypatch.context() as patch:
        patch.setattr(SQLiteSpool, "put", interrupted)
        assert put("s.sqlite", *QUESTION, "--json") == 130
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith("Stopped. ")
    assert "Traceback" not in shown.err
    assert put("s.sqlite", *QUESTION, "--json") == 0
    told = summary(capsys)
    assert told["known"] >= 500
    assert told["known"] + told["new"] == 1_200


# --- what is where


def test_the_figures_tell_what_is_where(place, capsys):
    products(10)
    assert put(place, *QUESTION) == 0
    answer(place, 3)
    with_spool(place, lambda opened: opened.take(Stage.FULL, 2, lease=60))
    told = figures(place, capsys)
    assert 0 <= told["oldest_s"] < 30
    assert told | {"oldest_s": None} == EMPTY | {"waiting_full": 5, "leased": 2, "depth": 7, "done": 3}
    fail(place, times=1)
    assert spool(place) == 0
    shown = capsys.readouterr().out
    rows = dict(re.findall(r"^(\S.*?) {2,}([\d,]+)$", shown, re.MULTILINE))
    assert rows == {
        "waiting for a full batch": "0",
        "waiting for half a batch, after a failure": "5",
        "waiting to go alone, after two": "0",
        "with a worker": "2",
        "at the provider, in a batch job": "0",
        "all still to be answered": "7",
        "answered": "3",
        "dead letters": "0",
    }
    assert re.search(r"The oldest of those still to be answered was put \d+\.\d s ago\.", shown)
    assert "--requeue" not in shown


def test_a_spool_with_nothing_in_it_has_no_oldest(place, capsys):
    products(1)
    assert put(place, *QUESTION) == 0
    answer(place, 1)
    assert figures(place, capsys) == EMPTY | {"done": 1}
    assert spool(place) == 0
    assert "oldest" not in capsys.readouterr().out


def test_dead_letters_are_pointed_to(place, capsys):
    products(2)
    assert put(place, *QUESTION) == 0
    fail(place)
    capsys.readouterr()
    assert spool(place) == 0
    assert "--dead shows why they died, --requeue puts them back." in capsys.readouterr().out


def test_who_looks_for_whose_requests_is_told_that_figures_are_of_all(capsys):
    products(1)
    assert put("s.sqlite", *QUESTION) == 0
    assert spool("s.sqlite", "--tenant", "a") == 2
    assert "--tenant needs --put, --dead, --requeue or --export" in capsys.readouterr().err


# --- dead letters


@pytest.fixture
def with_dead(place, capsys):
    """Return a place with four dead letters: a and b of nobody, b and c of a tenant; and one request that waits."""
    given({"id": "a", "name": "x"}, {"id": "b", "name": "y"})
    assert put(place, *QUESTION) == 0
    given({"id": "b", "name": "y"}, {"id": "c", "name": "z"})
    assert put(place, *QUESTION, "--tenant", "shop") == 0
    fail(place, error="BadRequest: the endpoint does not like this prompt, and says so in more words than fit a line")
    given({"id": "waits", "name": "w"})
    assert put(place, *QUESTION) == 0
    capsys.readouterr()
    return place


def test_dead_letters_are_listed_with_what_they_died_of(with_dead, capsys):
    assert spool(with_dead, "--dead") == 0
    shown = capsys.readouterr().out
    head = r"^\w( of tenant shop)?: dead since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, asked 5 times$"
    assert len(re.findall(head, shown, re.MULTILINE)) == 4
    assert "c of tenant shop: dead since " in shown
    assert "    BadRequest: the endpoint does not like this prompt, and says so in more" in shown
    assert shown.endswith("\n4 dead letters\n")
    assert max(map(len, shown.splitlines())) <= 80


def test_dead_letters_of_a_tenant_are_listed_as_json(with_dead, capsys):
    assert spool(with_dead, "--dead", "--json", "--tenant", "shop") == 0
    letters = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(letter["custom_id"], letter["tenant"], letter["deliveries"]) for letter in letters] == [
        ("b", "shop", 5),
        ("c", "shop", 5),
    ]
    assert letters[0].keys() == {"custom_id", "tenant", "deliveries", "error", "died_at"}
    assert letters[0]["error"].startswith("BadRequest: ")
    assert time.time() - 60 < letters[0]["died_at"] <= time.time()


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ((), set()),
        (("--tenant", "shop"), {(None, "a"), (None, "b")}),
        (("a", "b"), {("shop", "b"), ("shop", "c")}),
        (("b", "--tenant", "shop"), {(None, "a"), (None, "b"), ("shop", "c")}),
    ],
)
def test_dead_letters_are_put_back_all_or_those_that_are_named(with_dead, words, left, capsys):
    assert spool(with_dead, "--requeue", *words, "--json") == 0
    assert summary(capsys) == {"requeued": 4 - len(left), "not_dead": {}}
    assert spool(with_dead, "--dead", "--json") == 0
    letters = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(letter["tenant"], letter["custom_id"]) for letter in letters} == left
    assert figures(with_dead, capsys)["waiting_full"] == 5 - len(left)


def test_ids_that_are_no_dead_letters_are_told_with_what_they_are(with_dead, capsys):
    given({"id": "done", "name": "x"})
    answer(with_dead, 1, text="that was the one that waits")
    assert put(with_dead, *QUESTION) == 0
    capsys.readouterr()
    assert spool(with_dead, "--requeue", "a", "waits", "done", "unheard-of", "c") == 1
    shown = capsys.readouterr()
    assert shown.out == "1 dead letter put back\n"
    assert shown.err.splitlines() == [
        "waits is no dead letter: it is answered",
        "done is no dead letter: it is waiting to be asked already",
        "unheard-of is no dead letter: the spool knows no such id",
        "c is no dead letter: the spool knows no such id",  # it is the tenant's
    ]
    assert spool(with_dead, "--requeue", "unheard-of", "--json") == 1
    assert summary(capsys) == {"requeued": 0, "not_dead": {"unheard-of": "unknown"}}


def test_a_request_whose_last_worker_died_is_a_dead_letter_too(place, capsys):
    products(1)
    assert put(place, *QUESTION) == 0
    fail(place, times=4)
    with_spool(place, lambda opened: opened.take(Stage.ALONE, 1, lease=0.001))
    end = time.monotonic() + 10
    while figures(place, capsys)["leased"]:
        assert time.monotonic() < end
    assert figures(place, capsys)["dead"] == 1
    assert spool(place, "--requeue", "p0") == 0
    assert capsys.readouterr().out == "1 dead letter put back\n"


def test_more_chances_are_given_where_the_workers_give_them(place, capsys):
    products(1)
    assert put(place, *QUESTION) == 0
    fail(place, times=4)
    with_spool(place, lambda opened: opened.take(Stage.ALONE, 1, lease=0.001))
    end = time.monotonic() + 10
    while figures(place, capsys)["leased"]:
        assert time.monotonic() < end
    assert spool(place, "--dead", "--max-alone", "9") == 0
    assert capsys.readouterr().out == "0 dead letters\n"


def test_where_nothing_is_dead_nothing_is_put_back(place, capsys):
    products(1)
    assert put(place, *QUESTION) == 0
    capsys.readouterr()
    assert spool(place, "--requeue") == 0
    assert capsys.readouterr().out == "0 dead letters put back\n"


# --- out


def test_everything_that_is_kept_is_exported(place, capsys):
    products(4)
    assert put(place, *QUESTION) == 0
    fail(place)
    products(7)
    assert put(place, *QUESTION) == 0
    answer(place, 2, text='{"n": 1}')
    lines = {line["custom_id"]: line for line in exported(place, capsys)}
    assert {name: line["state"] for name, line in lines.items()} == {
        **{f"p{number}": "dead" for number in range(4)},
        "p4": "done",
        "p5": "done",
        "p6": "waiting",
    }
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0, "estimated": False}
    usage |= {"cache_write_tokens": 0, "reasoning_tokens": 0}
    assert list(lines["p4"].items()) == [
        ("custom_id", "p4"),
        ("tenant", None),
        ("state", "done"),
        ("output", '{"n": 1}'),
        ("error", None),
        ("deliveries", 1),
        ("usage", usage),
        ("cost_usd", 0.5),
        ("answered_at", 1_700_000_000.0),
        ("model", None),
    ]
    assert (lines["p0"]["error"], lines["p0"]["deliveries"]) == ("ServerError: the endpoint said 500", 5)
    assert lines["p6"] == dict.fromkeys(lines["p4"]) | {"custom_id": "p6", "state": "waiting", "deliveries": 0}


def test_an_export_says_which_model_gave_each_answer(place, capsys):
    for number, model in ((4, "model-a"), (8, "model-b")):
        products(number)
        assert put(place, *LABELS) == 0
        assert main(["worker", place, "--simulate", "--until-empty", "--model", model]) == 0
    products(9)
    assert put(place, *LABELS) == 0
    lines = exported(place, capsys)
    assert [line["model"] for line in lines] == ["model-a"] * 4 + ["model-b"] * 4 + [None]


def test_an_export_is_told_and_never_overwrites_anything(capsys):
    products(4)
    assert put("s.sqlite", *QUESTION) == 0
    answer("s.sqlite", 3)
    capsys.readouterr()
    assert spool("s.sqlite", "--export", "out.jsonl") == 0
    assert capsys.readouterr().out == "4 requests exported to out.jsonl, 3 answered, 1 waiting\n"
    before = Path("out.jsonl").read_bytes()
    assert len(output()) == 4
    assert spool("s.sqlite", "--export", "out.jsonl") == 2
    assert spool("s.sqlite", "--export", "s.sqlite") == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("out.jsonl").read_bytes() == before
    assert spool("s.sqlite", "--export", "other.jsonl", "--json") == 0
    assert summary(capsys) == {"exported": 4, "damaged": 0, "states": {"done": 3, "waiting": 1}}
    assert not list(Path().glob("*.new"))


@pytest.mark.parametrize("words", [("nowhere/out.jsonl",), ("-", "--json")])
def test_an_export_that_cannot_be_written_is_told(words, capsys):
    products(1)
    assert put("s.sqlite", *QUESTION) == 0
    assert spool("s.sqlite", "--export", *words) == 2
    assert words[0] in capsys.readouterr().err


def test_an_export_that_breaks_off_leaves_nothing(monkeypatch, capsys):
    products(3)
    assert put("s.sqlite", *QUESTION) == 0

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert spool("s.sqlite", "--export", "out.jsonl") == 1
    assert "cannot write 'out.jsonl': No space left on device" in capsys.readouterr().err
    assert not list(Path().glob("out*"))


def test_an_answer_that_cannot_be_read_any_more_costs_only_itself(capsys):
    products(3)
    assert put("s.sqlite", *QUESTION) == 0
    answer("s.sqlite", 3)
    with closing(sqlite3.connect("s.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE results SET result = x'7b' WHERE id = (SELECT min(id) FROM results)")
    assert spool("s.sqlite", "--export", "out.jsonl") == 1
    assert "1 answer cannot be read any more; the export has an error in place of each" in capsys.readouterr().err
    lines = output()
    assert [line["output"] for line in lines] == [None, "yes", "yes"]
    assert "damaged" in lines[0]["error"]


def test_a_reader_that_leaves_early_is_no_reason_to_complain():
    products(20_000)
    assert put("s.sqlite", *QUESTION) == 0
    words = [sys.executable, "-m", "microbatch", "spool", "s.sqlite", "--export", "-"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 1
    assert "Traceback" not in error
    assert "Exception ignored" not in error


# --- all of it


def test_from_file_to_file_by_way_of_a_worker(place, capsys):
    products(100)
    assert put(place, *LABELS) == 0
    with_worker = ("worker", place, "--simulate", "--until-empty", "--low-max-wait", "0.1")
    assert main([*with_worker]) == 0
    assert spool(place, "--export", "out.jsonl") == 0
    lines = output()
    assert {line["custom_id"] for line in lines} == {f"p{number}" for number in range(100)}
    assert {line["output"] for line in lines} == {"home", "other"}
    assert all(line["state"] == "done" and line["usage"]["prompt_tokens"] > 0 for line in lines)
    # The same questions give the same answers, whichever way they take.
    assert main(["run", "in.jsonl", "-o", "run.jsonl", *LABELS, "--simulate"]) == 0
    assert {line["custom_id"]: line["output"] for line in lines} == {
        line["custom_id"]: line["output"] for line in output("run.jsonl")
    }


async def test_what_was_put_from_the_shell_is_found_from_python(capsys):
    products(3)
    assert await asyncio.to_thread(put, "s.sqlite", *LABELS) == 0
    assert (
        await asyncio.to_thread(main, ["worker", "s.sqlite", "--simulate", "--until-empty", "--low-max-wait", "0.1"])
        == 0
    )
    async with (
        SimulatedEndpoint() as endpoint,
        mb.Microbatcher(
            mb.OpenAIChat("m", base_url=endpoint.base_url), spool=mb.SQLiteSpool("s.sqlite"), tokens="bytes"
        ) as batcher,
    ):
        reply = await batcher.result("p1", output_type=Literal["home", "other"], timeout=5)
    assert reply.output in ("home", "other")


@pytest.mark.parametrize("words", [("a.csv", "b.jsonl", "c.json"), ("a.csv", "--put", "b.jsonl", "c.json")])
def test_the_records_of_all_files_are_queued(capsys, words):
    Path("a.csv").write_text("id,name\n1,x\n2,y\n")
    given({"id": 3, "name": "z"}, {"name": "without an id"}, path="b.jsonl")
    Path("c.json").write_text('[{"id": 4, "name": "v"}]')
    assert spool("s.sqlite", "--put", *words, *QUESTION) == 0
    assert sorted(line["custom_id"] for line in exported("s.sqlite", capsys)) == ["1", "2", "3", "4", "b.jsonl:2"]
    given({"id": 1, "name": "w"}, path="b.jsonl")
    assert spool("s.sqlite", "--put", *words, *QUESTION) == 2
    assert "a.csv, row 1 and b.jsonl, line 1 have the same id '1'" in capsys.readouterr().err
