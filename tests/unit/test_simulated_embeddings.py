"""The simulated embedding model: what it refuses, its faults, and its transports within the process."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, get_args

import pytest

from microbatch import errors
from microbatch.messages import Usage
from microbatch.protocols import Embedded, EmbeddingCall, Transport
from microbatch.testing import (
    EmbeddingFaults,
    Latency,
    Quota,
    ScriptedTransport,
    SimulatedEmbeddings,
    SimulatedModel,
    SimulatedTransport,
    embedded,
)
from microbatch.testing.embedding_faults import EmbeddingFault
from microbatch.testing.reading import EndpointError

MODEL = "text-embedding-3-small"
TEXTS = ("one", "two words", "three words now")


def refusal(body: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return the error for a request, with its status."""
    with pytest.raises(EndpointError) as caught:
        SimulatedEmbeddings(**options).read({"model": MODEL, **body})
    return {"status": caught.value.status, **caught.value.error}


def reply(fault: str | None = None, *, draws: int = 0, base64: bool = False, **options: Any) -> dict[str, Any]:
    """Return the JSON of the reply to `TEXTS`, with a fault."""
    embeddings = SimulatedEmbeddings(faults=fault and EmbeddingFaults(fault, rate=1, seed=draws), **options)
    body = {"model": MODEL, "input": [*TEXTS], **({"encoding_format": "base64"} if base64 else {})}
    drawn = None if fault is None else embeddings.faults.draw(0, 0)
    return json.loads(embeddings.reply(embeddings.read(body), drawn).body)


def indices(said: dict[str, Any]) -> list[Any]:
    return [element.get("index") for element in said["data"]]


def texts_of(said: dict[str, Any]) -> list[str | None]:
    """Return the text whose vector each element has; None for none."""
    known = {tuple(embedded(text, MODEL)): text for text in TEXTS}
    return [known.get(tuple(element["embedding"] or ())) for element in said["data"]]


# --- requests


@pytest.mark.parametrize(
    "given",
    ["", [], [""], ["a", ""], None, 3, {"a": 1}, [[]], [["a"]], ["a", 1], [1.5], [True], [-1], [10**9], [[1], "a"]],
)
def test_what_is_no_text_is_refused(given: Any) -> None:
    said = refusal({"input": given})
    assert (said["status"], said["type"]) == (400, "invalid_request_error")
    assert "'$.input' is invalid" in said["message"]


@pytest.mark.parametrize(
    ("body", "options", "status", "code", "words"),
    [
        ({}, {}, 400, "missing_required_parameter", "'input'"),
        ({"model": ""}, {}, 400, None, "model parameter"),
        ({"model": "x", "input": "a"}, {"models": [MODEL]}, 404, "model_not_found", "`x` does not exist"),
        ({"input": ["a"] * 2_049}, {}, 400, "array_above_max_length", "maximum length 2048, but instead got an array with length 2049"),
        ({"input": ["a"] * 11}, {"max_inputs": 10}, 400, "array_above_max_length", "maximum length 10"),
        ({"input": ["a", "hi " * 9_000]}, {}, 400, None, "'input[1]': maximum input length is 8192 tokens"),
        ({"input": [[1] * 8_193]}, {}, 400, None, "maximum input length is 8192 tokens"),
        ({"input": [[1] * 8_000] * 38}, {}, 400, "max_tokens_per_request", "Requested 304000 tokens, max 300000 tokens per request"),
        ({"input": "a", "model": "text-embedding-ada-002", "dimensions": 3}, {}, 400, None, "does not support specifying dimensions"),
        ({"input": "a", "dimensions": 1_537}, {}, 400, "invalid_value", "1536"),
        ({"input": "a", "dimensions": 0}, {}, 400, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": 2.5}, {}, 400, "invalid_value", "dimensions"),
        ({"input": "a", "encoding_format": "md5"}, {}, 400, None, "['float', 'base64']"),
        ({"input": "a", "encoding_format": "float"}, {"encoding_format": "400"}, 400, "unsupported_parameter", "encoding_format"),
        ({"input": "a", "encoding_format": "base64"}, {"encoding_format": "500"}, 500, None, "Internal"),
        ({"input": ["a", "has poison in it"]}, {"poison": "poison"}, 400, None, "'$.input' is invalid"),
    ],
)  # fmt: skip
def test_what_is_beyond_a_limit_is_refused_in_openais_words(
    body: dict[str, Any], options: dict[str, Any], status: int, code: str | None, words: str
) -> None:
    said = refusal(body, **options)
    assert (said["status"], said["code"]) == (status, code)
    assert words in said["message"]


@pytest.mark.parametrize(
    ("given", "texts", "tokens"),
    [
        ("Hello there", ["Hello there"], 2),
        (["Hello there", "a"], ["Hello there", "a"], 3),
        ([9906, 1070], ["Hello there"], 2),
        ([[9906, 1070], [64]], ["Hello there", "a"], 3),
        (["a"] * 2_048, ["a"] * 2_048, 2_048),
        ("<|endoftext|>", ["<|endoftext|>"], 7),
    ],
)
def test_texts_come_as_strings_and_as_tokens(given: Any, texts: list[str], tokens: int) -> None:
    read = SimulatedEmbeddings().read({"model": MODEL, "input": given})
    assert (read.texts, read.tokens) == (texts, tokens)


@pytest.mark.parametrize(
    "options", [{"max_inputs": 0}, {"encoding_format": "no"}, {"dimensions": 0}, {"faults": "nan"}]
)
def test_a_wrong_option_is_a_config_error_that_names_it(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        SimulatedEmbeddings(**options)


@pytest.mark.parametrize(
    ("kinds", "options"), [("nonsense", {}), ([], {}), (3, {}), ("nan", {"rate": 2}), ("nan", {"seed": "x"})]
)
def test_wrong_faults_are_config_errors(kinds: Any, options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError):
        EmbeddingFaults(kinds, **options)


# --- replies and their faults


def test_a_reply_is_that_of_openai() -> None:
    said = reply()
    assert said["object"] == "list"
    assert said["model"] == MODEL
    assert said["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert {element["object"] for element in said["data"]} == {"embedding"}
    assert (indices(said), texts_of(said)) == ([0, 1, 2], [*TEXTS])
    assert "usage" not in reply(reports_usage=False)


SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
def test_faults_of_order_and_indices_do_what_they_say(seed: int) -> None:
    shuffled = reply("shuffled", draws=seed)
    assert indices(shuffled) != [0, 1, 2]
    assert [TEXTS[index] for index in indices(shuffled)] == texts_of(shuffled)
    for kind in ("wrong_index", "duplicate_index", "missing_index", "no_indices", "one_based", "string_indices"):
        assert texts_of(reply(kind, draws=seed)) == [*TEXTS]
    assert len(beyond := [index for index in indices(reply("wrong_index", draws=seed)) if index > 2]) == 1, beyond
    assert len(set(indices(reply("duplicate_index", draws=seed)))) == 2
    assert indices(reply("missing_index", draws=seed)).count(None) == 1
    assert indices(reply("no_indices", draws=seed)) == [None] * 3
    assert indices(reply("one_based", draws=seed)) == [1, 2, 3]
    assert indices(reply("string_indices", draws=seed)) == ["0", "1", "2"]


@pytest.mark.parametrize("seed", SEEDS)
def test_faults_of_number_do_what_they_say(seed: int) -> None:
    dropped, renumbered, extra = (reply(kind, draws=seed) for kind in ("dropped", "renumbered", "extra"))
    assert [TEXTS[index] for index in indices(dropped)] == texts_of(dropped)
    assert len(indices(dropped)) == 2
    assert indices(renumbered) == [0, 1]
    assert texts_of(renumbered) == texts_of(dropped)
    assert (indices(extra), texts_of(extra)) == ([0, 1, 2, 3], [*TEXTS, TEXTS[-1]])
    assert reply("empty", draws=seed)["data"] == []


@pytest.mark.parametrize("base64", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_faults_of_one_vector_spoil_one(seed: int, base64: bool) -> None:
    sound = [element["embedding"] for element in reply(base64=base64)["data"]]
    for kind in ("wrong_dimensions", "nan", "null", "bad_base64"):
        said = [element["embedding"] for element in reply(kind, draws=seed, base64=base64)["data"]]
        assert sum(ours != theirs for ours, theirs in zip(said, sound, strict=True)) == 1, kind


def test_floats_are_sent_though_base64_was_asked_for() -> None:
    assert all(isinstance(element["embedding"], str) for element in reply(base64=True)["data"])
    assert texts_of(reply("floats", base64=True)) == [*TEXTS]
    assert texts_of(reply(encoding_format="ignored", base64=True)) == [*TEXTS]


def test_the_seed_the_rate_and_the_limit_decide_which_replies_go_wrong() -> None:
    faults = EmbeddingFaults(["nan", "empty"], rate=0.5, limit=3)
    drawn = [faults.draw(number, 0) for number in range(200)]
    assert 60 < sum(fault is not None for fault in drawn) < 140
    assert {fault[0] for fault in drawn if fault is not None} == {"nan", "empty"}
    assert all(faults.draw(number, 3) is None for number in range(200))


# --- transports


def call(*texts: str, **fields: Any) -> EmbeddingCall:
    return EmbeddingCall(inputs=texts or TEXTS, **fields)


def pairs(embedded_: Embedded) -> list[tuple[int | None, list[float] | None]]:
    return [(index, None if vector is None else vector.tolist()) for index, vector in embedded_.vectors]


async def test_transports_within_the_process_have_the_same_vectors() -> None:
    wanted = call(model=MODEL, dimensions=64)
    model = SimulatedModel()
    for transport in (SimulatedTransport(model), ScriptedTransport()):
        assert isinstance(transport, Transport)
        got = await transport.embed(wanted)
        assert pairs(got) == [(place, embedded(text, MODEL, 64).tolist()) for place, text in enumerate(TEXTS)]
        assert got.model == MODEL
        assert got.finish_reason == "stop"
        assert transport.embedding_model
    assert got.usage == Usage(sum(map(len, TEXTS)) // 4)
    assert (model.calls, model.embedding_calls, model.embedded_texts) == (1, 1, 3)
    assert model.prompt_tokens == model.reported.prompt_tokens == 6


async def test_a_call_without_a_model_is_for_the_transports_own() -> None:
    for transport in (SimulatedTransport(SimulatedModel()), ScriptedTransport(embedding_model="mine")):
        got = await transport.embed(call())
        assert got.model == transport.embedding_model
        assert pairs(got)[0][1] == embedded(TEXTS[0], transport.embedding_model).tolist()


@pytest.mark.parametrize(
    ("options", "kind", "status"),
    [
        ({"max_inputs": 2}, errors.BadRequest, 400),
        ({"max_input_tokens": 2}, errors.ContextTooLong, 400),
        ({"models": ["other"]}, errors.BadRequest, 404),
        ({"faults": EmbeddingFaults("http_429", rate=1, retry_after=3)}, errors.RateLimited, 429),
        ({"faults": EmbeddingFaults("http_500", rate=1)}, errors.ServerError, 500),
        ({"faults": EmbeddingFaults("empty", rate=1)}, errors.ServerError, 200),
    ],
)
async def test_refusals_are_those_of_a_transport(
    options: dict[str, Any], kind: type[errors.StatusError], status: int
) -> None:
    transport = SimulatedTransport(SimulatedModel(embeddings=SimulatedEmbeddings(**options)))
    with pytest.raises(errors.StatusError) as caught:
        await transport.embed(call(model=MODEL))
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert caught.value.retry_after == (3 if status == 429 else None)


@pytest.mark.parametrize("kind", sorted({*get_args(EmbeddingFault)} - {"hang"}))
async def test_every_fault_changes_a_reply_or_is_an_error(kind: Any) -> None:
    model = SimulatedModel(embeddings=SimulatedEmbeddings(faults=EmbeddingFaults(kind, rate=1)))
    sound = [(place, embedded(text, "simulated").tolist()) for place, text in enumerate(TEXTS)]
    try:
        got = pairs(await SimulatedTransport(model).embed(call()))
    except errors.TransportError:
        got = []
    assert (got == sound) == (kind in ("string_indices", "floats"))
    assert model.faulted == 1
    for _, vector in got:
        assert vector is None or all(map(math.isfinite, vector))


async def test_a_reply_takes_the_time_of_a_first_token_and_a_silent_one_the_callers() -> None:
    now = asyncio.get_running_loop().time
    quick = SimulatedTransport(SimulatedModel(latency=Latency(first_token=3, tokens_per_second=1)))
    await quick.embed(call())  # which loads the tokenizer
    start = now()
    await quick.embed(call())
    assert now() - start == 3
    silent = SimulatedModel(embeddings=SimulatedEmbeddings(faults=EmbeddingFaults("hang", rate=1)))
    start = now()
    with pytest.raises(errors.TransportTimeout):
        await SimulatedTransport(silent).embed(call(timeout=5))
    assert now() - start == pytest.approx(5)
    assert silent.disconnects == 1


async def test_the_quota_counts_embeddings_and_chat_of_a_model_together() -> None:
    model = SimulatedModel(quota=Quota(rpm=3, tpm=12))
    transport = SimulatedTransport(model)
    first = await transport.embed(call())
    assert (first.limits.remaining_requests, first.limits.remaining_tokens) == (2, 6)
    await transport.embed(call())
    with pytest.raises(errors.RateLimited) as caught:
        await transport.embed(call("more"))
    assert caught.value.retry_after is not None
    assert model.quota_refusals == 1
    await transport.embed(call("x", model="another"))
    await transport.embed(call(headers={"authorization": "Bearer other"}))


async def test_what_is_refused_counts_as_a_request_and_uses_no_tokens() -> None:
    model = SimulatedModel(quota=Quota(rpm=3, tpm=6), embeddings=SimulatedEmbeddings(poison="poison"))
    transport = SimulatedTransport(model)
    for remaining in (2, 1):
        with pytest.raises(errors.BadRequest) as caught:
            await transport.embed(call("poison"))
        assert (caught.value.limits.remaining_requests, caught.value.limits.remaining_tokens) == (remaining, 6)
    await transport.embed(call())
    with pytest.raises(errors.RateLimited):
        await transport.embed(call("more"))
    assert (model.embedding_calls, model.calls) == (1, 4)


async def test_faults_of_chat_and_of_embeddings_are_counted_apart() -> None:
    faults = EmbeddingFaults("empty", rate=1, limit=1)
    model = SimulatedModel(embeddings=SimulatedEmbeddings(faults=faults))
    transport = SimulatedTransport(model)
    model.faulted = 5
    with pytest.raises(errors.ServerError):
        await transport.embed(call())
    assert len((await transport.embed(call())).vectors) == 3


async def test_a_script_decides_about_embeddings_calls_in_turn() -> None:
    answer = Embedded(vectors=[(0, None)])
    refused = errors.RateLimited("later", status=429)

    async def late(received: EmbeddingCall) -> Embedded:
        await asyncio.sleep(1)
        return Embedded(vectors=[(len(received.inputs), None)])

    transport = ScriptedTransport("chat", embeddings=[answer, refused, late, lambda _: ValueError("x")], delay=2)
    start = asyncio.get_running_loop().time()
    assert await transport.embed(call()) is answer
    with pytest.raises(errors.RateLimited):
        await transport.embed(call())
    assert (await transport.embed(call())).vectors == [(3, None)]
    assert asyncio.get_running_loop().time() - start == 7
    with pytest.raises(ValueError, match="x"):
        await transport.embed(call())
    assert len((await transport.embed(call())).vectors) == 3
    assert [len(each.inputs) for each in transport.embedding_calls] == [3] * 5
    assert transport.calls == []
