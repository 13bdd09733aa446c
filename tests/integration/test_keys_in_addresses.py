"""A key in the query or in the path of the address stands in no error, no traceback, no pickle and no log line."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import pickle
import socket
import ssl
import threading
import traceback
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from helpers import chat_call
from odd_endpoint import chunk, events, odd_endpoint, reply, whole

import microbatch as mb
from microbatch.transports.http import connect_failed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

pytestmark = pytest.mark.slow


KEY = "canary-4f1b9c77/not+shaped like a key"
IN_PATH = "canary4f1b9c77notshapedlikeakey"
CANARY = "canary"
LARGE = "x" * 6_000_000  # more than the sockets' buffers hold, so that writing it takes time


def addressed(url: str, **options: Any) -> mb.OpenAIChat:
    """A transport whose address holds the key twice."""
    return mb.OpenAIChat("m", base_url=f"{url}/{IN_PATH}", query={"key": KEY, "api-version": "2024-02-01"}, **options)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield *error* and all that is attached to it."""
    seen: list[BaseException] = []
    stack = [error]
    while stack:
        each = stack.pop()
        if each is None or each in seen:
            continue
        seen.append(each)
        stack += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
        yield each


def said_of(error: BaseException) -> str:
    """Return all that any tool would show or keep of *error*."""
    said = ["".join(traceback.format_exception(error)), pickle.dumps(error).decode("latin-1")]
    for each in chain(error):
        said += [str(each), repr(each), repr(each.args), repr(vars(each)), *getattr(each, "__notes__", ())]
        said += [
            repr(getattr(each, name, "")) for name in ("body", "raw", "code", "param", "url", "request_info", "headers")
        ]
    return "\n".join(said)


@contextlib.asynccontextmanager
async def hanging_up(after: bytes | None, *, reset: bool) -> AsyncIterator[str]:
    """A server that answers the first request, and hangs up while the next one is written."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            if after is not None and len(tasks) == 1:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                writer.write(after)
                await writer.drain()
            await reader.readuntil(b"\r\n\r\n")
            await reader.read(1000)
            if reset:
                writer.transport.abort()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2**16)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Everything that anything logs is looked at, what is logged by finalizers included."""
    caplog.set_level(logging.DEBUG)
    logging.getLogger("asyncio").setLevel(logging.DEBUG)
    yield
    gc.collect()
    shown = [record.getMessage() + str(record.exc_text or "") + repr(record.exc_info) for record in caplog.records]
    shown += ["".join(traceback.format_exception(record.exc_info[1])) for record in caplog.records if record.exc_info]
    assert CANARY not in "\n".join(shown)


async def check(chat: mb.OpenAIChat, kind: type[BaseException], send: Callable[[], Any] | None = None) -> BaseException:
    """Return the error that a call ends with, once it is clear that it tells no key."""
    with pytest.raises(kind) as caught:
        await (chat.send(chat_call(), lambda _: None) if send is None else send())
    assert CANARY not in said_of(caught.value)
    assert CANARY not in repr(chat)
    await chat.aclose()
    return caught.value


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("kept_alive", [True, False])
async def test_a_server_that_hangs_up_while_the_request_is_written(kept_alive: bool, reset: bool) -> None:
    """aiohttp writes the address into that error's text."""
    first = reply(whole("hi"))[0] if kept_alive else None
    assert first is None or isinstance(first, bytes)
    async with hanging_up(first, reset=reset) as url:
        chat = addressed(url)
        if kept_alive:
            await chat.send(chat_call(), lambda _: None)
        error = await check(chat, mb.ConnectFailed, lambda: chat.send(chat_call(LARGE), lambda _: None))
        assert "127.0.0.1" in str(error)


def answer_once(listening: socket.socket, closed: threading.Event) -> None:
    """Answer one request and close the connection after it."""
    connection, _ = listening.accept()
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65_536)
    answer = reply(whole("hi"))[0]
    assert isinstance(answer, bytes)
    connection.sendall(answer)
    connection.close()
    closed.set()


async def test_a_kept_connection_whose_end_the_loop_has_not_seen_yet() -> None:
    """The request is written to a connection that the server has closed meanwhile."""
    closed = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=answer_once, args=(listening, closed), daemon=True)
        server.start()
        chat = addressed(f"http://127.0.0.1:{listening.getsockname()[1]}")
        await chat.send(chat_call(), lambda _: None)
        assert closed.wait(30)  # without the event loop, which would see it
        await check(chat, mb.ConnectFailed, lambda: chat.send(chat_call(LARGE), lambda _: None))
        server.join(30)


def test_the_text_of_a_broken_connection_is_the_systems_and_not_aiohttps() -> None:
    """Which holds the address."""
    said = "Can not write request body for http://h:1/canary?key=canary"
    for number in (None, 32, 104, 99_999):
        assert CANARY not in str(connect_failed(aiohttp.ClientOSError(number, said), "h:1"))


REFUSALS: dict[str, Any] = {
    "an error that quotes the address": lambda _: reply(
        {"error": {"message": f"no route /{IN_PATH}/chat?key={KEY}", "code": IN_PATH}}, 404
    ),
    "an error that quotes it quoted": lambda _: reply(
        b"canary-4f1b9c77%2Fnot%2Bshaped%20like%20a%20key", 500, "text/plain"
    ),
    "a redirect": lambda _: [b"HTTP/1.1 302 Found\r\nLocation: /x?key=canary\r\nContent-Length: 0\r\n\r\n"],
    "no HTTP": lambda _: [b"SSH-2.0-OpenSSH\r\n\r\n"],
    "nothing": lambda _: ["reset"],
    "a cut answer": lambda _: [b"HTTP/1.1 200 X\r\nContent-Length: 90\r\n\r\n{", "reset"],
    "a cut stream": lambda _: [*events(chunk("a"), done=False)[:-1], "reset"],
    "no answer": lambda _: reply(f"<html>{IN_PATH}</html>".encode(), kind="text/html"),
    "a stream without an answer": lambda _: events(),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_what_an_endpoint_answers(name: str) -> None:
    """And what it quotes."""
    async with odd_endpoint(REFUSALS[name], path="") as endpoint:
        await check(addressed(endpoint.url), mb.TransportError)


async def test_silence() -> None:
    """Before the answer and within it, and when a relayed answer does not begin."""
    async with odd_endpoint(lambda _: [60.0], path="") as endpoint:
        await check(addressed(endpoint.url, timeout=0.2), mb.TransportTimeout)
    async with odd_endpoint(lambda _: events(chunk("a"), 60.0), path="") as endpoint:
        await check(addressed(endpoint.url, idle_timeout=0.2), mb.TransportTimeout)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "https://127.0.0.1:1", "http://no-such-host.invalid", "http://\u00e4.invalid:80"]
)
async def test_no_connection(url: str) -> None:
    """Nobody there, or no such name."""
    if not url.isascii():
        with pytest.raises(mb.ConfigError) as refused:
            addressed(url)
        assert CANARY not in said_of(refused.value)
        return
    await check(addressed(url), mb.ConnectFailed)


async def test_a_host_name_that_cannot_be_one() -> None:
    """The address is looked at by aiohttp too, and quoted in its error."""
    for host in ("a" * 80, "x..y", "-", "[::1"):
        with pytest.raises((mb.ConfigError, mb.ConnectFailed)) as caught:
            await check(addressed(f"http://{host}:80"), mb.ConnectFailed)
            raise mb.ConnectFailed
        assert CANARY not in said_of(caught.value)


async def test_tls_and_proxies() -> None:
    """Where the connection itself fails."""
    async with odd_endpoint(lambda _: reply(b"", 407), path="") as endpoint:
        await check(addressed(endpoint.url.replace("http:", "https:")), mb.ConnectFailed)
        proxied = endpoint.url.replace("http://", f"http://user:{IN_PATH}@")
        for target in ("http://model.test", "https://model.test"):
            await check(addressed(target, proxy=proxied), mb.MicrobatchError)
    for target in ("http://model.test", "https://model.test"):
        await check(
            addressed(target, proxy=f"http://user:{IN_PATH}@127.0.0.1:1", ssl=ssl.create_default_context()),
            mb.ConnectFailed,
        )


async def test_relaying() -> None:
    """`forward` fails in the same words."""

    def relay(chat: mb.OpenAIChat, path: str = "/models", body: bytes | None = None) -> Callable[[], Any]:
        async def run() -> None:
            async with chat.forward("POST", path, {}, body) as relayed:
                _ = [piece async for piece in relayed]

        return run

    async with odd_endpoint(lambda _: [60.0], path="") as endpoint:
        chat = addressed(endpoint.url, timeout=0.2)
        await check(chat, mb.TransportTimeout, relay(chat))
    async with odd_endpoint(lambda _: [b"HTTP/1.1 200 X\r\nContent-Length: 90\r\n\r\n{", "reset"], path="") as endpoint:
        chat = addressed(endpoint.url)
        await check(chat, mb.ConnectFailed, relay(chat))
    async with hanging_up(None, reset=True) as url:
        chat = addressed(url)
        await check(chat, mb.ConnectFailed, relay(chat, body=LARGE.encode()))
    chat = addressed("http://127.0.0.1:1")
    for path in (f"/../{IN_PATH}", f"/%2e%2e/{IN_PATH}", f"/x#{IN_PATH}"):
        await check(chat, mb.ConfigError, relay(chat, path))


async def test_callers_of_a_batcher_and_its_events() -> None:
    """What they get are copies, chained to the original."""
    told: list[Any] = []

    class Hooks:
        on_call = staticmethod(told.append)
        on_settle = staticmethod(told.append)

    async with hanging_up(None, reset=True) as url:
        retry = mb.RetryPolicy(max_attempts=2, base=0.001)
        async with mb.Microbatcher(addressed(url), retry=retry, tokens="bytes", hooks=[Hooks()]) as batched:
            ended = await asyncio.gather(
                *(batched.submit([{"role": "user", "content": f"{number}{LARGE}"}]) for number in range(2)),
                return_exceptions=True,
            )
            assert CANARY not in repr(batched)
    for error in ended:
        assert isinstance(error, mb.ConnectFailed)
        assert CANARY not in said_of(error)
    for event in told:
        if event.error is not None:
            assert CANARY not in said_of(event.error)
