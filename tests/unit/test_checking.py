"""Arguments of constructors: a wrong one is a `ConfigError` that names it, before anything is opened or sent."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pytest
from helpers import batcher_for, each, submit_all

import microbatch as mb
import microbatch.gateway
import microbatch.openai
import microbatch.testing
from microbatch.checking import AtLeast, Share, check, hints_of
from microbatch.testing import Faults, Latency, Quota, ScriptedTransport, SimulatedEndpoint, SimulatedModel


def batcher(**options):
    return mb.Microbatcher(ScriptedTransport(), **options)


WRONG = [
    (lambda: batcher(retry=3), "retry must be a RetryPolicy, got 3"),
    (lambda: batcher(rate_limit=60), "rate_limit must be a RateLimit, got 60"),
    (lambda: batcher(policy={"max_wait": 1}), "policy must be a FlushPolicy, got dict"),
    (lambda: batcher(policy=mb.FlushPolicy), "policy must be a FlushPolicy, got the class FlushPolicy"),
    (lambda: batcher(fallback="stream"), "fallback must be a FallbackPolicy, got str"),
    (lambda: batcher(normalize="strip"), "normalize must be a function, got str"),
    (lambda: batcher(prices=0.5), "prices must be a mapping or a function, got 0.5"),
    (lambda: batcher(tokens="tiktoken"), "tokens must be .*'bytes'"),
    (lambda: batcher(hooks=print), "hooks must be a sequence, got builtin_function_or_method"),
    (lambda: batcher(hooks=[print]), r"hooks\[0\] must be an object with on_submit"),
    (lambda: batcher(hooks=[mb.PrometheusHooks]), r"hooks\[0\] must be .* got the class PrometheusHooks"),
    (lambda: batcher(hooks=[lambda event: None]), r"hooks\[0\] must be"),
    (lambda: batcher(cache=mb.MemoryCache), "cache must have get_many.* got the class MemoryCache"),
    (lambda: batcher(cache="x.sqlite"), "cache must have get_many.* got str"),
    (lambda: batcher(spool={}), "spool must have .*put.* got dict"),
    (lambda: mb.Microbatcher(mb.OpenAIChat), "transport must have .* got the class OpenAIChat"),
    (lambda: mb.Microbatcher("http://x"), r"transport must have send\(\) and aclose\(\), got str"),
    (lambda: mb.FlushPolicy(max_batch_size=None), "max_batch_size must be a whole number, got None"),
    (lambda: mb.FlushPolicy(max_batch_size=True), "max_batch_size must be a whole number, got True"),
    (lambda: mb.FlushPolicy(max_queued=0), "max_queued must be a number of at least 1, got 0"),
    (lambda: mb.FlushPolicy(max_wait="1"), "max_wait must be a number of at least 0, got '1'"),
    (lambda: mb.FlushPolicy(max_wait=float("nan")), "max_wait must be a number of at least 0, got nan"),
    (lambda: mb.FlushPolicy(max_wait=10**400), "max_wait must be a number of at least 0, got a number out of range"),
    (lambda: mb.RateLimit(rpm=10**5_000), "rpm must be a whole number, got a number out of range"),
    (lambda: mb.Budget(usd=-(10**400)), "usd must be a number of at least 0, got a number out of range"),
    (lambda: mb.FlushPolicy(idle="never"), "idle must be one of 'flush', 'wait', got 'never'"),
    (lambda: mb.FlushPolicy(share=1), "share must be True or False, got 1"),
    (lambda: mb.FlushPolicy(combine_params="seed"), "combine_params must be a collection of strings, got str"),
    (lambda: mb.FlushPolicy(combine_params=[1]), "combine_params must be a collection of strings, got list"),
    (lambda: mb.RetryPolicy(reserve=-1), "reserve must be a number of at least 0, got -1"),
    (lambda: mb.FallbackPolicy(canary="yes"), "canary must be True or False, got str"),
    (lambda: mb.RateLimit(rpm="60"), "rpm must be a whole number, got '60'"),
    (lambda: mb.RateLimit(rpm=60, adaptive=None), "adaptive must be True or False, got None"),
    (lambda: mb.Price("1", 1), "input must be a number of at least 0, got '1'"),
    (lambda: mb.OpenAIChat("m", base_url=5), "base_url must be a string, got 5"),
    (lambda: mb.OpenAIChat("m", api_key="k", headers=["a"]), "headers must be a mapping of strings, got list"),
    (lambda: mb.OpenAIChat("m", api_key="k", headers={"a": 1}), "headers must be a mapping of strings, got dict"),
    (lambda: mb.MemoryCache(max_bytes=0), "max_bytes must be a number of at least 1"),
    (lambda: mb.MemoryCache(ttl="1h"), "ttl must be a number of at least 0, got '1h'"),
    (lambda: mb.SQLiteCache(5), "path must be a string or a PathLike, got 5"),
    (lambda: mb.RedisCache(None), "url must be a string, got None"),
    (lambda: mb.SQLiteSpool("x", max_alone=1.5), "max_alone must be a whole number, got 1.5"),
    (lambda: mb.RedisSpool("redis://x", allow_eviction="no"), "allow_eviction must be True or False"),
    (lambda: mb.TieredCache(mb.MemoryCache(), {}), "tiers must have get_many"),
    (lambda: mb.OpenTelemetryHooks(server_port="443"), "server_port must be a whole number, got '443'"),
    (lambda: mb.PrometheusHooks(namespace=None), "namespace must be a string, got None"),
    (
        lambda: microbatch.openai.AsyncOpenAI(ScriptedTransport()),
        "batcher must be a Microbatcher, got ScriptedTransport",
    ),
    (lambda: microbatch.gateway.Gateway(None), "upstream must be a string, got None"),
    (lambda: microbatch.gateway.Gateway("http://x/v1", settings={}), "settings must be a GatewaySettings, got dict"),
    (
        lambda: microbatch.gateway.Gateway("http://x/v1", policy={"max_wait": 1}),
        "policy must be a FlushPolicy, got dict",
    ),
    (lambda: microbatch.gateway.Gateway("http://x/v1", hooks=print), "hooks must be a sequence"),
    (lambda: microbatch.gateway.GatewaySettings(max_requests=None), "max_requests must be a whole number, got None"),
    (lambda: ScriptedTransport(5), "script must be .* got 5"),
    (lambda: ScriptedTransport(delay="1"), "delay must be a number, got '1'"),
    (lambda: Faults(5), "kinds must be"),
    (lambda: Latency(first_token="0"), "first_token must be a number"),
    (lambda: Quota(rpm="1"), "rpm must be a whole number"),
    (lambda: SimulatedModel(answer=5), "answer must be a function"),
    (lambda: SimulatedEndpoint(port="80"), "port must be a whole number"),
]


@each("make, words", WRONG)
def test_a_wrong_argument_is_named(make, words):
    with pytest.raises(mb.ConfigError, match=words):
        make()


def test_a_text_is_not_quoted_where_it_may_be_a_key():
    with pytest.raises(mb.ConfigError) as caught:
        microbatch.gateway.Gateway("http://x/v1", secret="sk-secret")
    assert "sk-secret" not in str(caught.value)


def test_numbers_of_other_classes_are_numbers():
    policy = mb.FlushPolicy(max_batch_size=np.int64(4), max_wait=np.float32(0.5))
    assert batcher(policy=policy)


def test_the_words_for_unknown_arguments_are_pythons_own():
    with pytest.raises(TypeError, match="unexpected keyword argument 'retries'"):
        batcher(retries=3)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'transport'"):
        mb.Microbatcher()


UNKNOWN = {"tracer_provider", "meter_provider", "registry", "pages"}
"""Arguments whose types are of optional packages, or for type checkers only."""

NO_SETTINGS = {
    *("AsyncStream", "Chat", "ChatCompletion", "Completions", "Embeddings", "ScriptedCall", "VirtualClockLoop"),
    "BlockingMicrobatcher",
}
"""Classes that are not made by users, have no arguments, or hand them on to a class that checks them."""


def test_the_arguments_of_all_public_classes_are_checked():
    unchecked = set()
    for module in (mb, microbatch.gateway, microbatch.openai, microbatch.testing):
        for name in set(module.__all__) - NO_SETTINGS:
            kind = getattr(module, name)
            if (
                not inspect.isclass(kind)
                or issubclass(kind, BaseException | dict)
                or getattr(kind, "_is_protocol", False)
            ):
                continue
            init = getattr(vars(kind).get("__init__"), "__wrapped__", None)
            if init is not None:
                unchecked |= {each for each, hint in hints_of(init).items() if hint is Any} - {"batcher"}
            elif "__dataclass_fields__" in vars(kind) or kind is mb.Price:
                unchecked |= {each for each, hint in hints_of(kind).items() if hint is Any}
            else:
                assert issubclass(kind, msgspec.Struct), name  # a record, made for each request
    assert unchecked == UNKNOWN


@each(
    "value, hint, words",
    [
        (1, int | None, None),
        (None, int | None, None),
        ("x", Sequence[str], "a sequence of strings"),
        (["x"], Sequence[str], None),
        ([1], Sequence[str], "a sequence of strings"),
        ({"a": 1}, Mapping[str, Any], None),
        ([1, 2], Sequence[int], None),
        ([1, 2.5], Sequence[int], "a sequence of whole numbers"),
        ({1: 0.5}, Mapping[int, Share], None),
        ({"1": 0.5}, Mapping[int, Share], "a mapping of whole numbers to numbers from 0 to 1"),
        ({1: 1.5}, Mapping[int, Share], "a mapping of whole numbers to numbers from 0 to 1"),
        ("a", Literal["a", "b"], None),
        (True, Literal[1], "one of 1"),
        (-1, Annotated[int, AtLeast(0)] | None, "a number of at least 0"),
        (0, Annotated[float, AtLeast(0)], None),
        (print, Callable[[str], str] | Literal["x"], None),
        ("y", Callable[[str], str] | Literal["x"], "a function or one of 'x'"),
        (b"x", str | os.PathLike[str], "a string or a PathLike"),
        (object(), object, None),
    ],
)
def test_values_are_compared_with_annotations(value, hint, words):
    if words is None:
        check("it", value, hint)
        return
    with pytest.raises(mb.ConfigError, match=f"it must be {words}, got"):
        check("it", value, hint)


async def no_batcher():
    await batcher().open()


def test_without_asyncio_a_batcher_says_what_it_needs():
    # As under trio: a coroutine runs, and there is no event loop of asyncio.
    with pytest.raises(mb.ConfigError, match="asyncio"):
        no_batcher().send(None)


def test_a_batcher_says_that_it_cannot_be_pickled_or_copied():
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="a Microbatcher cannot be pickled or copied"):
            duplicate(batcher())


@each("count", [1, 2])
async def test_a_reply_is_encoded_copied_and_pickled(count):
    async with batcher_for(ScriptedTransport(), idle="wait", max_wait=0.1) as opened:
        reply = (await submit_all(opened, ["one", "two"][:count]))[0]
        encoded = msgspec.json.decode(msgspec.json.encode(reply))
        assert encoded.keys() == set(mb.Reply.__struct_fields__)
        assert (encoded["output"], encoded["batch_size"]) == ("ONE", count)
        for other in (copy.copy(reply), pickle.loads(pickle.dumps(reply))):
            assert (await other.settled()).output == "ONE"


def test_what_hands_its_methods_on_is_taken():
    class Wrapper:
        def __init__(self, transport):
            self._transport = transport

        def __getattr__(self, name):
            return getattr(self._transport, name)

    mb.Microbatcher(Wrapper(ScriptedTransport()))
    with pytest.raises(mb.ConfigError, match=r"transport must have send\(\) and aclose\(\), got Wrapper"):
        mb.Microbatcher(Wrapper("http://x"))
