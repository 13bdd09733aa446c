"""Who asks: every header that holds a credential counts, wherever requests could meet."""

from __future__ import annotations

import asyncio

import pytest
from helpers import ask, each
from hypothesis import given
from hypothesis import strategies as st

import microbatch as mb
from microbatch.batching.request import read_options
from microbatch.caching.key import Keys
from microbatch.errors import AuthFailed
from microbatch.policy import RetryPolicy
from microbatch.testing import ScriptedTransport
from microbatch.transports.accounts import Accounts
from microbatch.transports.credentials import credentials_in, in_place_of, is_credential, says_who

CREDENTIALS = [
    "authorization",
    "api-key",
    "x-api-key",
    "x-goog-api-key",
    "apikey",
    "x-key",
    "ocp-apim-subscription-key",
    "x-functions-key",
    "cf-aig-authorization",
    "cf-access-client-secret",
    "helicone-auth",
    "x-portkey-api-key",
    "x-portkey-virtual-key",
    "x-litellm-api-key",
    "x-amz-security-token",
    "x-auth-token",
    "private_token",
    "x-vendor-of-next-year-access-token",
    "x-client-secret",
    "cookie",
]
BESIDE = ["openai-organization", "openai-project", "x-goog-user-project", "cf-access-client-id", "x-workspace-id"]
OTHERS = [
    "content-type",
    "user-agent",
    "accept",
    "traceparent",
    "tracestate",
    "baggage",
    "x-request-id",
    "x-correlation-id",
    "idempotency-key",
    "x-idempotency-key",
    "x-cache-key",
    "x-xsrf-token",
    "helicone-session-id",
    "openai-beta",
    "anthropic-version",
    "x-stainless-retry-count",
    "x-goog-api-client",
    "x-session-affinity-key",
    "x-signature",
    "http-referer",
    "x-title",
]
cases = pytest.mark.parametrize("name", CREDENTIALS)


def spellings(name):
    return [name, name.upper(), name.title()]


@cases
def test_a_credential_is_known_by_its_name(name):
    assert all(is_credential(spelling) and says_who(spelling) for spelling in spellings(name))


@pytest.mark.parametrize("name", BESIDE)
def test_what_comes_beside_a_credential_says_who_asks_but_is_none(name):
    assert all(says_who(spelling) and not is_credential(spelling) for spelling in spellings(name))


@each("name", OTHERS)
def test_all_else_does_not_say_who_asks(name):
    assert not any(says_who(spelling) or is_credential(spelling) for spelling in spellings(name))


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/chat/completions", {}),
        ("/x?", {}),
        ("/x?key=", {}),
        ("/x?alt=sse&key=AIza%2F1", {"?key": "AIza%2F1"}),
        ("/x?API_KEY=a&subscription-key=b", {"?api_key": "a", "?subscription-key": "b"}),
        ("/x?k%65y=a&key=b", {"?key": "a&b"}),
        ("/x?pageToken=a&page_token=b&limit=1", {}),
        ("/key=a/x?y#key=b", {}),
    ],
)
def test_credentials_are_found_in_a_query(path, found):
    assert credentials_in(path) == found
    assert all(says_who(name) for name in found)


# --- two who differ in a credential never meet


secrets = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20)
headers = st.dictionaries(st.sampled_from(CREDENTIALS + BESIDE), secrets, max_size=4)


@given(headers, st.sampled_from(CREDENTIALS + BESIDE), secrets)
async def test_whoever_differs_in_one_header_that_says_who_asks_meets_nobody(others, name, secret):
    changed = {**others, name: secret}
    if changed == others:
        return
    pair = [read_options(str, None, None, None, None, each, None, "normal") for each in (others, changed)]
    keys = Keys(b"s" * 32, endpoint="http://x/v1", model="m")
    accounts = Accounts(ScriptedTransport(), RetryPolicy(), None, None)
    assert pair[0].content != pair[1].content  # of which lanes and single flight are made
    assert keys.of(ask("x"), pair[0]) != keys.of(ask("x"), pair[1])
    assert accounts.of("m", pair[0].headers) is not accounts.of("m", pair[1].headers)
    assert accounts.of("m", {name.upper(): value for name, value in changed.items()}) is accounts.of("m", changed)


@pytest.mark.promise(of="cross_talk")
@cases
async def test_two_callers_with_different_credentials_share_nothing(name):
    transport = ScriptedTransport()
    policy = mb.FlushPolicy(idle="wait", share=True)
    async with mb.Microbatcher(transport, policy=policy, tokens="bytes", cache=mb.MemoryCache()) as batcher:
        for _ in range(2):  # together, and again once all is in the cache
            asked = [
                batcher.submit(ask(text), headers={name: f"secret-{who}"}, temperature=0)
                for text in ("a", "b", "a")
                for who in (1, 2)
            ]
            assert [reply.text for reply in await asyncio.gather(*asked)] == ["A", "A", "B", "B", "A", "A"]
    assert [call.call.headers for call in transport.calls] == [{name: "secret-1"}, {name: "secret-2"}]
    assert [[text for _, text in call.items] for call in transport.calls] == [["a", "b"]] * 2


@cases
async def test_a_key_that_is_refused_stops_no_other_key(name):
    def answer(received):
        if received.call.headers[name] == "bad":
            return AuthFailed("no", status=401)
        return "yes"

    transport = ScriptedTransport(*[answer] * 6)
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        for _ in range(3):
            with pytest.raises(AuthFailed):
                await batcher.submit(ask("x"), headers={name: "bad"})
        assert (await batcher.submit(ask("x"), headers={name: "good"})).text == "yes"


# --- and never go out with two keys


@cases
def test_with_a_callers_credential_a_transports_key_stays_behind(name):
    own = {"Authorization": "o", "api-key": "o", "OpenAI-Project": "o", "X-Trace": "t", "Helicone-Auth": "h"}
    assert in_place_of(own, [name.title()]) == {"X-Trace": "t", "Helicone-Auth": "h"}
    assert in_place_of(own, ["x-request-id", "openai-project"]) == own
