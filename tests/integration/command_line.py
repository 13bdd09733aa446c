"""What the tests of commands have in common: files, a server, and what was written."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from microbatch.testing.reading import EndpointError

QUESTION = ("--template", "Product: {name}")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Let the test work in a folder of its own, without a key or an endpoint of the developer's."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def given(*lines, path="in.jsonl"):
    Path(path).write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def products(count):
    given(*({"id": f"p{number}", "name": f"thing {number}"} for number in range(count)))


def output(path="out.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def summary(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def summary_with_reuse(capsys):
    """Return the summary of a run with --json, and what the words beside it say did not have to be asked."""
    shown = capsys.readouterr()

    def figure(words):
        found = re.search(words, shown.err)
        return int(found[1].replace(",", "")) if found else 0

    reused = {"cache_hits": figure(r"cache: ([\d,]+) of"), "shared": figure(r"shared: ([\d,]+) item")}
    return json.loads(shown.out.splitlines()[-1]) | reused


def refuse(endpoint, when, code=500):
    """Let *endpoint* answer with the status *code* whenever `when(text of the prompt)` holds; return the texts of all prompts."""
    asked, real = [], endpoint.read

    def read(body):
        asked.append(body["messages"][-1]["content"])
        if when(asked[-1]):
            raise EndpointError(code, "no")
        return real(body)

    endpoint.read = read
    return asked


def outage(count, after=0):
    """Return a condition for `refuse` that holds for *count* calls, after so many that it does not hold for."""
    calls = itertools.count()
    return lambda _: after <= next(calls) < after + count
