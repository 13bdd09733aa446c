"""`run --semantic-cache` and `serve --semantic-cache`: answers to similar questions, and what the commands say of them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import aiohttp
import pytest
from command_line import given, here, output, summary  # noqa: F401 a fixture
from gateway_world import PATIENCE, sdk, serve
from helpers import serving
from similar_world import THINGS, question

from microbatch.cli.main import main

ITEMS = 240
FEW = ("--max-batch-size", "4", "--max-concurrent-batches", "2")
SIMILAR = ("--cache", "answers.sqlite", "--semantic-cache", "--embedding-model", "e", "--max-error", "0.3")


def run(endpoint, *others):
    words = ["run", "in.jsonl", "-o", "out.jsonl", "--template", "{text}", "--model", "m", *FEW, "--json", *others]
    return main([*words, "--base-url", endpoint.base_url])


def questions(count):
    given(*({"id": f"q{number}", "text": question(THINGS[number % 3], number)} for number in range(count)))


def fine(_text, _schema):
    return "fine"


@pytest.mark.usefixtures("here")
@pytest.mark.slow
def test_a_run_answers_similar_questions_from_the_cache_once_that_was_shown_to_be_right(capsys):
    questions(ITEMS)
    with serving(answer=fine) as endpoint:
        assert run(endpoint, *SIMILAR) == 0
        shown = capsys.readouterr()
    lines = output()
    assert Counter(line["custom_id"] for line in lines) == {f"q{number}": 1 for number in range(ITEMS)}
    assert {line["output"] for line in lines} == {"fine"}
    told = json.loads(shown.out.splitlines()[-1])
    assert told["similar_hits"] == sum(line["route"] == "similar" for line in lines) > 20
    assert told["similar"][0]["state"] == "proven"
    assert "similar: " in shown.err


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--semantic-cache", "--embedding-model", "e"), "--cache"),
        (("--semantic-cache", "--cache", "a.sqlite"), "--embedding-model"),
        ((*SIMILAR, "--max-error", "0"), "--max-error"),
    ],
)
def test_what_is_missing_is_named(words, named, capsys):
    questions(1)
    with serving(answer=fine) as endpoint:
        assert run(endpoint, *words) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
async def test_a_gateway_answers_similar_questions_and_shows_it(tmp_path):
    with serving(answer=fine) as upstream:
        place = tmp_path / "answers.sqlite"
        words = [
            "--upstream",
            upstream.base_url,
            "--port",
            "0",
            "--cache",
            str(place),
            *SIMILAR[2:],
            "--max-wait",
            "0.01",
        ]
        async with serve(*words) as served, sdk(served, "microbatch") as client, aiohttp.ClientSession() as session:
            routes = Counter()
            async with asyncio.timeout(PATIENCE):
                for number in range(300):
                    asked = [{"role": "user", "content": question(THINGS[number % 3], number)}]
                    raw = await client.chat.completions.with_raw_response.create(model="m", messages=asked)
                    assert raw.parse().choices[0].message.content == "fine"
                    routes[raw.headers["x-microbatch-route"]] += 1
                    if routes["similar"] >= 5:
                        break
            assert routes["similar"] >= 5
            address = served.base_url.removesuffix("/v1")
            async with session.get(f"{address}/stats") as response:
                told = await response.json()
            assert told["similar_hits"] == routes["similar"]
            async with session.get(f"{address}/metrics") as response:
                assert 'microbatch_similar_kinds{state="proven"} 1.0' in await response.text()
