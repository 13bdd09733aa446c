"""Where the gateway listens and to whom it answers: Unix sockets, TLS, web pages of other origins, and bytes that are no HTTP."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import signal
import socket
import ssl
import stat
import sys
import termios

import pytest
from aiohttp import ClientSession, ClientSSLError, TCPConnector, UnixConnector, web
from aiohttp.test_utils import make_mocked_request
from certificates import make_certificate, trusting
from gateway_world import MODEL, PATIENCE, Watched, connection, error_in, gateway, post, recorder, serve, status, talk
from helpers import ask, until

import microbatch as mb
from microbatch.cli.main import main
from microbatch.gateway.cors import Cors
from microbatch.gateway.place import Place

NOWHERE = ("--upstream", "http://127.0.0.1:9/v1")
CHAT = {"model": MODEL, "messages": ask("x")}


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# --- Unix sockets


async def asked(path):
    """Return the status of a chat completion over a Unix socket."""
    async with (
        ClientSession(connector=UnixConnector(str(path))) as session,
        session.post("http://localhost/v1/chat/completions", json=CHAT) as answer,
    ):
        return answer.status


async def test_it_listens_on_a_unix_socket_that_only_its_user_may_use(tmp_path):
    path = tmp_path / "s"
    async with Watched() as upstream:
        async with gateway(upstream, uds=str(path)) as served:
            assert await asked(path) == 200
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert served.base_url == "http://localhost/v1"
        assert list(tmp_path.iterdir()) == []


async def test_its_permissions_can_be_chosen(tmp_path):
    async with Watched() as upstream, gateway(upstream, uds=str(tmp_path / "s"), uds_mode=0o660):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o660


async def test_a_socket_that_was_left_behind_is_replaced(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    async with Watched() as upstream, gateway(upstream, uds=str(path)):
        assert await asked(path) == 200


@pytest.mark.parametrize("backlog", [0, 5])
def test_a_socket_in_use_is_an_error_and_stays(backlog, tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as used:
        used.bind(str(path))
        used.listen(backlog)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range((backlog and 1) or 2)]
        for each in waiting:  # without a backlog these fill it
            each.setblocking(False)
            each.connect_ex(str(path))
        with pytest.raises(OSError, match="another process listens there"):
            Place(uds=str(path)).listen()
        for each in waiting:
            each.close()
    assert list(tmp_path.iterdir()) == [path]


async def test_a_socket_of_another_gateway_that_took_the_name_is_not_removed(tmp_path):
    path = tmp_path / "s"
    async with Watched() as upstream:
        first = await gateway(upstream, uds=str(path)).open()
        path.unlink()
        async with gateway(upstream, uds=str(path)):
            await first.aclose()
            assert await asked(path) == 200


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("--uds", "file"),
            "cannot listen on file: there is a file of this name that is no socket; choose another --uds",
        ),
        (("--uds", "no/such/s"), "cannot listen on no/such/s: No such file or directory"),
        (("--uds", "x" * 120), "may have about 100 bytes"),
        (("--tls-cert", "none"), "the TLS file none cannot be read: No such file"),
        (("--tls-cert", "file"), "the TLS file file holds no certificate in PEM\n"),
        (("--tls-key", "file"), "--tls-key needs --tls-cert"),
        (("--tls-cert", "one.crt", "--tls-key", "two.key"), "the TLS key two.key does not belong to the certificate"),
        (
            ("--tls-cert", "one.crt"),
            "the TLS file one.crt holds no private key in PEM; give the file of the key as --tls-key\n",
        ),
        (("--tls-cert", "one.key", "--tls-key", "one.crt"), "the TLS file one.key holds no certificate in PEM\n"),
        (("--tls-cert", "one.crt", "--tls-key", "file"), "the TLS file file holds no private key in PEM\n"),
        (("--tls-cert", "torn.crt", "--tls-key", "one.key"), "the TLS files torn.crt and one.key cannot be used ("),
        (("--tls-cert", "locked.crt", "--tls-key", "locked.key"), "the TLS key locked.key is encrypted"),
        (("--cors-origin", "*"), "the CORS origin '*' must be exact"),
        (("--cors-origin", "null"), "the CORS origin 'null' must be exact"),
        (("--cors-origin", "https://app.example/"), "(a scheme, a host and at most a port, without a path)"),
        (("--cors-origin", "app.example"), "(a scheme, a host and at most a port, without a path)"),
        (("--cors-origin", "http://x:70000"), "a port below 65,536"),
        (("--upstream-uds", ""), "--upstream-uds"),
    ],
)
def test_wrong_settings_are_told_at_the_start(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for name, password in (("one", None), ("two", None), ("locked", "secret")):
        make_certificate(tmp_path, name, password=password)
    (tmp_path / "torn.crt").write_bytes((tmp_path / "one.crt").read_bytes()[:200])
    assert main(["serve", "--port", "0", *NOWHERE, *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", [("serve", *NOWHERE), ("serve", *NOWHERE, "--workers", "2"), ("simulate",)])
@pytest.mark.parametrize(
    ("host", "taken"),
    [("192.0.2.1", False), ("::1::1", False), ("x" * 70, False), ("a..b", False), ("127.0.0.1", True)],
)
def test_the_advice_is_about_that_which_is_wrong(command, host, taken, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main([*command, "--host", host, "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert f"cannot listen on {host}:{port}: " in told
    assert ("choose another --port" in told, "choose a --host" in told) == (taken, not taken)


def test_a_mode_is_three_octal_digits(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["serve", *NOWHERE, "--uds", "s", "--uds-mode", "999"])
    assert caught.value.code == 2
    assert "must be three octal digits" in capsys.readouterr().err


async def test_a_name_with_several_addresses_has_one_port_on_all():
    sockets = Place(host="localhost").listen()
    try:
        assert len({each.getsockname()[1] for each in sockets}) == 1
    finally:
        for each in sockets:
            each.close()


# --- TLS


async def test_it_speaks_tls_and_reads_a_renewed_certificate_again(tmp_path):
    certificate, key = make_certificate(tmp_path, "old")
    old, new = trusting(certificate), make_certificate(tmp_path, "new")

    async def health(context):
        address = served.base_url.removesuffix("/v1") + "/healthz"
        async with ClientSession(connector=TCPConnector(ssl=context)) as session, session.get(address) as answer:
            return answer.status

    async with Watched() as upstream, gateway(upstream, tls_cert=str(certificate), tls_key=str(key)) as served:
        assert served.base_url.startswith("https://127.0.0.1:")
        assert await health(old) == 200
        async with ClientSession(connector=TCPConnector(ssl=old)) as kept:
            address = served.base_url.removesuffix("/v1") + "/healthz"
            assert (await kept.get(address)).status == 200
            key.write_text("broken")
            with pytest.raises(mb.ConfigError, match="TLS"):
                served.reload()
            assert await health(old) == 200
            for target, source in zip((certificate, key), new, strict=True):
                target.write_bytes(source.read_bytes())
            served.reload()
            assert await health(trusting(new[0])) == 200
            with pytest.raises(ClientSSLError):
                await health(old)
            assert (await kept.get(address)).status == 200  # a connection that was open stays


@pytest.mark.parametrize("kinds", [("ec", "rsa"), ("rsa", "ec")], ids="-".join)
async def test_a_renewed_certificate_may_have_a_key_of_another_type(kinds, tmp_path):
    (certificate, key), new = (make_certificate(tmp_path, kind, kind=kind) for kind in kinds)
    async with Watched() as upstream, gateway(upstream, tls_cert=str(certificate), tls_key=str(key)) as served:
        for target, source in zip((certificate, key), new, strict=True):
            target.write_bytes(source.read_bytes())
        served.reload()
        for name in (None, "localhost"):  # without a name, as clients of an address, and with one
            context = trusting()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            _, writer = await asyncio.open_connection("127.0.0.1", served.port, ssl=context, server_hostname=name or "")
            shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            assert ssl.DER_cert_to_PEM_cert(shown) == new[0].read_text()


async def test_bytes_that_are_no_tls_end_their_connection_only(tmp_path):
    certificate, key = make_certificate(tmp_path)
    async with Watched() as upstream, gateway(upstream, tls_cert=str(certificate), tls_key=str(key)) as served:
        assert await talk(served.port, post()) == b""


# --- CORS

PAGE = "https://app.example"


async def preflight(session, served, origin=PAGE, path="/v1/chat/completions", **headers):
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"} | headers
    asked = {name.replace("_", "-"): value for name, value in asked.items()}
    async with session.options(served.base_url.removesuffix("/v1") + path, headers=asked) as answer:
        return answer.status, answer.headers


async def test_pages_of_the_origins_may_ask_and_read_answers():
    origins = ["HTTPS://App.Example:443", "http://localhost:3000"]
    async with Watched() as upstream, gateway(upstream, cors_origins=origins) as served, ClientSession() as session:
        wanted = "authorization,content-type,x-stainless-lang"
        code, allowed = await preflight(session, served, Access_Control_Request_Headers=wanted)
        assert code == 204
        assert allowed["Access-Control-Allow-Origin"] == PAGE
        assert allowed["Access-Control-Allow-Headers"] == wanted
        assert "POST" in allowed["Access-Control-Allow-Methods"]
        assert "Access-Control-Allow-Private-Network" not in allowed
        _, local = await preflight(session, served, Access_Control_Request_Private_Network="true")
        assert local["Access-Control-Allow-Private-Network"] == "true"
        for body in (CHAT, CHAT | {"n": 2}, CHAT | {"stream": True}, {"no": "model"}):
            address = f"{served.base_url}/chat/completions"
            async with session.post(address, json=body, headers={"Origin": "http://localhost:3000"}) as answer:
                assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
                assert "x-microbatch-request-id" in answer.headers["Access-Control-Expose-Headers"]
                assert answer.headers["Vary"] == "Origin"
                assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://app.example.evil", "http://app.example", "null", "*"]
)
async def test_no_other_page_may(origin):
    async with Watched() as upstream, gateway(upstream, cors_origins=[PAGE]) as served, ClientSession() as session:
        code, headers = await preflight(session, served, origin)
        assert code == 403
        async with session.get(f"{served.base_url}/models", headers={"Origin": origin}) as answer:
            assert answer.headers["Vary"] == "Origin"
            found = {name for head in (headers, answer.headers) for name in head if name.startswith("Access-Control")}
    assert found == set()


def test_all_that_an_answer_varies_by_is_kept():
    request, response = make_mocked_request("GET", "/v1/models"), web.Response()
    response.headers.add("Vary", "Accept")
    response.headers.add("Vary", "Accept-Language")
    Cors([PAGE]).mark(request, response)
    assert response.headers.getall("Vary") == ["Accept, Accept-Language, Origin"]


async def test_no_page_may_read_the_gateways_own_pages_and_without_origins_nothing_is_said():
    async with Watched() as upstream, ClientSession() as session:
        async with gateway(upstream, cors_origins=[PAGE]) as served:
            for path in ("/stats", "/metrics", "/dashboard", "/healthz"):
                async with session.get(f"http://127.0.0.1:{served.port}{path}", headers={"Origin": PAGE}) as answer:
                    assert not [name for name in answer.headers if name.startswith("Access-Control")]
        async with (
            gateway(upstream) as served,
            session.get(f"{served.base_url}/models", headers={"Origin": PAGE}) as answer,
        ):
            assert not [name for name in answer.headers if name.startswith("Access-Control")]
            assert "Vary" not in answer.headers


async def test_a_question_of_a_browser_is_relayed_without_origins():
    async with recorder() as upstream, gateway(upstream.url) as served, ClientSession() as session:
        code, _ = await preflight(session, served)
        assert (code, upstream.requests[0][0]) == (203, "OPTIONS")


# --- bytes that are no HTTP

UNREADABLE = {
    "no HTTP": b"\x16\x03\x01 hello\r\n\r\n",
    "a header without a name": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n",
    "two lengths": b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a long line": b"GET /v1/" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a long header": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sk-secret"
    + b"y" * 20_000
    + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_a_request_that_cannot_be_read_is_answered_counted_and_logged(name, tmp_path):
    log = tmp_path / "log"
    async with Watched() as upstream, gateway(upstream, access_log=str(log)) as served, ClientSession() as session:
        answer = await talk(served.port, UNREADABLE[name])
        async with session.get(f"http://127.0.0.1:{served.port}/metrics") as shown:
            metrics = await shown.text()
    assert (status(answer), error_in(answer)["code"]) == (400, "unreadable_request")
    (line,) = lines(log)
    assert (line["status"], line["reason"], line["route"]) == (400, "unreadable_request", None)
    assert f"X-Microbatch-Request-Id: {line['id']}".encode() in answer
    assert 'reason="unreadable_request",route="none",status="400"' in metrics
    assert b"sk-secret" not in answer + log.read_bytes()


async def test_what_cannot_be_read_behind_a_sound_request_is_one_line_more(tmp_path):
    log = tmp_path / "log"
    async with Watched() as upstream, gateway(upstream, access_log=str(log)) as served:
        sound = json.dumps(CHAT).encode()
        async with connection(served.port) as (reader, writer), asyncio.timeout(PATIENCE):
            writer.write(post(sound, Connection="keep-alive"))
            await reader.readuntil(b"chat.completion")
            writer.write(UNREADABLE["no HTTP"])
            assert b" 400 " in await reader.read()
    assert sorted(line["status"] for line in lines(log)) == [200, 400]


# --- SIGHUP


@pytest.mark.slow
async def test_a_hangup_reads_prices_and_keys_again_and_loses_nothing(tmp_path):
    prices, token, log, key = (tmp_path / name for name in ("prices.json", "token", "log", "key"))
    prices.write_text(json.dumps({MODEL: {"input": 1_000_000, "output": 0}}))
    token.write_text("first")
    key.write_text("sk-old")
    words = ("--prices", str(prices), "--access-token-file", str(token), "--access-log", str(log))
    async with Watched() as upstream:
        command = ("--api-key-command", f"cat {key}", "--upstream", upstream.base_url, "--port", "0", *words)
        async with serve(*command) as served, ClientSession() as session:

            async def chat(with_token):
                headers = {"Authorization": f"Bearer {with_token}"}
                async with session.post(f"{served.base_url}/chat/completions", json=CHAT, headers=headers) as answer:
                    return answer.status

            async def told(word):
                async with asyncio.timeout(PATIENCE):
                    while word not in (line := (await served.process.stderr.readline()).decode()):
                        assert line

            assert await chat("first") == 200
            prices.write_text("broken")
            token.write_text("second")
            served.process.send_signal(signal.SIGHUP)
            await told("not reloaded")
            assert (await chat("first"), await chat("second")) == (200, 200)
            prices.write_text(json.dumps({MODEL: {"input": 2_000_000, "output": 0}}))
            key.write_text("sk-new")
            log.rename(tmp_path / "log.1")
            served.process.send_signal(signal.SIGHUP)
            await told("Reloaded")
            assert (await chat("first"), await chat("second")) == (200, 200)
            served.stop()
            assert (await served.ended())[0] == 0
    before, after = lines(tmp_path / "log.1"), lines(log)
    assert [line["status"] for line in before + after] == [200] * 5
    assert len(after) == 2
    assert [line["cost_usd"] / line["prompt_tokens"] for line in (before[0], after[1])] == pytest.approx([1.0, 2.0])
    # A credential that is not the token is a client's own key.
    assert [key for key, _ in upstream.heard] == [
        f"Bearer {key}" for key in ("sk-old", "sk-old", "second", "first", "sk-new")
    ]


@pytest.mark.slow
async def test_the_end_of_its_terminal_ends_it():
    terminal, end = pty.openpty()

    def take_terminal():
        os.setsid()
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)

    async with Watched() as upstream, asyncio.timeout(PATIENCE):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "microbatch", "serve", "--upstream", upstream.base_url, "--port", "0"),
            stdin=end,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=take_terminal,
        )
        assert await process.stdout.readline()
        os.close(end)
        os.close(terminal)
        _, told = await process.communicate()
    assert process.returncode == 0
    assert b"Stopping" in told
    assert b"eloaded" not in told


async def test_connections_that_another_process_accepted_are_served(tmp_path):
    certificate, key = make_certificate(tmp_path)
    async with Watched() as upstream:
        served = gateway(upstream, tls_cert=str(certificate), tls_key=str(key))
        await served.start()
        ended = []
        served.connections.on_close = lambda: ended.append(1)
        with Place().listen()[0] as listener:
            listener.setblocking(False)
            loop = asyncio.get_running_loop()

            async def accept():
                taken, _ = await loop.sock_accept(listener)
                await served.connections.add(taken)

            port = listener.getsockname()[1]
            broken = asyncio.create_task(talk(port, post()))
            await accept()
            assert await broken == b""
            assert ended == [1]
            accepting = asyncio.create_task(accept())
            async with connection(port, ssl=trusting(certificate), server_hostname="localhost") as (reader, writer):
                await accepting
                writer.write(post(json.dumps(CHAT).encode()))
                assert status(await reader.read()) == 200
            await until(lambda: len(ended) == 2)
        await served.aclose()
