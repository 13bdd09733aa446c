"""An OpenAI-compatible endpoint on a raw socket, so that a test decides every byte of what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

_LINE = re.compile(r'^\[(\d+[a-z0-9]*)\] (".*")$', re.MULTILINE)

Piece = bytes | float | str
"""Bytes to write, seconds to wait, or "reset"."""


class Asked:
    """A request that came in.

    Attributes:
        number: How many came before it.
        body: Its JSON.
        items: Ids and texts of a combined prompt; [] if it is none.
        texts: The texts asked about.
    """

    def __init__(self, number: int, body: dict[str, Any]) -> None:
        self.number = number
        self.body = body
        last = body["messages"][-1]["content"] if body.get("messages") else ""
        self.items: list[tuple[str, str]] = [(name, json.loads(line)) for name, line in _LINE.findall(last)]
        self.texts = [text for _, text in self.items] or [last]

    def said(self, answer: Callable[[str], Any]) -> str:
        """Return what the model writes whose answer to a text is *answer* of it; alone, a text is written as it is."""
        if self.items:
            return json.dumps({"results": [{"id": name, "answer": answer(text)} for name, text in self.items]})
        alone = answer(self.texts[0])
        return alone if isinstance(alone, str) and "response_format" not in self.body else json.dumps({"answer": alone})


class OddEndpoint:
    """What came in, and where to ask.

    Attributes:
        url: Its base_url.
        asked: The requests, in order of arrival.
    """

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[Asked] = []


async def play(pieces: Iterable[Piece], writer: asyncio.StreamWriter) -> None:
    """Send *pieces*: bytes as they are; a string resets the connection, a number is a pause in seconds."""
    for piece in pieces:
        if isinstance(piece, bytes):
            writer.write(piece)
            await writer.drain()
        elif isinstance(piece, str):
            writer.transport.abort()
        else:
            await asyncio.sleep(piece)


@contextlib.asynccontextmanager
async def odd_endpoint(respond: Callable[[Asked], Sequence[Piece]], *, path: str = "/v1") -> AsyncIterator[OddEndpoint]:
    """Serve what *respond* returns for each request."""
    endpoint = OddEndpoint()
    serving: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        task.add_done_callback(serving.discard)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                found = re.search(rb"content-length: (\d+)", head)
                raw = await reader.readexactly(int(found[1]) if found else 0)
                asked = Asked(len(endpoint.asked), json.loads(raw or b"{}"))
                endpoint.asked.append(asked)
                await play(respond(asked), writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}"
        try:
            yield endpoint
        finally:
            for task in list(serving):
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)


def reply(body: Any, status: int = 200, kind: str = "application/json", **headers: str) -> list[Piece]:
    """Return a whole answer."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(raw)}"] + ([f"Content-Type: {kind}"] if kind else [])
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ["\r\n".join([*lines, "", ""]).encode() + raw]


def whole(text: Any, finish: Any = "stop", *, message: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a chat completion as one JSON object."""
    said = {"role": "assistant", "content": text, **(message or {})}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": said, "finish_reason": finish}], **more}


def chunk(delta: Any, finish: Any = None, **more: Any) -> dict[str, Any]:
    """Return an event of a streamed completion; *delta* may be its text."""
    delta = {"content": delta} if isinstance(delta, str) else delta
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        **more,
    }


def events(*data: Any, kind: str = "text/event-stream", done: bool = True) -> list[Piece]:
    """Return a stream of events: JSON values, bytes as they are, and seconds to wait between them."""
    pieces: list[Piece] = [f"HTTP/1.1 200 X\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()]
    for each in [*data, b"[DONE]"] if done else data:
        if isinstance(each, float):
            pieces.append(each)
            continue
        line = each if isinstance(each, bytes) and each.startswith(b":") else b"data: " + _json(each)
        pieces.append(b"%x\r\n%b\r\n" % (len(line) + 2, line + b"\n\n"))
    return [*pieces, b"0\r\n\r\n"]


def streamed(text: str, finish: Any = "stop", *, size: int = 7) -> list[Piece]:
    """Return *text* as a stream of small pieces."""
    pieces = [chunk(text[at : at + size]) for at in range(0, len(text), size)]
    return events(*pieces, chunk({}, finish))


def answered(asked: Asked, text: str, finish: Any = "stop") -> list[Piece]:
    """Return *text* as was asked for: streamed or whole."""
    return streamed(text, finish) if asked.body.get("stream") else reply(whole(text, finish))


def _json(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()
