"""Streams whose connection is not read all the time: nothing is lost, the first words are at once there, connections are used again."""

import asyncio
import contextlib
import itertools
import json
import socket
import ssl
import subprocess
import zlib

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

import microbatch as mb
from microbatch.protocols import ChatCall
from microbatch.transports.sse import SSEDecoder

pytestmark = pytest.mark.slow  # real sockets and real time

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
GZIP = HEAD.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer")
PATIENCE = 30.0
INTERVAL = 0.2
PACE = 0.02
"""Seconds between events, several of which come within a pause once a stream has run for a while."""
WORDS = [f"w{number} " for number in range(40)]


def event(text=None, finish=None):
    data = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def http_chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


END = event(finish="stop") + b"data: [DONE]\n\n"


class Server:
    """Answers each request of a connection with the next of *answers*: bytes as chunks, seconds of silence, "cut" or "reset"."""

    def __init__(self, *answers, head=HEAD, context=None):
        self.answers = [*answers]
        self.head = head
        self.context = context
        self.connections = 0

    async def __aenter__(self):
        self.tasks = set()
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.context)
        port = self.server.sockets[0].getsockname()[1]
        self.url = f"http{'s' if self.context else ''}://127.0.0.1:{port}/v1"
        return self

    async def __aexit__(self, *raised):
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def serve(self, reader, writer):
        self.tasks.add(asyncio.current_task())
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                await reader.readexactly(length)
                writer.write(self.head)
                for piece in self.answers.pop(0):
                    if isinstance(piece, bytes):
                        writer.write(http_chunk(piece))
                        await writer.drain()
                    elif piece in ("cut", "reset"):
                        writer.close() if piece == "cut" else writer.transport.abort()
                        return
                    else:
                        await asyncio.sleep(piece)
                writer.write(b"0\r\n\r\n")
                await writer.drain()
        writer.close()


def paced(words, *end):
    return [*(piece for word in words for piece in (event(word), PACE)), *end]


class Asked:
    """What came of a call: its pieces of text, and how it ended."""

    def __init__(self):
        self.pieces = []

    @property
    def text(self):
        return "".join(self.pieces)


async def ask(transport):
    asked = Asked()
    call = ChatCall(messages=[{"role": "user", "content": "x"}], stream=True)
    async with asyncio.timeout(PATIENCE):
        asked.completion = await transport.send(call, asked.pieces.append)
    return asked


@contextlib.asynccontextmanager
async def transport(server, **options):
    made = mb.OpenAIChat("m", api_key="k", base_url=server.url, **{"stream_interval": INTERVAL, **options})
    try:
        yield made
    finally:
        await made.aclose()


def on_uvloop(main):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def check_two_calls(context=None):
    async with (
        Server(paced(WORDS, END), paced(WORDS[::-1], END), context=context) as server,
        transport(server, ssl=False if context else None) as chat,
    ):
        for words in (WORDS, WORDS[::-1]):
            asked = await ask(chat)
            assert (asked.text, asked.completion.finish_reason) == ("".join(words), "stop")
            assert len(asked.pieces) < len(WORDS)  # so reading was paused
        assert server.connections == 1
        [[(pooled, _)]] = chat._session.connector._conns.values()
        assert pooled.transport.is_reading()
        assert pooled.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


@pytest.fixture
def tls(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", "/CN=x"]
    try:
        subprocess.run(["openssl", "req", *kind, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the openssl command to make a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


@pytest.fixture(params=["low-water mark", "transport"])
def paused_by(request, monkeypatch):
    monkeypatch.setattr("microbatch.transports.http.LOW_WATER_WAKES", request.param == "low-water mark")


@pytest.mark.usefixtures("paused_by")
async def test_events_are_read_several_at_a_time_and_the_connection_is_used_again():
    await check_two_calls()


@pytest.mark.usefixtures("paused_by")
async def test_over_tls_too(tls):
    await check_two_calls(tls)


async def test_compressed_too():
    packer = zlib.compressobj(wbits=31)
    pieces = [
        piece if isinstance(piece, float) else packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH)
        for piece in paced(WORDS, event("." * 3_000_000), 0.3, END)
    ]
    pieces.append(packer.flush())
    async with Server(pieces, pieces, head=GZIP) as server, transport(server) as chat:
        for _ in range(2):
            asked = await ask(chat)
            assert (asked.text, asked.completion.finish_reason) == ("".join(WORDS) + "." * 3_000_000, "stop")
        assert server.connections == 1


async def test_thoughts_are_read_several_at_a_time():
    thoughts = [b'data: {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]}\n\n', PACE] * 40
    reads = []
    async with Server([*thoughts, event("x"), END]) as server, transport(server) as chat:
        with pytest.MonkeyPatch.context() as patch:
            feed = SSEDecoder.feed
            patch.setattr(SSEDecoder, "feed", lambda decoder, chunk: reads.append(chunk) or feed(decoder, chunk))
            asked = await ask(chat)
    assert (asked.text, asked.completion.thought) == ("x", True)
    assert len(reads) < len(thoughts) / 2


@pytest.mark.usefixtures("paused_by")
def test_on_uvloop_too(tls):
    on_uvloop(check_two_calls)
    on_uvloop(lambda: check_two_calls(tls))


async def test_with_an_interval_of_0_each_event_is_read_by_itself():
    async with Server(paced(WORDS, END)) as server, transport(server, stream_interval=0) as chat:
        asked = await ask(chat)
    assert asked.text == "".join(WORDS)
    assert len(asked.pieces) > len(WORDS) / 2  # a loaded machine may read two at once


async def test_the_first_words_and_the_end_are_not_delayed():
    """Were reading paused before the words, or at the end, the call would take a minute."""
    pieces = [event(""), 0.3, event("a"), 0.3, event("b"), END]
    async with Server(pieces) as server, transport(server, stream_interval=60) as chat:
        start = asyncio.get_running_loop().time()
        asked = await ask(chat)
        assert asked.text == "ab"
        assert asyncio.get_running_loop().time() - start < PATIENCE / 2


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 2_000), max_size=30), pauses=st.lists(st.sampled_from([0.0, 0.004]), min_size=1))
def test_chunking_never_changes_the_text(cuts, pauses):
    body = b"".join(map(event, WORDS)) + END
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    pieces = [
        step
        for number, (a, b) in enumerate(itertools.pairwise(edges))
        for step in (body[a:b], pauses[number % len(pauses)])
    ]

    async def main():
        async with Server(pieces, pieces) as server, transport(server, stream_interval=0.02) as chat:
            for _ in range(2):
                asked = await ask(chat)
                assert (asked.text, asked.completion.finish_reason) == ("".join(WORDS), "stop")
            assert server.connections == 1

    asyncio.run(main())


@pytest.mark.usefixtures("paused_by")
@pytest.mark.parametrize("way", ["cut", "reset"])
async def test_text_before_a_cut_stands(way):
    async with Server(paced(WORDS, way)) as server, transport(server) as chat:
        asked = Asked()
        call = ChatCall(messages=[{"role": "user", "content": "x"}], stream=True)
        with pytest.raises(mb.ConnectFailed):
            await chat.send(call, asked.pieces.append)
    assert asked.text == "".join(WORDS)


async def test_an_error_in_mid_stream_is_raised_after_the_text_before_it():
    broken = b'data: {"error": {"message": "overloaded", "code": 503}}\n\n'
    async with Server(paced(WORDS, event("last") + broken)) as server, transport(server) as chat:
        asked = Asked()
        with pytest.raises(mb.StatusError):
            await chat.send(ChatCall(messages=[{"role": "user", "content": "x"}], stream=True), asked.pieces.append)
    assert asked.text == "".join(WORDS) + "last"


async def test_a_pause_is_no_silence_of_the_endpoint():
    """Words that arrive within the idle time count, although a pause that a keep-alive has begun lets them be seen later."""
    idle = 0.3
    answer = paced(WORDS, idle * 0.8, b": ping\n\n", idle * 0.1, event("x"), idle * 0.5, event("y"), END)
    async with Server(answer) as server, transport(server, stream_interval=idle * 2, idle_timeout=idle) as chat:
        assert (await ask(chat)).text == "".join(WORDS) + "xy"


async def test_silence_still_ends_the_call():
    async with Server(paced(WORDS, 60.0)) as server, transport(server, idle_timeout=0.3) as chat:
        start = asyncio.get_running_loop().time()
        with pytest.raises(mb.TransportTimeout, match=r"sent nothing for 0\.3 s"):
            await ask(chat)
        assert asyncio.get_running_loop().time() - start < PATIENCE / 2


async def test_the_whole_time_is_kept():
    async with Server(paced(WORDS * 50, END)) as server, transport(server, timeout=1.0, stream_interval=30) as chat:
        with pytest.raises(mb.TransportTimeout, match="did not finish within 1 s"):
            await ask(chat)


@pytest.mark.usefixtures("paused_by")
async def test_a_call_cancelled_in_a_pause_leaves_nothing_for_the_next():
    async with Server(paced(WORDS, 60.0), paced(WORDS[:3], END)) as server, transport(server) as chat:
        task = asyncio.ensure_future(ask(chat))
        await asyncio.sleep(0.6)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert (await ask(chat)).text == "".join(WORDS[:3])
        await asyncio.sleep(INTERVAL)  # the end of the pause finds a closed connection
        assert server.connections == 2


@pytest.mark.parametrize("interval", [0, INTERVAL])
async def test_a_relayed_stream_arrives_byte_for_byte(interval):
    answer = paced(WORDS, END)
    async with Server(answer, answer) as server, transport(server, stream_interval=interval) as chat:
        for _ in range(2):
            async with chat.forward("POST", "chat/completions", {}, b"{}") as response:
                got = [chunk async for chunk in response]
            assert b"".join(got) == b"".join(piece for piece in answer if isinstance(piece, bytes))
            assert (len(got) > len(WORDS) / 2) is (interval == 0)
        assert server.connections == 1


@pytest.mark.usefixtures("paused_by")
async def test_a_connection_that_cannot_be_paused_is_read_all_the_time(monkeypatch):
    def refuse(*arguments):
        raise OSError

    monkeypatch.setattr("asyncio.trsock.TransportSocket.setsockopt", refuse)
    monkeypatch.setattr("asyncio.selector_events._SelectorTransport.pause_reading", refuse)
    async with Server(paced(WORDS, END)) as server, transport(server) as chat:
        asked = await ask(chat)
    assert asked.text == "".join(WORDS)
    assert len(asked.pieces) > len(WORDS) / 2


@pytest.mark.parametrize("wrong", [-1, float("nan"), "x", None])
def test_a_wrong_interval_is_refused(wrong):
    with pytest.raises(mb.ConfigError, match="stream_interval must be a number"):
        mb.OpenAIChat("m", api_key="k", stream_interval=wrong)
