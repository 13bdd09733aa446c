"""`Ask` as an actor of Ray calls it, without Ray."""

from __future__ import annotations

import asyncio
import pickle

import msgspec
import pytest

import microbatch as mb
from microbatch.ray import USAGE, Ask
from microbatch.testing import SimulatedEndpoint

numpy = pytest.importorskip("numpy")


class Size(msgspec.Struct):
    text: str
    words: int


@pytest.fixture
async def endpoint(monkeypatch):
    async with SimulatedEndpoint(answer=lambda text, _: text.upper()) as served:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-actor")
        monkeypatch.setenv("OPENAI_BASE_URL", served.base_url)
        yield served


class Asking:
    """An `Ask` that is closed in the end; Ray ends the process."""

    def __init__(self, *arguments, **settings):
        self.ask = Ask(*arguments, model="gpt-4.1-mini", **settings)

    async def __aenter__(self):
        return self.ask

    async def __aexit__(self, *_):
        await self.ask._batcher.aclose()


def names(count):
    return numpy.array([f"chair {number}" for number in range(count)])


async def test_each_row_gets_its_own_answer_and_its_share_of_the_cost(endpoint):
    async with Asking("Shout.", "{name}") as ask:
        batches = await asyncio.gather(*(ask({"name": names(100), "row": numpy.arange(100)}) for _ in range(3)))
    for batch in batches:
        assert batch["answer"] == [f"CHAIR {number}" for number in range(100)]
        assert batch["error"] == [None] * 100
        assert list(batch["row"]) == list(range(100))
    assert endpoint.calls <= 300 / 16 + 6
    assert sum(sum(batch["prompt_tokens"]) for batch in batches) == endpoint.reported.prompt_tokens
    assert sum(sum(batch["completion_tokens"]) for batch in batches) == endpoint.reported.completion_tokens


async def test_a_bad_row_is_an_error_in_its_column(endpoint):
    async with Asking("Shout.", "{name}") as ask:
        rows = names(20).astype(object)
        rows[7] = None
        rows[9] = object()
        batch = await ask({"name": rows})
    assert [error is None for error in batch["error"]] == [number != 9 for number in range(20)]
    assert batch["error"][9].startswith("ConfigError: ")
    assert batch["answer"][7] == "NULL"
    assert batch["answer"][9] is None
    assert batch["answer"][8] == "CHAIR 8"
    assert [batch[name][9] for name in USAGE] == [0, 0, 0, 0.0]


async def test_what_the_endpoint_refuses_is_an_error_of_its_row():
    async with (
        SimulatedEndpoint(context_tokens=2_000) as served,
        Asking("Shout.", "{name}", base_url=served.base_url) as ask,
    ):
        batch = await ask({"name": numpy.array(["fine", "long " * 5_000, "good"])})
    assert [error is None for error in batch["error"]] == [True, False, True]
    assert batch["error"][1].startswith("ContextTooLong: ")


async def test_answers_of_other_types_are_values_of_json(endpoint):
    def sized(text, _):
        return {"text": text, "words": len(text.split())}

    rows = {"a": numpy.array([{"b": 1}, {"b": 2}]), "c": numpy.array([0.5, 1.5]), "d": numpy.array([[1], [2]])}
    async with (
        SimulatedEndpoint(answer=sized) as served,
        Asking("Count.", "{a.b} {c}", base_url=served.base_url, output_type=Size) as ask,
    ):
        batch = await ask(rows)
    assert batch["answer"] == [{"text": "1 0.5", "words": 2}, {"text": "2 1.5", "words": 2}]


async def test_labels_and_names_of_columns():
    async with (
        SimulatedEndpoint() as served,
        Asking(
            "Sort.", "{name}", base_url=served.base_url, labels=["kitchen"], output="department", error="why"
        ) as ask,
    ):
        batch = await ask({"name": names(3)})
        assert batch["department"] == ["kitchen"] * 3
        assert batch["why"] == [None] * 3
        with pytest.raises(mb.ConfigError, match='"name"'):
            await ask({"other": names(3)})
        with pytest.raises(mb.ConfigError, match="department"):
            await ask({"name": names(3), "department": names(3)})
        with pytest.raises(mb.ConfigError, match="numpy"):
            await ask([1, 2])
        empty = await ask({"name": names(0)})
        assert {name: list(values) for name, values in empty.items()} == {key: [] for key in ("name", *ask._columns)}


async def test_the_key_is_in_no_argument(endpoint, monkeypatch):
    for settings in (
        {"transport": {"api_key": "sk-1"}},
        {"api_key": "sk-1"},
        {"headers": {"Authorization": "Bearer sk-1"}},
        {"transport": {"headers": {"x-api-key": "sk-1"}}},
        {"transport": {"headers": {"x-api-key": "sk-1"}}, "headers": {"X-Team": "a"}},
    ):
        with pytest.raises(mb.ConfigError, match="api_key_env"):
            Ask("Shout.", **settings)
        with pytest.raises(mb.ConfigError, match="api_key_env"):
            Ask.over(None, "Shout.", **settings)
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    async with Asking("Shout.", "{name}", api_key_env="OTHER_KEY") as ask:
        await ask({"name": names(1)})
        with pytest.raises(TypeError):
            pickle.dumps(ask)
    with pytest.raises(mb.ConfigError, match="NO_SUCH_KEY"):
        Ask("Shout.", api_key_env="NO_SUCH_KEY")


async def test_a_second_actor_takes_answers_from_the_cache(endpoint, tmp_path):
    place = str(tmp_path / "answers.sqlite")
    for _ in range(2):
        async with Asking("Shout.", "{name}", cache=place) as ask:
            assert (await ask({"name": names(40)}))["answer"][39] == "CHAIR 39"
    assert endpoint.calls <= 4


def test_a_rate_limit_is_pickled_without_its_state():
    limit = mb.RateLimit(rpm=60, tpm=1_000, share=0.5)
    assert repr(pickle.loads(pickle.dumps(limit))) == repr(limit)
