"""The record of each request for operators: ids, the access log, the metrics and the figures of the last hour."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gzip
import json
import os
import re
import select
import struct
import subprocess
import sys
import termios
import textwrap
from datetime import UTC, datetime

import pytest
from aiohttp import ClientSession, web
from gateway_world import (
    MODEL,
    ONE_ATTEMPT,
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
from prometheus_client.parser import text_string_to_metric_families

import microbatch as mb
from microbatch.gateway import Gateway
from microbatch.gateway.access_log import AccessLog, check_log
from microbatch.gateway.served import Served

KEY = "sk-someone-s-own-key"
SECRET_WORDS = "what nobody else may read"
PRICES = {MODEL: mb.Price(input=2.0, output=8.0)}


def chat(text="x", **more):
    return {"model": MODEL, "messages": ask(text), **more}


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


async def metrics(session, root):
    async with session.get(f"{root}/metrics") as answer:
        text = await answer.text()
    return text, {
        (sample.name.removeprefix("microbatch_"), *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def served_requests(samples, **labels):
    """The samples of the requests that were served, those with *labels*, together."""
    return sum(
        number
        for (name, *pairs), number in samples.items()
        if name == "http_requests_total" and labels.items() <= dict(pairs).items()
    )


def totals(hour):
    """Requests, errors, calls, calls saved, dollars spent and saved, and unpriced calls of the hour."""
    columns = [*zip(*(row[1:8] for row in hour["slices"]), strict=True)]
    known = [[number for number in column if number is not None] for column in columns]
    return [sum(numbers) if numbers else None for numbers in known]


class Client:
    """Asks a gateway with a key and shows what came back."""

    def __init__(self, served, session):
        self.root = served.base_url.removesuffix("/v1")
        self._session = session

    async def post(self, body, path="/v1/chat/completions", key=KEY, **headers):
        given = {"Authorization": f"Bearer {key}"} if key else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = {"json": body} if isinstance(body, dict) else {"data": body}
        async with self._session.post(f"{self.root}{path}", headers=given, **content) as answer:
            return answer.status, answer.headers, await answer.read()

    async def get(self, path):
        async with self._session.get(f"{self.root}{path}") as answer:
            return answer.status, answer.headers, await answer.read()

    async def hour(self):
        return json.loads((await self.get("/stats"))[2])["live"]["hour"]


# --- ids


async def test_every_answer_has_an_id_of_its_own_and_the_endpoints():
    async with Watched() as upstream, gateway(upstream) as served, ClientSession() as session:
        client = Client(served, session)
        found = await asyncio.gather(*(client.post(chat(str(number))) for number in range(3)))
    assert len({headers["X-Microbatch-Request-Id"] for _, headers, _ in found}) == 3
    assert {headers["X-Request-Id"] for _, headers, _ in found} == {"req_00000001"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("alone", [False, True])
async def test_a_clients_id_is_kept(stream, alone):
    async with Watched() as upstream, gateway(upstream) as served, ClientSession() as session:
        body = chat(stream=stream, **({"n": 2} if alone else {}))
        code, headers, _ = await Client(served, session).post(body, X_Request_Id="trace-1/a:b")
    assert code == 200
    assert headers["X-Request-Id"] == headers["X-Microbatch-Request-Id"] == "trace-1/a:b"


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "sk-abcdefghijklmnop", 'a"b', "é"])
async def test_an_id_that_is_none_is_replaced(given):
    async with Watched() as upstream, gateway(upstream) as served, ClientSession() as session:
        _, headers, _ = await Client(served, session).post(chat(), X_Request_Id=given)
    assert re.fullmatch(r"req_[0-9a-f]{24}", headers["X-Microbatch-Request-Id"])
    assert headers["X-Request-Id"] == "req_00000001"


async def test_refusals_and_pages_have_ids_too():
    async with Watched() as upstream, gateway(upstream) as served, ClientSession() as session:
        client = Client(served, session)
        answers = [await client.post({"messages": []}), await client.get("/nope"), await client.get("/healthz")]
        kept = await client.post(b"x", X_Request_Id="mine")
    assert [code for code, *_ in answers] == [400, 404, 200]
    for _, headers, _ in answers:
        assert headers["X-Request-Id"] == headers["X-Microbatch-Request-Id"]
    assert (kept[0], kept[1]["X-Request-Id"]) == (415, "mine")


async def test_a_caller_finds_its_own_name_in_the_figures():
    async with Watched() as upstream, gateway(upstream) as served, ClientSession() as session:
        client = Client(served, session)
        mine = (await client.post(chat()))[1]["X-Microbatch-Caller"]
        again = (await client.post(chat("again", n=2)))[1]["X-Microbatch-Caller"]
        other = (await client.post(chat(), key="sk-another"))[1]["X-Microbatch-Caller"]
        nobody = (await client.post(chat(), key=None))[1]
        callers = [row[0] for row in (await client.hour())["callers"]]
    assert mine == again != other
    assert "X-Microbatch-Caller" not in nobody
    assert set(callers) == {mine, other, "none"}


# --- the access log


async def test_each_request_is_a_line_without_texts_and_keys(tmp_path):
    log = tmp_path / "access.jsonl"
    async with Watched() as upstream:
        async with gateway(upstream, access_log=str(log), prices=PRICES) as served, ClientSession() as session:
            client = Client(served, session)
            texts = [f"{SECRET_WORDS} {number}" for number in range(3)]
            await asyncio.gather(*(client.post(chat(text), X_Request_Id=f"r{n}") for n, text in enumerate(texts)))
            await client.post(chat(SECRET_WORDS, n=2), X_Request_Id="alone")
            await client.post(chat(SECRET_WORDS, stream=True), X_Request_Id="streamed")
            await client.get("/stats")
        cost_usd = served.stats().cost_usd
    written = {line["id"]: line for line in lines(log)}
    assert sorted(written) == ["alone", "r0", "r1", "r2", "streamed"]
    for number in range(3):
        line = written[f"r{number}"]
        assert (line["status"], line["reason"], line["route"], line["batch_size"]) == (200, None, "batch", 3)
        assert (line["method"], line["path"], line["model"]) == ("POST", "/v1/chat/completions", MODEL)
        assert line["upstream_id"] == "req_00000001"
        assert 0 <= line["waited"] <= line["latency"]
        assert line["prompt_tokens"] > 0
        assert line["completion_tokens"] > 0
        assert line["cost_usd"] > 0
        assert not line["estimated"]
        assert datetime.fromisoformat(line["time"]) <= datetime.now(UTC)
    submitted = [line for line in written.values() if line["route"] != "forward"]
    assert sum(line["cost_usd"] for line in submitted) == pytest.approx(cost_usd)
    alone = written["alone"]
    assert (alone["route"], alone["status"]) == ("forward", 200)
    assert alone["cost_usd"] == pytest.approx((2.0 * alone["prompt_tokens"] + 8.0 * alone["completion_tokens"]) / 1e6)
    assert alone["prompt_tokens"] > 0
    assert written["streamed"]["route"] == "single"
    assert len({line["tenant"] for line in written.values()}) == 1
    text = log.read_text("utf-8")
    assert SECRET_WORDS not in text
    assert KEY not in text


async def test_a_line_has_the_cost_that_is_known_when_the_call_has_ended(tmp_path):
    log = tmp_path / "access.jsonl"
    async with Watched(latency=mb.testing.Latency(first_token=0, tokens_per_second=200)) as upstream:
        async with gateway(upstream, access_log=str(log), prices=PRICES) as served, ClientSession() as session:
            client = Client(served, session)
            texts = ["x" * 20 * number for number in range(1, 6)]
            await asyncio.gather(*(client.post(chat(text)) for text in texts))
        stats = served.stats()
    written = lines(log)
    assert [line["batch_size"] for line in written] == [5] * 5
    assert sum(line["prompt_tokens"] for line in written) == stats.prompt_tokens
    assert sum(line["completion_tokens"] for line in written) == stats.completion_tokens
    assert sum(line["cost_usd"] for line in written) == pytest.approx(stats.cost_usd)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("reported", [True, False])
async def test_a_relayed_stream_has_the_tokens_that_the_endpoint_reports(reported, encoding, tmp_path):
    log = tmp_path / "access.jsonl"
    usage = b'"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}' if reported else b'"usage":null'

    async def answer(_request):
        body = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}],' + usage + b"}\n\ndata: [DONE]\n\n"
        coded = gzip.compress(body) if encoding == "gzip" else body
        return web.Response(body=coded, headers={"Content-Type": "text/event-stream", "Content-Encoding": encoding})

    async with recorder() as upstream:
        upstream.answer = answer
        async with gateway(upstream.url, access_log=str(log), prices=PRICES) as served, ClientSession() as session:
            await Client(served, session).post(chat(n=2, stream=True))
    (line,) = lines(log)
    assert line["route"] == "forward"
    assert line.get("prompt_tokens") == (7 if reported else None)
    if reported:
        assert line["cost_usd"] == pytest.approx((7 * 2.0 + 3 * 8.0) / 1e6)


EDGE = {
    "no model": (post(b'{"messages": []}'), 400, "missing_model"),
    "no JSON": (post(b"{" + SECRET_WORDS.encode()), 400, "invalid_json"),
    "another type": (post(b"x", Content_Type="text/plain"), 415, "unsupported_media_type"),
    "too long": (post(b"{" + b" " * 2_000 + b"}"), 413, "body_too_long"),
    "another host": (post(host="evil.example"), 421, "unknown_host"),
    "no path": (post(path="/nope"), 404, "not_found"),
    "a word in a header": (post(X_Microbatch_Cache="perhaps"), 400, "invalid_header"),
    "a header twice": (post(Authorization="Bearer a\r\nAuthorization: Bearer b"), 400, "repeated_header"),
    "what it cannot expect": (post(Expect="miracles"), 417, "417"),
}


@pytest.mark.parametrize("name", EDGE)
async def test_what_is_refused_at_the_edge_is_counted_and_logged_with_its_reason(name, tmp_path):
    sent, code, reason = EDGE[name]
    log = tmp_path / "access.jsonl"
    settings = mb.gateway.GatewaySettings(max_body_bytes=1_000)
    async with Watched() as upstream:
        async with gateway(upstream, settings=settings, access_log=str(log)) as served, ClientSession() as session:
            assert status(await talk(served.port, sent)) == code
            client = Client(served, session)
            _, samples = await metrics(session, client.root)
            figures = json.loads((await client.get("/stats"))[2])["live"]
        assert upstream.heard == []
    assert served_requests(samples, status=str(code), reason=reason, route="none") == 1
    by_status = {dict(labels)["status"] for sample, *labels in samples if sample == "http_caller_requests_total"}
    assert by_status == {str(code)}
    assert figures["errors"] == {reason: 1}
    assert totals(figures["hour"])[:2] == [1, 1]
    (line,) = lines(log)
    assert (line["status"], line["reason"], line["route"]) == (code, reason, None)
    assert SECRET_WORDS not in log.read_text("utf-8")


async def test_callers_without_a_key_are_counted_when_they_are_refused():
    guarded = {"api_key": "sk-the-gateway-s", "access_token": "token"}
    async with Watched() as upstream, gateway(upstream, **guarded) as served, ClientSession() as session:
        client = Client(served, session)
        assert (await client.post(chat(), key=None))[0] == 401
        assert (await client.post({"model": MODEL, "input": "x"}, "/v1/moderations", key="token"))[0] == 403
        _, samples = await metrics(session, client.root)
    assert served_requests(samples, status="401", reason="no_key") == 1
    assert served_requests(samples, status="403", reason="own_key_only") == 1


async def test_a_gateway_that_is_full_or_closing_counts_whom_it_turns_away(tmp_path):
    log = tmp_path / "access.jsonl"
    async with recorder() as upstream:
        go = asyncio.Event()

        async def slow(_request):
            await go.wait()
            return web.json_response({})

        upstream.answer = slow
        settings = mb.gateway.GatewaySettings(max_requests=1)
        async with gateway(upstream.url, settings=settings, access_log=str(log)) as served, ClientSession() as session:
            client = Client(served, session)
            first = asyncio.create_task(client.post(chat(n=2)))
            await until(lambda: upstream.requests)
            assert (await client.post(chat()))[0] == 503
            _, samples = await metrics(session, client.root)
            assert served_requests(samples, status="503", reason="Overloaded") == 1
            go.set()
            assert (await first)[0] == 200
    assert [line["reason"] for line in lines(log)] == ["Overloaded", None]


@pytest.mark.parametrize("body", [chat("x", n=2), {"model": MODEL, "input": [1, 2]}], ids=["chat", "embeddings"])
@pytest.mark.parametrize("code", [200, 204, 404, 429, 500])
async def test_relayed_requests_are_counted_with_the_status_that_the_endpoint_gave_them(body, code, tmp_path):
    log = tmp_path / "access.jsonl"
    path = "/v1/chat/completions" if "messages" in body else "/v1/embeddings"

    async def answer(_request):
        return web.json_response({"error": {"message": SECRET_WORDS, "code": SECRET_WORDS}}, status=code)

    async with recorder() as upstream:
        upstream.answer = answer
        async with gateway(upstream.url, access_log=str(log)) as served, ClientSession() as session:
            client = Client(served, session)
            got, headers, _ = await client.post(body, path)
            _, samples = await metrics(session, client.root)
            hour = await client.hour()
    failed = code >= 400
    assert got == code
    assert served_requests(samples, route="forward", status=str(code), reason="upstream" if failed else "") == 1
    # A model is named once it has been answered; before, it may be made up.
    names = {"model": "other models", "tenant": "other tenants"}
    if not failed:
        names = {"model": MODEL, "tenant": headers["X-Microbatch-Caller"]}
    assert samples["http_caller_requests_total", *sorted({**names, "status": str(code)}.items())] == 1
    assert totals(hour)[:4] == [1, failed, 1, 0]
    (line,) = lines(log)
    assert (line["status"], line["route"], line["model"]) == (code, "forward", MODEL)
    assert SECRET_WORDS not in log.read_text("utf-8")


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_that_the_endpoint_refuses_are_counted_by_class_and_never_by_its_words(stream, tmp_path):
    log = tmp_path / "access.jsonl"

    async def answer(_request):
        return web.json_response({"error": {"message": SECRET_WORDS, "code": SECRET_WORDS}}, status=400)

    async with recorder() as upstream:
        upstream.answer = answer
        async with gateway(upstream.url, retry=ONE_ATTEMPT, access_log=str(log)) as served, ClientSession() as session:
            client = Client(served, session)
            await client.post(chat(stream=stream))
            text, samples = await metrics(session, client.root)
            errors = json.loads((await client.get("/stats"))[2])["live"]["errors"]
    assert served_requests(samples, reason="BadRequest") == 1
    assert errors == {"BadRequest": 1}  # once, though the events tell of it, too
    assert SECRET_WORDS not in text
    assert [line["reason"] for line in lines(log)] == ["BadRequest"]
    assert SECRET_WORDS not in log.read_text("utf-8")


async def test_an_endpoint_that_cannot_be_reached_is_a_reason(tmp_path):
    log = tmp_path / "access.jsonl"
    async with (
        gateway("http://127.0.0.1:9/v1", retry=ONE_ATTEMPT, access_log=str(log)) as served,
        ClientSession() as session,
    ):
        client = Client(served, session)
        assert (await client.post(chat()))[0] == 502
        assert (await client.post(chat(n=2)))[0] == 502
        _, samples = await metrics(session, client.root)
        errors = json.loads((await client.get("/stats"))[2])["live"]["errors"]
    assert served_requests(samples, reason="ConnectFailed", status="502") == 2
    assert errors == {"ConnectFailed": 2}
    assert [line["route"] for line in lines(log)] == [None, "forward"]


async def test_a_client_that_leaves_is_logged_and_is_no_error(tmp_path):
    log = tmp_path / "access.jsonl"
    async with recorder() as upstream:
        upstream.answer = lambda _request: asyncio.Event().wait()
        async with gateway(upstream.url, access_log=str(log)) as served, ClientSession() as session:
            async with connection(served.port) as (_, writer):
                body = json.dumps(chat()).encode()
                writer.write(post(body))
                await until(lambda: upstream.requests)
            client = Client(served, session)
            await until(lambda: "serving=0" in repr(served))
            _, samples = await metrics(session, client.root)
            assert totals(await client.hour())[:2] == [1, 0]
            assert json.loads((await client.get("/stats"))[2])["live"]["errors"] == {}
    assert served_requests(samples, status="499", reason="disconnected") == 1
    assert [(line["status"], line["reason"]) for line in lines(log)] == [(499, "disconnected")]


async def test_an_answer_that_the_endpoint_breaks_off_has_its_reason(tmp_path):
    log = tmp_path / "access.jsonl"

    async def answer(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: {}\n\n")
        request.transport.abort()
        return response

    async with recorder() as upstream:
        upstream.answer = answer
        async with gateway(upstream.url, access_log=str(log)) as served:
            await talk(served.port, post(json.dumps(chat(n=2, stream=True)).encode()))
            await until(lambda: "serving=0" in repr(served))
    assert [(line["status"], line["reason"]) for line in lines(log)] == [(200, "ConnectFailed")]


async def test_keys_in_addresses_and_models_do_not_get_into_log_and_metrics(tmp_path):
    log = tmp_path / "access.jsonl"
    key = "sk-abcdefghijklmnopqrstuvwx"
    async with recorder() as upstream, gateway(upstream.url, access_log=str(log)) as served, ClientSession() as session:
        client = Client(served, session)
        await client.post(chat(n=2) | {"model": key}, f"/v1/chat/completions?api-key={key}", X_Request_Id=key)
        await client.get(f"/v1/files/{key}")
        await client.get(f"/{key}")
        text, _ = await metrics(session, client.root)
        figures = (await client.get("/stats"))[2].decode()
    assert len(lines(log)) == 3
    for shown in (log.read_text("utf-8"), text, figures):
        assert key not in shown


async def test_a_file_that_cannot_be_opened_is_a_mistake_in_the_settings(tmp_path):
    with pytest.raises(mb.ConfigError, match=r"access log .* cannot be opened"):
        Gateway("http://localhost:1/v1", access_log=str(tmp_path / "none" / "log"))


LONG_RECORD = Served(id="x" * 128, id_given=True, method="POST", path="/" + "x" * 300, began=0.0, status=200)


@contextlib.contextmanager
def unread_pipe(tmp_path, monkeypatch):
    """Yield a log that writes to a pipe, and the other end of the pipe; closing the log does not wait long."""
    monkeypatch.setattr("microbatch.gateway.access_log._CLOSING_SECONDS", 0.1)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield AccessLog(str(path)), reading
    finally:
        os.close(reading)


async def test_a_pipe_that_is_not_read_delays_nothing_and_what_it_lacks_is_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("microbatch.gateway.access_log.MOST_WAITING", 50)
    with unread_pipe(tmp_path, monkeypatch) as (log, _):
        for _ in range(5_000):  # a pipe holds 64 KB
            log.write(LONG_RECORD)
        await log.aclose()
        assert log.dropped > 4_000
        assert "lacks" in caplog.text


async def test_lines_that_wait_when_the_log_is_closed_are_counted_as_lost(tmp_path, caplog, monkeypatch):
    with unread_pipe(tmp_path, monkeypatch) as (log, reading):
        for _ in range(3_000):
            log.write(LONG_RECORD)
        await log.aclose()
        (size,) = struct.unpack("i", fcntl.ioctl(reading, termios.FIONREAD, b"\0" * 4))
        there = os.read(reading, size).count(b"\n")
        assert 0 < there < 3_000
        assert f"lacks {3_000 - there} lines" in caplog.text


async def test_a_pipe_without_a_reader_is_an_error_and_not_waited_for(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(mb.ConfigError, match="nothing reads"):
        await asyncio.wait_for(asyncio.to_thread(AccessLog, str(path)), 10)
    check_log(str(path))


def test_a_check_does_not_end_the_reader_of_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_log(str(path))
        polled = select.poll()
        polled.register(reading, select.POLLHUP)
        assert polled.poll(0) == []  # a pipe that had a writer and has none tells of its end
    finally:
        os.close(reading)


def test_a_line_that_a_full_disk_cut_spoils_no_other(tmp_path):
    path = tmp_path / "log"
    program = """
        import asyncio, logging, resource, signal, sys
        from microbatch.gateway.access_log import AccessLog
        from microbatch.gateway.served import Served
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        def limit(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        async def main():
            log = AccessLog(sys.argv[1])
            def write(number):
                log.write(Served(id=f"{number}", id_given=True, method="POST", path="/", began=0.0, status=200))
            async def written(condition):
                while not condition():
                    await asyncio.sleep(0.01)
            write(0)
            await written(lambda: log.dropped == 0)
            for number in (1, 2):
                limit(open(sys.argv[1], "rb").seek(0, 2) + 50)
                write(number)
                await written(lambda: log._failed)
                limit(resource.RLIM_INFINITY)
                write(f"after {number}")
                await written(lambda: log.dropped == number)
            await log.aclose()
        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.count("cannot be written") == 2
    assert "lacks 2 lines" in done.stdout
    found = path.read_text("utf-8").splitlines()
    whole = [json.loads(line)["id"] for line in found if line.endswith("}")]
    assert whole == ["0", "after 1", "after 2"]
    assert len(found) == 5


@pytest.mark.parametrize("known", [None, "ServerError"])
def test_a_connection_that_ends_has_the_status_499_whatever_else_went_wrong(known):
    record = Served(id="x", id_given=True, method="POST", path="/", began=0.0)
    if known is not None:
        record.fail(known)
    record.disconnect()
    assert (record.status, record.reason) == (499, known or "disconnected")


@pytest.mark.parametrize("char", ["\u2028", "\x85", "\x9b", "\n", "\u202e", "\udcff"], ids=ascii)
def test_no_character_of_a_client_ends_or_disguises_a_line(char):
    record = Served(id="x", id_given=True, method="POST", path=f"/a{char}b", model=f"é{char}", began=0.0, status=200)
    line = record.line("now")
    assert (line["path"], line["model"]) == ("/a\ufffdb", "é\ufffd")


async def test_lines_go_to_a_pipe_in_pieces_that_no_other_process_can_tear(tmp_path, monkeypatch):
    path, written, write = tmp_path / "pipe", [], os.write
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        log = AccessLog(str(path))
        monkeypatch.setattr(
            "microbatch.gateway.access_log.os.write", lambda *args: written.append(args[1]) or write(*args)
        )
        for number in range(200):
            log.write(
                Served(id=f"{number}", id_given=True, method="POST", path="/" + "x" * number, began=0.0, status=200)
            )
        await log.aclose()
    finally:
        os.close(reading)
    pieces = [bytes(piece) for piece in written]
    assert all(len(piece) <= select.PIPE_BUF and piece.endswith(b"\n") for piece in pieces)
    assert [json.loads(line)["id"] for line in b"".join(pieces).splitlines()] == [str(number) for number in range(200)]
    assert len(pieces) < 100


async def test_a_line_is_never_longer_than_such_a_piece(tmp_path):
    log = AccessLog(str(tmp_path / "log"))
    worst = "\0" * 300
    fields = {
        "model": worst,
        "upstream_id": "é" * 300,
        "tenant": worst,
        "reason": "x" * 60,
        "spent": (mb.Usage(1, 2), 0.1),
    }
    log.write(Served(id="x" * 128, id_given=True, method="P" * 300, path=worst, began=0.0, status=200, **fields))
    await log.aclose()
    assert len((tmp_path / "log").read_bytes()) <= select.PIPE_BUF


async def test_a_log_that_is_closed_writes_nothing_more(tmp_path, capsys):
    log = AccessLog(str(tmp_path / "log"))
    await log.aclose()
    log.write(Served(id="x", id_given=True, method="POST", path="/v1/x", began=0.0, status=200))
    await log.aclose()
    assert ((tmp_path / "log").read_bytes(), capsys.readouterr().out, log.dropped) == (b"", "", 1)


async def test_standard_output_may_be_any_object(capsys):
    log = AccessLog("-")
    record = Served(id="x", id_given=True, method="POST", path="/v1/x", began=0.0, status=200)
    log.write(record)
    log.write(record)
    await log.aclose()
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["x", "x"]


async def test_a_full_disk_is_said_once_and_ends_nothing(caplog):
    log = AccessLog("/dev/full")
    record = Served(id="x", id_given=True, method="POST", path="/v1/x", began=0.0, status=200)
    for _ in range(3):
        log.write(record)
        await until(log._waiting.empty)
    await log.aclose()
    assert log.dropped == 3
    assert caplog.text.count("cannot be written") == 1


# --- metrics by model and tenant


async def test_requests_calls_tokens_and_dollars_have_model_and_tenant():
    async with Watched() as upstream, gateway(upstream, prices=PRICES) as served, ClientSession() as session:
        client = Client(served, session)
        found = await asyncio.gather(*(client.post(chat(str(number))) for number in range(3)))
        await client.post(chat("x"), key="sk-another")
        text, samples = await metrics(session, client.root)
        stats = served.stats()
    caller = {"model": MODEL, "tenant": found[0][1]["X-Microbatch-Caller"]}
    assert samples["caller_requests_total", *sorted({**caller, "outcome": "answered"}.items())] == 3
    assert samples["caller_calls_total", *sorted({**caller, "route": "batch"}.items())] == 1
    assert samples["http_caller_requests_total", *sorted({**caller, "status": "200"}.items())] == 3
    dollars = dict(by_name(samples, "caller_cost_usd_total"))
    assert len(dollars) == 2
    assert sum(dollars.values()) == pytest.approx(stats.cost_usd)
    assert KEY not in text
    assert "sk-another" not in text


def by_name(samples, name):
    return [((key[0], tuple(key[1:])), number) for key, number in samples.items() if key[0] == name]


async def test_refused_keys_and_made_up_tenants_are_a_bounded_number_of_labels():
    async with (
        Watched(api_keys=["sk-good"]) as upstream,
        gateway(upstream, retry=ONE_ATTEMPT) as served,
        ClientSession() as session,
    ):
        client = Client(served, session)
        for number in range(0, 80, 20):
            await asyncio.gather(*(client.post(chat(), key=f"sk-bad-{n}") for n in range(number, number + 20)))
        _, samples = await metrics(session, client.root)
        refused = {dict(labels)["tenant"] for (_, labels), _ in by_name(samples, "http_caller_requests_total")}
        assert refused == {"other tenants"}
        for number in range(0, 100, 20):
            await asyncio.gather(
                *(client.post(chat(), key="sk-good", X_Microbatch_Tenant=f"t{n}") for n in range(number, number + 20))
            )
        _, samples = await metrics(session, client.root)
        hour = await client.hour()
    tenants = {dict(labels)["tenant"] for (_, labels), _ in by_name(samples, "http_caller_requests_total")}
    assert len(tenants) == 65
    assert len(hour["callers"]) == 65
    assert sum(row[1] for row in hour["callers"]) == 180


async def test_dollars_are_not_zero_where_there_is_no_price():
    async with Watched() as upstream, gateway(upstream, prices={}) as served, ClientSession() as session:
        client = Client(served, session)
        await client.post(chat() | {"model": "without a price"})
        _, samples = await metrics(session, client.root)
        hour = await client.hour()
    assert by_name(samples, "caller_cost_usd_total") == []
    assert samples["unpriced_calls_total",] == 1
    assert totals(hour)[4:] == [None, None, 1]
    assert hour["models"][0][5:8] == [None, None, 1]


# --- the command


@pytest.mark.slow
async def test_the_command_writes_the_log_to_standard_output_or_a_file(tmp_path):
    log = tmp_path / "log"
    async with Watched() as upstream:
        for words in (["-"], [str(log)], ["none"], []):
            flags = ["--access-log", *words] if words else []
            async with serve("--upstream", upstream.base_url, "--port", "0", *flags) as served:
                async with sdk(served) as client:
                    await client.chat.completions.create(**chat())
                served.stop()
                code, out, err = await served.ended()
            assert code == 0, err
            written = out if words == ["-"] else log.read_text() if words == [str(log)] else ""
            assert [json.loads(line)["status"] for line in written.splitlines()] == ([200] if written else [])
            assert (len(out.splitlines()), len(written.splitlines())) == (words == ["-"], words in (["-"], [str(log)]))


@pytest.mark.slow
async def test_beyond_this_machine_the_command_logs_by_default():
    async with Watched() as upstream:
        flags = ("--upstream", upstream.base_url, "--port", "0", "--host", "0.0.0.0")
        async with serve(*flags) as served:
            answer = await talk(served.port, post(b"{}"))
            served.stop()
            code, out, err = await served.ended()
    assert error_in(answer)["code"] == "missing_model"
    assert code == 0, err
    assert [json.loads(line)["reason"] for line in out.splitlines()] == ["missing_model"]


# --- odd requests


@pytest.mark.slow
async def test_a_request_whose_model_is_no_name_is_recorded_like_any_other(tmp_path):
    log = tmp_path / "access.jsonl"
    models = [5, ["m"], {"m": 1}, True, 1.5]
    paths = ["/v1/chat/completions", "/v1/embeddings"]
    async with recorder() as upstream:
        async with gateway(upstream.url, access_log=str(log)) as served, ClientSession() as session:
            client = Client(served, session)
            for path in paths:
                for model in models:
                    status, _, _ = await client.post({**chat(), "input": "x", "model": model}, path)
                    assert status == 203
            assert totals(await client.hour())[0] == len(models) * len(paths)
        assert [(line["status"], line["model"]) for line in lines(log)] == [(203, None)] * len(models) * len(paths)
