"""Who may do what at the gateway, and who shares what with whom."""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging

import aiohttp
import openai
import pytest
from gateway_world import (
    MODEL,
    ONE_ATTEMPT,
    Watched,
    error_in,
    gateway,
    post,
    recorder,
    sdk,
    serve,
    status,
    talk,
)
from helpers import ask
from prometheus_client.parser import text_string_to_metric_families

import microbatch as mb
from microbatch.gateway import Gateway, GatewaySettings

pytestmark = pytest.mark.slow  # real sockets and real time

KEYS = ("sk-key-of-one-customer", "sk-key-of-the-other-one")
CHAT = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
OWN = "sk-the-gateway-s-own-key"
TOKEN = "the-access-token"
TOGETHER = {"max_wait": 2.0}  # in which a loaded machine brings all requests of a moment


async def asked(client, text, **options):
    completion = await client.chat.completions.create(model=MODEL, messages=ask(text), **options)
    return completion.choices[0].message.content


@pytest.mark.parametrize("tenants", [(None, None), ("a", "a"), ("a", "b"), (None, "a")])
async def test_two_keys_never_meet_in_a_batch_a_flight_or_a_cache_entry(tenants):
    cache = mb.MemoryCache()
    async with Watched() as upstream, gateway(upstream, cache=cache, policy={"share": True, **TOGETHER}) as served:
        clients = [
            sdk(served, key, default_headers={} if tenant is None else {"X-Microbatch-Tenant": tenant})
            for key, tenant in zip(KEYS, tenants, strict=True)
        ]
        texts = ["x", "x", "y", "z"]
        for _ in range(2):  # together, and again once all is in the cache
            answers = await asyncio.gather(*(asked(c, text, temperature=0) for text in texts for c in clients))
            assert answers == [f"re: {text}" for text in texts for _ in clients]
        stats = served.stats()
        for client in clients:
            await client.close()
    # One call for each key: within one key, "x" is asked once and all travel together.
    assert [key for key, _ in upstream.heard] == [f"Bearer {key}" for key in KEYS] or [
        key for key, _ in upstream.heard
    ] == [f"Bearer {key}" for key in reversed(KEYS)]
    assert (stats.batches, stats.shared, stats.cache_hits) == (2, 2, 8)


async def test_tenants_of_one_key_never_meet_either():
    cache = mb.MemoryCache()
    async with Watched() as upstream, gateway(upstream, cache=cache, policy=TOGETHER) as served, sdk(served) as client:
        tenants = [{}, {"X-Microbatch-Tenant": "a"}, {"X-Microbatch-Tenant": "b"}]
        for _ in range(2):
            await asyncio.gather(*(asked(client, "x", extra_headers=tenant) for tenant in tenants for _ in range(3)))
        stats = served.stats()
    assert upstream.calls == 3
    assert stats.cache_hits == 9


async def test_without_a_key_of_the_callers_a_tenant_header_counts_only_if_it_is_trusted():
    for trusted, calls in ((False, 1), (True, 2)):
        settings = GatewaySettings(trust_tenant_header=trusted)
        async with Watched() as upstream, gateway(upstream, settings=settings, api_key=OWN, policy=TOGETHER) as served:
            sent = (talk(served.port, post(CHAT, X_Microbatch_Tenant=tenant)) for tenant in ("a", "b", "a", "b"))
            assert [status(answer) for answer in await asyncio.gather(*sent)] == [200] * 4
        assert upstream.calls == calls
        assert {key for key, _ in upstream.heard} == {f"Bearer {OWN}"}


class Shelf:
    """A cache that several gateways share, with a secret of its own."""

    def __init__(self):
        self.kept = {}

    async def secret(self):
        return b"s" * 32

    async def get_many(self, keys):
        return [self.kept.get(key) for key in keys]

    async def set_many(self, entries):
        self.kept.update((key, value) for key, value, _ in entries)

    async def aclose(self):
        pass


async def test_gateways_with_one_cache_and_one_secret_share_answers():
    cache, routes = Shelf(), []
    async with Watched() as upstream:
        for secret in (None, None, b"0123456789abcdef", b"0123456789abcdef", b"fedcba9876543210"):
            async with gateway(upstream, cache=cache, secret=secret) as served, sdk(served) as client:
                raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=ask("x"))
                routes.append(raw.headers["X-Microbatch-Route"])
    assert routes == ["single", "cache", "single", "cache", "single"]


async def test_a_cache_whose_secret_cannot_be_had_does_not_keep_the_gateway_from_starting(caplog):
    class Locked(Shelf):
        async def secret(self):
            raise OSError("no such host")

    async with Watched() as upstream, gateway(upstream, cache=Locked()) as served, sdk(served) as client:
        assert await asked(client, "x") == "re: x"
    assert "the cache cannot be reached (OSError)" in caplog.text


# --- the gateway's own key

OWN_KEYS = pytest.mark.parametrize("own", [OWN, lambda: OWN], ids=["a key", "a function"])


async def test_a_function_is_asked_for_another_key_when_one_is_refused():
    keys = iter(("old", "new"))
    async with (
        Watched(api_keys={"new", "theirs"}) as upstream,
        gateway(upstream, api_key=lambda: next(keys)) as served,
        sdk(served, "microbatch") as client,
        sdk(served, "theirs") as other,
    ):
        assert await asked(client, "x") == "re: x"
        assert await asked(other, "x") == "re: x"
        assert await asked(client, "y") == "re: y"
    assert [key for key, _ in upstream.heard] == ["Bearer new", "Bearer theirs", "Bearer new"]


@OWN_KEYS
async def test_with_the_gateways_key_only_chat_embeddings_and_models_are_served(own):
    async with recorder() as upstream, gateway(upstream.url, api_key=own) as served, aiohttp.ClientSession() as session:

        async def send(method, path, **options):
            async with session.request(method, f"{served.base_url}{path}", **options) as response:
                return response.status

        assert await send("GET", "/models") == 203
        assert await send("GET", "/models/org/some-model?x=1") == 203
        assert await send(
            "POST", "/chat/completions", json={"stream": True, "n": 2, "model": "m", "messages": ask("x")}
        )
        assert await send("POST", "/embeddings", json={"model": "m", "input": [1, 2]}) == 203
        for method, path in [
            ("POST", "/files"),
            ("DELETE", "/files/f-1"),
            ("DELETE", "/models/m"),
            ("GET", "/files"),
            ("POST", "/models"),
            ("GET", "/embeddings"),
            ("POST", "/embeddings/x"),
            ("PUT", "/chat/completions"),
            ("GET", "/chat/completions"),
            ("GET", "/models/%2e%2e/files"),
            ("HEAD", "/models"),
            ("OPTIONS", "/chat/completions"),
        ]:
            assert await send(method, path, json={}) in (403, 405), (method, path)
        assert await send("GET", "/models/a/..%2ffiles") == 403
        # With a key of one's own, everything is.
        assert await send("DELETE", "/files/f-1", headers={"Authorization": "Bearer theirs"}) == 203
    keys = [request[2].get("Authorization") for request in upstream.requests]
    assert keys == [f"Bearer {OWN}"] * 4 + ["Bearer theirs"]


@OWN_KEYS
async def test_with_the_gateways_key_the_caller_does_not_choose_who_pays(own):
    async with recorder() as upstream, gateway(upstream.url, api_key=own, retry=ONE_ATTEMPT) as served:
        sent = {"OpenAI-Project": "p", "OpenAI-Organization": "o", "OpenAI-Beta": "b"}
        headers = {name.replace("-", "_"): value for name, value in sent.items()}
        await talk(served.port, post(CHAT, **headers))
        await talk(served.port, post(CHAT, X_Microbatch_Batch="no", **headers))
    for _, _, headers, _ in upstream.requests:
        assert not [name for name in ("OpenAI-Project", "OpenAI-Organization") if name in headers]
        assert (headers["OpenAI-Beta"], headers["Authorization"]) == ("b", f"Bearer {OWN}")
    assert len(upstream.requests) == 2


@OWN_KEYS
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_off_loopback_a_key_of_the_gateways_needs_a_token(host, own):
    with pytest.raises(mb.ConfigError, match="access token"):
        Gateway("http://localhost:1/v1", host=host, api_key=own)
    Gateway("http://localhost:1/v1", host=host, api_key=own, access_token=TOKEN)
    Gateway("http://localhost:1/v1", host=host)
    for loopback in ("127.0.0.1", "127.0.0.9", "::1", "localhost"):
        Gateway("http://localhost:1/v1", host=loopback, api_key=own)


async def test_the_token_opens_the_gateways_key_and_its_pages_and_goes_no_further():
    protected = {"api_key": OWN, "access_token": TOKEN, "host": "0.0.0.0"}
    async with Watched() as upstream, gateway(upstream, **protected) as served, aiohttp.ClientSession() as session:
        root = f"http://127.0.0.1:{served.port}"
        for token, expected in ((TOKEN, 200), ("wrong", 401), (None, 401)):
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            async with session.get(f"{root}/stats", headers=headers) as response:
                assert response.status == expected
        body = {"model": MODEL, "messages": ask("x")}
        async with session.post(f"{root}/v1/chat/completions", json=body) as response:
            assert response.status == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with session.post(f"{root}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 200
        headers = {"Authorization": "Bearer theirs"}
        async with session.post(f"{root}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 200
        for path in ("/healthz", "/readyz"):
            async with session.get(root + path) as response:
                assert response.status == 200
    assert [key for key, _ in upstream.heard] == [f"Bearer {OWN}", "Bearer theirs"]


def basic(password):
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


@pytest.mark.parametrize("page", ["/stats", "/metrics", "/dashboard"])
async def test_a_browser_gives_the_token_as_a_password_for_the_pages_and_for_nothing_else(page):
    protected = {"api_key": OWN, "access_token": TOKEN, "host": "0.0.0.0"}
    async with Watched() as upstream, gateway(upstream, **protected) as served, aiohttp.ClientSession() as session:
        root = f"http://127.0.0.1:{served.port}"
        for password, expected in ((TOKEN, 200), ("wrong", 401)):
            async with session.get(root + page, headers={"Authorization": basic(password)}) as response:
                assert response.status == expected
        for sent in ("Basic", "Basic !", "Basic YQ==", f"Basic {TOKEN}"):
            async with session.get(root + page, headers={"Authorization": sent}) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"].startswith("Basic ")
        body = {"model": MODEL, "messages": ask("x")}
        async with session.post(
            f"{root}/v1/chat/completions", json=body, headers={"Authorization": basic(TOKEN)}
        ) as response:
            await response.read()
    assert all(key != f"Bearer {OWN}" for key, _ in upstream.heard)


async def test_the_gateways_metrics_are_what_prometheus_reads():
    async with Watched() as upstream, gateway(upstream) as served, aiohttp.ClientSession() as session:
        body = {"model": MODEL, "messages": ask("x")}
        async with session.post(f"{served.base_url}/chat/completions", json=body) as response:
            assert response.status == 200
        async with session.get(f"http://127.0.0.1:{served.port}/metrics") as response:
            families = list(text_string_to_metric_families(await response.text()))
    samples = {(sample.name, sample.labels.get("route")): sample.value for each in families for sample in each.samples}
    assert samples["microbatch_requests_total", "single"] == 1


async def test_off_loopback_the_pages_need_a_token_even_where_there_is_none():
    sent = b"GET /stats HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    async with recorder() as upstream, gateway(upstream.url, host="0.0.0.0") as served:
        assert status(await talk(served.port, sent)) == 403


@OWN_KEYS
async def test_clients_that_insist_on_a_key_give_one_that_stands_for_none(own):
    async with Watched() as upstream, gateway(upstream, api_key=own) as served, sdk(served, "microbatch") as client:
        assert await asked(client, "x") == "re: x"
        assert [model.id async for model in client.models.list()] == ["simulated"]
        with pytest.raises(openai.PermissionDeniedError):
            await client.files.list()
    assert upstream.heard[0][0] == f"Bearer {OWN}"


async def test_a_key_in_the_environment_is_not_used_unless_it_is_given(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", OWN)
    async with recorder() as upstream, gateway(upstream.url, retry=ONE_ATTEMPT) as served:
        await talk(served.port, post(CHAT))
        await talk(served.port, post(CHAT, path="/v1/files"))
    assert len(upstream.requests) == 2
    assert not any("Authorization" in request[2] for request in upstream.requests)


async def test_what_is_checked_is_what_is_sent():
    async with recorder() as upstream, gateway(upstream.url) as served:
        for path in ("/%76%31/files", "/v1/../files", "/v1/%2e%2e/files", "/v1/a%2F..%2F..%2Fx"):
            answer = await talk(served.port, post(CHAT, path=path, Authorization="Bearer theirs"))
            assert status(answer) in (400, 404), path
    assert upstream.requests == []


# --- web pages


async def test_a_page_cannot_post_what_it_may_send_without_asking():
    async with recorder() as upstream, gateway(upstream.url) as served:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None):
            for path in ("/v1/chat/completions", "/v1/embeddings", "/v1/files"):
                answer = await talk(served.port, post(CHAT, path=path, Content_Type=kind, Origin="http://evil.example"))
                assert status(answer) == 415
                assert error_in(answer)["code"] == "unsupported_media_type"
        # With a key there is nothing to steal, and a browser asks before it sends one.
        own = {"Authorization": "Bearer theirs", "Content_Type": "multipart/form-data; boundary=x"}
        assert status(await talk(served.port, post(CHAT, path="/v1/files", **own))) == 203
    assert len(upstream.requests) == 1


async def test_no_answer_lets_a_page_read_it():
    async with recorder() as upstream, gateway(upstream.url) as served:
        preflight = (
            b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n"
            b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type\r\n"
            b"Connection: close\r\n\r\n"
        )
        for sent in (preflight, post(CHAT, Origin="http://evil.example"), post(b"", path="/nowhere")):
            assert b"access-control" not in (await talk(served.port, sent)).lower()


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("LOCALHOST:1234", True),
        ("127.0.0.1:80", True),
        ("[::1]:80", True),
        ("gateway.example", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("localhost@evil.example", False),
        ("evil.example#localhost", False),
        ("192.0.2.7", False),
        ("127.0.0.1.evil.example:80", False),
        ("localhost:99999999", False),
        ("[::1", False),
        ("", False),
        (None, False),
    ],
)
async def test_a_foreign_host_is_refused(host, known):
    async with Watched() as upstream, gateway(upstream, allowed_hosts=["Gateway.Example"]) as served:
        answer = await talk(served.port, post(CHAT, host=host))
        assert status(answer) == (200 if known else 421) or (not known and status(answer) == 400)
        assert bool(upstream.calls) == known


async def test_off_loopback_addresses_are_known_and_names_are_not():
    async with Watched() as upstream, gateway(upstream, host="0.0.0.0") as served:
        found = [status(await talk(served.port, post(CHAT, host=host))) for host in ("192.0.2.7:80", "evil.example")]
    assert found == [200, 421]
    async with Watched() as upstream, gateway(upstream, host="0.0.0.0", allowed_hosts=["*"]) as served:
        assert status(await talk(served.port, post(CHAT, host="any.example"))) == 200


async def test_a_repeated_header_that_says_who_asks_is_refused():
    async with recorder() as upstream, gateway(upstream.url) as served:
        for name in ("Authorization", "OpenAI-Organization", "Host"):
            sent = post(CHAT, X_First=f"1\r\n{name}: one\r\n{name}: two")
            assert status(await talk(served.port, sent)) in (400, 421), name
        sent = post(CHAT, path="/v1/files", X_First="1\r\nAuthorization: Bearer one\r\nAuthorization: Bearer two")
        assert status(await talk(served.port, sent)) == 400
    assert upstream.requests == []


# --- keys


async def test_keys_are_in_no_log_no_repr_and_no_error(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    canary = "sk-canary-0123456789abcdef"
    async with recorder() as upstream, gateway(upstream.url, api_key=OWN, retry=ONE_ATTEMPT) as served:
        shown = [repr(served), repr(served._access), repr(served._chat), repr(served._embeddings), repr(served.batcher)]
        answers = [
            await talk(served.port, sent)
            for sent in (
                post(CHAT, Authorization=f"Bearer {canary}"),
                post(b"{", Authorization=f"Bearer {canary}"),
                post(CHAT, path="/v1/files", Authorization=f"Bearer {canary}"),
                post(CHAT, path="/v1/files"),
                post(CHAT),
                post(CHAT, Authorization=f"Bearer {canary}\x01"),
                post(CHAT, Authorization=f"Bearer {canary}é"),
                f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer {canary}\r\n\r\n".encode(),
            )
        ]
    told = "\n".join([caplog.text, *capfd.readouterr(), *shown])
    for key in (canary, OWN):
        assert key not in told
    assert all(OWN.encode() not in answer for answer in answers)


@pytest.mark.slow
async def test_the_command_refuses_to_hand_its_key_to_the_network(tmp_path):
    with pytest.raises(AssertionError, match="--access-token-file"):
        async with serve("--upstream", "http://localhost:1/v1", "--host", "0.0.0.0", "--port", "0", OPENAI_API_KEY=OWN):
            pass
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    words = (
        "--upstream",
        "http://localhost:1/v1",
        "--host",
        "0.0.0.0",
        "--port",
        "0",
        "--access-token-file",
        str(token),
    )
    async with serve(*words, OPENAI_API_KEY=OWN) as served:
        served.stop()
        code, out, err = await served.ended()
    assert code == 0
    assert OWN not in out + err
    assert TOKEN not in out + err


def test_all_that_is_secret_differs_for_all_pairs_of_key_and_tenant():
    from multidict import CIMultiDict
    from yarl import URL

    from microbatch.gateway.access import Access

    access = Access(
        host="127.0.0.1", api_key=None, access_token=None, lane_headers=(), allowed_hosts=(), trust_tenant_header=True
    )
    access.secret = b"s"

    class Request:
        def __init__(self, key, tenant):
            pairs = {"Authorization": key, "X-Microbatch-Tenant": tenant}
            self.headers = CIMultiDict({name: value for name, value in pairs.items() if value is not None})
            self.rel_url = URL("/v1/chat/completions")

    pairs = list(itertools.product((None, "Bearer a", "Bearer b", "bearer a"), (None, "a", "b", "Bearer a")))
    tenants = [access.caller(Request(*pair)).tenant for pair in pairs]
    assert len(set(tenants)) == len(pairs)
    assert tenants[0] is None
