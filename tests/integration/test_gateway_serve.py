"""`microbatch serve`: settings from flags and the environment, and its orderly end."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys

import aiohttp
import pytest
from aiohttp import web
from gateway_world import (
    MODEL,
    PATIENCE,
    QUICK,
    Watched,
    connection,
    error_in,
    gateway,
    post,
    recorder,
    sdk,
    serve,
    status,
    talk,
)
from helpers import ask, until

import microbatch as mb
from microbatch.cli.console import UsageError
from microbatch.cli.environment import with_environment
from microbatch.cli.main import main, make_parser
from microbatch.gateway import GatewaySettings
from microbatch.testing import Latency, SimulatedEndpoint

pytestmark = pytest.mark.slow


SLOW = Latency(first_token=4, tokens_per_second=0)  # a loaded machine must manage to look in meanwhile
UPSTREAM = ("--upstream", "http://127.0.0.1:9/v1")


def body(text="x", **extra):
    return json.dumps({"model": MODEL, "messages": ask(text), **extra}).encode()


async def test_sigterm_answers_what_is_under_way_and_ends_with_0():
    async with Watched(latency=SLOW) as upstream:
        words = ("--upstream", upstream.base_url, "--port", "0", "--idle", "wait", "--max-wait", "30")
        async with serve(*words) as served, connection(served.port) as (reader, writer):
            # These wait for company when the signal comes, and one is relayed.
            asked = [asyncio.create_task(talk(served.port, post(body(f"t{number}")))) for number in range(5)]
            relayed = body("r", stream=True, n=2)
            asked.append(asyncio.create_task(talk(served.port, post(relayed))))
            async with aiohttp.ClientSession() as session:
                address = f"http://127.0.0.1:{served.port}"
                queued = 0
                async with asyncio.timeout(PATIENCE):
                    while queued < 5 or not upstream.calls:
                        async with session.get(f"{address}/stats") as response:
                            queued = (await response.json())["queued"]
                async with session.get(f"{address}/readyz") as response:
                    assert response.status == 200
                served.stop()
                ready = 200
                async with asyncio.timeout(PATIENCE):
                    while ready == 200:
                        async with session.get(f"{address}/readyz") as response:
                            ready = response.status
                assert ready == 503
            refused = await talk(served.port, post(body()))
            answers = await asyncio.gather(*asked)
            code, out, err = await served.ended()
            del reader, writer  # a connection on which nothing ever came does not hold up the end
    assert status(refused) == 503
    assert error_in(refused)["code"] == "shutting_down"
    assert [status(answer) for answer in answers] == [200] * 6
    assert all(f"re: t{number}".encode() in answers[number] for number in range(5))
    assert b"data: [DONE]" in answers[5]
    assert upstream.calls == 2
    assert code == 0
    assert out == ""
    assert "served 5 chat completions with 1 call, and relayed 1 request" in err
    assert "Traceback" not in err


async def test_after_the_grace_the_rest_is_told_and_the_end_comes():
    endless = Latency(first_token=600, tokens_per_second=0)
    async with (
        SimulatedEndpoint(latency=endless) as upstream,
        serve("--upstream", upstream.base_url, "--port", "0", "--grace", "0.3") as served,
    ):
        asked = asyncio.create_task(talk(served.port, post(body())))
        await until(lambda: upstream.calls)
        served.stop()
        answer = await asked
        code, _, err = await served.ended()
    assert (status(answer), error_in(answer)["code"]) == (503, "shutting_down")
    assert code == 0
    assert "1 failed" in err


async def test_a_gateway_within_a_program_closes_the_same_way():
    async with Watched(latency=Latency(first_token=0.3, tokens_per_second=0)) as upstream:
        served = await gateway(upstream, policy={"max_wait": 30}).open()
        asked = asyncio.create_task(talk(served.port, post(body())))
        await until(lambda: served.stats().queued)
        await served.aclose()
        assert status(await asked) == 200
        assert repr(served) == f"Gateway(127.0.0.1:{served.port}, closing, serving=0)"
        with pytest.raises(mb.BatcherClosed):
            await served.open()
        await served.aclose()


async def test_it_runs_as_an_application_in_a_server_of_ones_own():
    async def metrics(_request):
        return web.Response(text="calls 1")

    async with Watched() as upstream, aiohttp.ClientSession() as session:
        served = gateway(upstream, pages={"/metrics": metrics})
        runner = web.AppRunner(served.make_application(), handler_cancellation=True, auto_decompress=False)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{address}/v1/chat/completions", data=body(), headers=headers) as response:
            assert response.status == 200
        async with session.get(f"{address}/metrics") as response:
            assert await response.text() == "calls 1"
        async with session.get(f"{address}/healthz") as response:
            assert (response.status, "Server" in response.headers) == (200, False)
        await runner.cleanup()
        with pytest.raises(mb.BatcherClosed):
            await served.batcher.submit(ask("x"))


async def test_it_is_configured_by_the_environment_and_flags_come_first(tmp_path):
    token = tmp_path / "token"
    token.write_text("the-token\n")
    async with Watched(latency=QUICK) as upstream:
        environment = {
            "MICROBATCH_UPSTREAM": upstream.base_url,
            "MICROBATCH_PORT": "no number, and not looked at",
            "MICROBATCH_IDLE": "wait",
            "MICROBATCH_MAX_WAIT": "2",
            "MICROBATCH_MAX_BATCH_SIZE": "2",
            "MICROBATCH_LANE_HEADER": "X-Team, X-Room",
            "MICROBATCH_CACHE": str(tmp_path / "cache"),
            "MICROBATCH_EXACT_USAGE": "yes",
            "MICROBATCH_MODEL": "some-model",
        }
        async with serve("--port", "0", **environment) as served, sdk(served) as client:

            async def route(text, **headers):
                raw = await client.chat.completions.with_raw_response.create(
                    model="", messages=ask(text), extra_headers={f"X-{name}": value for name, value in headers.items()}
                )
                assert not hasattr(raw.parse().usage, "microbatch_estimated")
                return raw.headers["X-Microbatch-Route"]

            teams = [route(text, Team=team) for team in ("red", "blue") for text in "ab"]
            assert await asyncio.gather(*teams) == ["batch"] * 4
            assert upstream.calls == 2
            # A cache that is slower than 50 ms, on a busy machine, is passed by.
            async with asyncio.timeout(PATIENCE):
                while await route("a", Team="red") != "cache":  # noqa: ASYNC110 nothing tells
                    await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, {"port": 8080, "exact_usage": None, "lane_header": [], "single": False, "idle": None}),
        ({"PORT": "1", "IDLE": "wait", "MAX_WAIT": "0.5"}, {"port": 1, "idle": "wait", "max_wait": 0.5}),
        ({"EXACT_USAGE": "no", "SINGLE": "0", "NO_OWN_KEY": "on"}, {"exact_usage": False, "no_own_key": True}),
        ({"LANE_HEADER": "a, b", "ALLOWED_HOST": "c"}, {"lane_header": ["a", "b"], "allowed_host": ["c"]}),
        ({"PORT": "", "NAME": "x", "PARSER": "x", "COMMAND": "x"}, {"port": 8080, "name": "serve"}),
    ],
)
def test_every_flag_has_a_variable(environment, found):
    parser = make_parser().parse_args(["serve"]).parser
    args = with_environment(parser, [], {f"MICROBATCH_{name}": value for name, value in environment.items()})
    assert {name: getattr(args, name) for name in found if name != "name"} | {"name": "serve"} == found | {
        "name": "serve"
    }


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"PORT": "many"}, "MICROBATCH_PORT: 'many' is not a whole number"),
        ({"IDLE": "maybe"}, "MICROBATCH_IDLE: "),
        ({"EXACT_USAGE": "perhaps"}, "MICROBATCH_EXACT_USAGE: must be yes or no, got 'perhaps'"),
    ],
)
def test_a_wrong_variable_is_named(environment, told):
    parser = make_parser().parse_args(["serve"]).parser
    with pytest.raises(UsageError) as caught:
        with_environment(parser, [], {f"MICROBATCH_{name}": value for name, value in environment.items()})
    assert told in str(caught.value)


def test_flags_come_before_variables_in_any_spelling():
    parser = make_parser().parse_args(["serve"]).parser
    environment = {"MICROBATCH_PORT": "1", "MICROBATCH_EXACT_USAGE": "yes", "MICROBATCH_LANE_HEADER": "a"}
    args = with_environment(parser, ["--port=2", "--no-exact-usage", "--lane-header", "b"], environment)
    assert (args.port, args.exact_usage, args.lane_header) == (2, False, ["b"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no upstream: give --upstream URL"),
        (("--upstream", "localhost:8000"), "--upstream must be an address"),
        ((*UPSTREAM, "--access-token-file", "nowhere"), "--access-token-file nowhere: "),
        ((*UPSTREAM, "--access-token-file", "empty"), "--access-token-file empty: must hold at least 1 byte"),
        ((*UPSTREAM, "--secret-file", "empty"), "--secret-file empty: must hold at least 16 bytes"),
        ((*UPSTREAM, "--max-requests", "0"), "--max-requests must be a number of at least 1"),
        ((*UPSTREAM, "--upstream-timeout", "0"), "--upstream-timeout must be a number of at least 0.001"),
        ((*UPSTREAM, "--idle-timeout", "nan"), "--idle-timeout must be a number of at least 0.001"),
        ((*UPSTREAM, "--lane-header", "a b"), "no HTTP header name"),
        ((*UPSTREAM, "--lane-header", "Host"), "the header Host cannot be set"),
        ((*UPSTREAM, "--host", "192.0.2.1"), "cannot listen on 192.0.2.1:0"),
    ],
)
def test_wrong_settings_are_told_and_end_with_2(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "empty").write_text("\n")
    assert main(["serve", "--port", "0", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["upstream_timeout", "idle_timeout"])
def test_there_is_always_a_limit_to_what_the_upstream_may_take(name):
    with pytest.raises(mb.ConfigError, match=f"{name} must be a number of at least"):
        GatewaySettings(**{name: None})


@pytest.mark.parametrize("flag", ["--upstream-timeout", "--idle-timeout"])
async def test_the_command_limits_what_the_upstream_may_take(flag):
    before = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n' if flag == "--idle-timeout" else b""

    async def answer(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if before:
            await response.prepare(request)
            await response.write(before)
        await asyncio.sleep(2 * PATIENCE)
        return response

    async with recorder() as upstream:
        upstream.answer = answer
        async with serve("--upstream", upstream.url, "--port", "0", flag, "0.5") as served:
            answered = await talk(served.port, post(body(n=2, stream=True)))
    if before:
        assert before in answered  # and then it was broken off
    else:
        assert (status(answered), error_in(answered)["code"]) == (504, "upstream_timeout")
        assert "did not finish within 0.5 s" in error_in(answered)["message"]


async def test_a_taken_port_is_told():
    async with Watched() as upstream:
        with pytest.raises(AssertionError, match="choose another --port"):
            async with serve("--upstream", upstream.base_url, "--port", str(upstream.port)):
                pass


KEYS = """
import pathlib, sys
asked = pathlib.Path(sys.argv[1])
print("new" if asked.exists() else "old")
asked.touch()
"""


async def test_what_goes_with_every_request_and_where_the_log_goes(tmp_path):
    script, log = tmp_path / "key.py", tmp_path / "log.txt"
    script.write_text(KEYS)
    command = shlex.join([sys.executable, str(script), str(tmp_path / "asked")])
    words = ("--header", "X-Team=a", "--header", "Helicone-Auth=h", "--query", "api-version=1", "--timeout", "7")
    async with recorder() as upstream:

        async def answer(request):
            said = {"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop", "index": 0}
            return web.json_response(
                {"choices": [said]}, status=200 if request.headers.get("Authorization") == "Bearer new" else 401
            )

        upstream.answer = answer
        environment = {"MICROBATCH_LOG_FILE": str(log)}
        command_line = ("--upstream", upstream.url, "--port", "0", "--api-key-command", command, *words)
        async with serve(*command_line, **environment) as served:
            assert status(await talk(served.port, post(body(stop="x"), X_Microbatch_Batch="no"))) == 200
            assert status(await talk(served.port, post(body("y")))) == 200
            served.stop()
            code, _, told = await served.ended()
    assert code == 0
    assert "the key of --api-key-command" in told
    seen = [(path, headers) for _, path, headers, _ in upstream.requests]
    assert [headers.get("Authorization") for _, headers in seen[:2]] == ["Bearer old", "Bearer new"]
    assert all((headers["X-Team"], headers["Helicone-Auth"]) == ("a", "h") for _, headers in seen)
    assert all(path.endswith("?api-version=1") for path, _ in seen)
    assert "single call of 1" in log.read_text()


@pytest.mark.parametrize("name", ["Authorization", "api-key", "X-Goog-Api-Key"])
def test_a_key_in_a_header_is_refused_because_clients_would_use_it_without_a_token(capsys, name):
    assert main(["serve", *UPSTREAM, "--header", f"{name}=sk-secret"]) == 2
    told = capsys.readouterr().err
    assert f"--header {name}" in told
    assert "sk-secret" not in told


def test_the_time_limits_of_run_are_those_of_the_gateway_too():
    parser = make_parser().parse_args(["serve"]).parser
    args = with_environment(parser, ["--timeout", "7"], {"MICROBATCH_UPSTREAM_TIMEOUT": "9"})
    assert args.upstream_timeout == 7
