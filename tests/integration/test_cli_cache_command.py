"""`microbatch cache`: what a cache holds is shown, exported and deleted; on SQLite and on Redis."""

from __future__ import annotations

import asyncio
import io
import json
import sqlite3
import struct
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from command_line import QUESTION, here, products  # noqa: F401 a fixture
from helpers import ask

import microbatch as mb
from microbatch.caching import entry as entries
from microbatch.caching.key import tenant_digest
from microbatch.cli.main import main
from microbatch.cli.plan import cache_at

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("here")]

HOUR, DAY = 3_600.0, 86_400.0


@pytest.fixture(params=["sqlite", "redis"])
def place(request):
    """Return where a cache may be: a file that is not there yet, an empty server."""
    return "c.sqlite" if request.param == "sqlite" else request.getfixturevalue("redis_url")


def cache(place, *words):
    return main(["cache", place, *words])


def with_cache(place, work):
    """Return what *work*, a coroutine function, does with the cache at *place*."""

    async def go():
        opened = cache_at(place)
        await opened.open()
        try:
            return await work(opened)
        finally:
            await opened.aclose()

    return asyncio.run(go())


def key(name):
    return name.encode().ljust(20, b".")


def keep(place, *kept):
    """Store entries: the name of each, its model, the tenant, the age in seconds, the size of its batch; a value as it is."""

    async def work(opened):
        secret, now = await opened.secret(), time.time()

        def value(name, model, tenant=None, age=0.0, size=1):
            digest = None if tenant is None else tenant_digest(tenant, secret)
            made = (key(name), f"text of {name}", model, now - age, now + DAY, 7, 2, 1, None, size, None, digest)
            return entries.encode(entries.Entry(*made))

        await opened.set_many(
            [(key(each[0]), each[1] if isinstance(each[1], bytes) else value(*each), DAY) for each in kept]
        )

    with_cache(place, work)


def names(place):
    async def work(opened):
        return {kept.rstrip(b".").decode() for page in [p async for p in opened.entries()] for kept, _ in page}

    return with_cache(place, work)


SEVERAL = (
    ("new", "model-a", "ann"),
    ("old", "model-a", "bob", 8 * DAY),
    ("other", "model-b", "ann", 2 * HOUR, 16),
    ("nobodys", "model-b", None, 9 * DAY),
    ("none", None),
)


# --- looking


def test_what_it_holds_is_counted(place, capsys):
    keep(place, *SEVERAL, ("broken", b"x"))
    before = time.time()
    assert cache(place, "stats", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    oldest, newest, size = (found.pop(name) for name in ("oldest_at", "newest_at", "bytes"))
    models = found.pop("models")
    assert found == {"entries": 6, "expired": 0, "unreadable": 1, "batched": 1, "tenants": 2}
    assert {name: each["entries"] for name, each in models.items()} == {"model-a": 2, "model-b": 2, "": 1}
    assert size == sum(each["bytes"] for each in models.values()) + len(key("broken")) + 1
    assert before - 9 * DAY - 60 < oldest <= before - 9 * DAY
    assert before - 60 < newest <= before
    assert cache(place) == 0
    shown = capsys.readouterr().out
    assert "model-a" in shown
    assert "1 cannot be read" in shown


def test_a_cache_that_is_empty_is_counted(redis_url, capsys):
    assert cache(redis_url, "--json") == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 0
    assert cache(redis_url) == cache(redis_url, "inspect") == cache(redis_url, "export") == 0
    assert cache(redis_url, "clear", "--yes") == cache(redis_url, "delete", "--model", "m") == 0


def test_the_newest_are_shown_or_those_that_are_named(place, capsys):
    keep(place, *((f"k{number}", "model-a", None, number) for number in range(30)), ("broken", b"x"))
    assert cache(place, "inspect", "--limit", "2") == 0
    shown = capsys.readouterr().out
    assert [name for name in range(30) if f"text of k{name}\n" in shown] == [0, 1]
    assert "2 of 31 entries" in shown
    assert cache(place, "inspect", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == [f"text of k{number}" for number in range(10)]
    assert cache(place, "inspect", key("k7").hex(), key("k29").hex().upper()) == 0
    shown = capsys.readouterr().out
    assert ("text of k7\n" in shown, "text of k29\n" in shown, "k28" in shown) == (True, True, False)
    for absent in (key("absent"), key("broken")):
        assert cache(place, "inspect", key("k7").hex(), absent.hex()) == 1
        assert f"there is no entry {absent.hex()}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (("--tenant", "ann"), {"new", "other"}),
        (("--model", "model-b"), {"other", "nobodys"}),
        (("--older-than", "7d"), {"old", "nobodys"}),
        (("--older-than", "1.5h"), {"old", "nobodys", "other"}),
        (("--older-than", "1w", "--model", "model-a"), {"old"}),
        (("--tenant", "ann", "--model", "model-b", "--older-than", "60m"), {"other"}),
        (("--tenant", "cat"), set()),
        (("--model", "model"), set()),
    ],
)
def test_those_that_are_selected_are_exported_and_deleted(place, which, expected, capsys):
    keep(place, *SEVERAL)
    assert cache(place, "export", *which) == 0
    exported = capsys.readouterr()
    assert {json.loads(line)["text"].removeprefix("text of ") for line in exported.out.splitlines()} == expected
    assert cache(place, "stats", "--json", *which) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == len(expected)
    assert cache(place, "delete", "--json", *which) == 0
    assert json.loads(capsys.readouterr().out) == {"deleted": len(expected)}
    assert names(place) == {each[0] for each in SEVERAL} - expected


def test_an_export_is_a_file_with_all_that_can_be_read(place, capsys):
    keep(place, *SEVERAL)
    assert cache(place, "export", "-o", "out.jsonl") == 0
    assert "5 entries exported to out.jsonl" in capsys.readouterr().out
    lines = {(line := json.loads(each))["text"]: line for each in Path("out.jsonl").read_text().splitlines()}
    line = lines["text of other"]
    assert (line["key"], line["model"], line["batch_size"]) == (key("other").hex(), "model-b", 16)
    assert line["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "cached_tokens": 1}
    assert lines["text of new"]["tenant"] == line["tenant"] != lines["text of old"]["tenant"]
    assert cache(place, "export", "-o", "out.jsonl") == 2
    assert "exists already" in capsys.readouterr().err
    keep(place, ("broken", b"x"))
    assert cache(place, "export", "-o", "other.jsonl", "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"exported": 5, "unreadable": 1}


def test_entries_of_earlier_releases_are_shown_for_what_they_are(place, capsys):
    earlier = entries.Entry1(key("e"), "Answer", "m", 1_700_000_000.0, None, 7, 2, 1, b'{"id":"x"}')
    keep(place, ("e", entries.encode(earlier)))
    assert cache(place, "export") == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["text"], line["batch_size"], line["tenant"], line["body"]) == ("Answer", None, None, {"id": "x"})
    assert cache(place, "inspect") == 0
    assert "asked in an unknown way" in capsys.readouterr().out


# --- deleting


def test_named_entries_are_deleted(place, capsys):
    keep(place, *SEVERAL)
    assert cache(place, "delete", key("new").hex(), key("none").hex()) == 0
    assert capsys.readouterr().out == "2 entries deleted\n"
    assert cache(place, "delete", key("new").hex(), key("old").hex()) == 1
    told = capsys.readouterr()
    assert told.out == "1 entry deleted\n"
    assert key("new").hex() in told.err
    assert names(place) == {"other", "nobodys"}


def test_everything_is_deleted_only_when_that_is_said(place, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    keep(place, *SEVERAL)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert cache(place, "clear") == 2
    assert "--yes" in capsys.readouterr().err
    for said in ("n\n", "\n", ""):
        monkeypatch.setattr(sys, "stdin", Terminal(said))
        assert cache(place, "clear") == 1
    assert len(names(place)) == 5
    monkeypatch.setattr(sys, "stdin", Terminal("Yes\n"))
    assert cache(place, "clear") == 0
    assert "5 entries deleted" in capsys.readouterr().out
    keep(place, *SEVERAL)
    assert cache(place, "clear", "--yes", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"deleted": 5}
    assert names(place) == set()


def test_a_tenant_of_a_service_is_forgotten(place):
    async def answers(batcher):
        callers = ({"tenant": "ann"}, {"tenant": "bob"}, {})
        asked = [mb.Request(ask("a"), **caller) for caller in callers]
        return [result.unwrap().route async for result in batcher.map(asked, ordered=True)]

    async def go():
        transport = mb.testing.ScriptedTransport()
        async with mb.Microbatcher(transport, cache=cache_at(place), tokens="bytes") as batcher:
            return await answers(batcher)

    assert asyncio.run(go()) == ["single"] * 3
    assert cache(place, "delete", "--tenant", "ann") == 0
    assert asyncio.run(go()) == ["single", "cache", "cache"]


def test_a_run_asks_again_what_was_deleted(place, capsys):
    products(20)

    def calls(out):
        capsys.readouterr()
        assert main(["run", "in.jsonl", "-o", out, "--cache", place, "--simulate", "--json", *QUESTION]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["upstream_calls"]

    assert (calls("1") > 0, calls("2")) == (True, 0)
    assert cache(place, "delete", "--model", "gpt-4.1-mini") == 0
    assert calls("3") > 0


# --- what is refused


@pytest.mark.parametrize("words", [(), ("export",), ("delete", "--tenant", "a"), ("clear", "--yes")])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nowhere.sqlite", "there is no cache"),
        ("nowhere/c.sqlite", "there is no cache"),
        ("empty", "there is no cache"),
        ("in.jsonl", "cannot open 'in.jsonl'"),
        ("others.sqlite", "no cache of microbatch's"),
        ("s.sqlite", "no cache of microbatch's"),
        ("127.0.0.1:6379", "looks like the address of a server"),
        ("memcached://h", "unknown scheme"),
        ("redis://127.0.0.1:1/0", "the cache cannot be used: Redis: ConnectionError"),
    ],
)
def test_a_place_without_a_cache_is_an_error_and_left_as_it_is(words, wrong, message, capsys):
    products(3)
    Path("empty").touch()
    with closing(sqlite3.connect("others.sqlite")) as db:
        db.execute("CREATE TABLE entries (id)")
        db.commit()
    assert main(["spool", "s.sqlite", "--put", "in.jsonl", *QUESTION]) == 0
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    capsys.readouterr()
    assert cache(wrong, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("microbatch cache: ")
    assert message in error
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("delete",), "delete needs keys"),
        (("delete", "xyz"), "'xyz' is no key"),
        (("delete", "6b", "--model", "m"), "not both"),
        (("stats", "6b"), "a KEY has no effect on stats"),
        (("clear", "--yes", "--tenant", "ann"), "--tenant has no effect on clear"),
        (("delete", "--model", "m", "--limit", "3"), "--limit has no effect on delete"),
        (("stats", "--yes"), "--yes has no effect on stats"),
        (("inspect", "-o", "x.jsonl"), "--output has no effect on inspect"),
        (("export", "--json"), "leave out --json"),
    ],
)
def test_arguments_without_an_effect_are_refused(place, words, message, capsys):
    keep(place, *SEVERAL)
    assert cache(place, *words) == 2
    assert message in capsys.readouterr().err
    assert len(names(place)) == 5


@pytest.mark.parametrize("age", ["7", "d", "7 y", "-1d", "1e3s", ""])
def test_an_age_has_a_unit(age, capsys):
    keep("c.sqlite", *SEVERAL)
    with pytest.raises(SystemExit):
        cache("c.sqlite", "delete", f"--older-than={age}")
    assert "90s, 30m, 12h, 7d or 2w" in capsys.readouterr().err
    assert len(names("c.sqlite")) == 5


def test_vectors_are_shown_as_vectors(place, capsys):
    vector = struct.pack("<3f", 0.5, -1.0, 123.0)
    made = (key("v"), "", "embedder", time.time(), None, 2, 0, 0, vector, 5, entries.VECTOR_KIND, None)
    broken = (key("w"), "", "embedder", time.time(), None, 2, 0, 0, b"{}{", 5, entries.VECTOR_KIND, None)

    async def work(opened):
        await opened.set_many([(each[0], entries.encode(entries.Entry(*each)), DAY) for each in (made, broken)])

    with_cache(place, work)
    assert cache(place, "inspect") == 0
    shown = capsys.readouterr().out
    assert "the vector of a text, 3 numbers" in shown
    assert cache(place, "export") == 0
    lines = {line["key"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert lines[key("v").hex()]["vector"] == [0.5, -1.0, 123.0]
    assert lines[key("v").hex()]["body"] is None
    assert "vector" not in lines[key("w").hex()]
    assert cache(place, "stats") == 0
    assert "0 answers of combined calls" in capsys.readouterr().out
