"""An upstream that embeds texts, remembers what it was asked, and can be told what to refuse and what to get wrong."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from array import array
from contextlib import asynccontextmanager

from aiohttp import web

EMBEDDER = "text-embedding-3-small"
DIMENSIONS = 4
REFUSED = "refuse this"


def vector_of(text, dimensions=DIMENSIONS):
    """The vector of *text*: 32-bit floats between -1 and 1 that depend on nothing else."""
    digest = hashlib.shake_256(text.encode()).digest(2 * dimensions)
    numbers = (int.from_bytes(digest[at : at + 2], "big", signed=True) / 32_768 for at in range(0, len(digest), 2))
    return array("f", numbers)


def tokens_of(text):
    return len(text.split()) + 2


class EmbeddingUpstream:
    """Answers `POST .../embeddings` as OpenAI does.

    Attributes:
        calls: The bodies of the calls that were answered, and of those that were refused.
        headers: Their headers.
        paths: Their paths.
        tokens: Tokens that it has reported.
        spoil: Takes the elements of `data` and returns those to send.
        refusal: Status, error and headers for every call; None for none.
        go: Calls wait until it is set.
    """

    def __init__(self):
        self.calls, self.headers, self.paths = [], [], []
        self.tokens = 0
        self.spoil = lambda data: data
        self.refusal = None
        self.go = asyncio.Event()
        self.go.set()
        self.base_url = ""

    @property
    def texts(self):
        """All texts that it was asked for, in order."""
        return [text for body in self.calls for text in self.inputs(body)]

    @staticmethod
    def inputs(body):
        given = body["input"]
        return [given] if isinstance(given, str) else given

    async def serve(self, request):
        raw = await request.read()
        body = json.loads(raw)
        self.calls.append(body)
        self.headers.append(request.headers.copy())
        self.paths.append(request.raw_path)
        number = len(self.calls)
        await self.go.wait()
        given = {"x-request-id": f"req_{number}"}
        if self.refusal is not None:
            status, error, headers = self.refusal
            return web.json_response({"error": error}, status=status, headers={**given, **headers})
        if (error := self.fault(body)) is not None:
            return web.json_response({"error": error}, status=400, headers=given)
        texts = self.inputs(body)
        data = self.spoil([self.element(body, index, text) for index, text in enumerate(texts)])
        used = sum(map(tokens_of, texts))
        self.tokens += used
        usage = {"prompt_tokens": used, "total_tokens": used}
        answer = {"object": "list", "data": data, "model": body["model"], "usage": usage}
        return web.json_response(answer, headers=given)

    @staticmethod
    def fault(body):
        texts = EmbeddingUpstream.inputs(body)
        if not texts or len(texts) > 2_048 or not all(isinstance(text, str) and text for text in texts):
            return {"message": "'$.input' is invalid.", "type": "invalid_request_error", "param": None, "code": None}
        if any(REFUSED in text for text in texts):
            message = "This text is too long."
            return {"message": message, "type": "invalid_request_error", "param": "input", "code": "too_long"}
        return None

    @staticmethod
    def element(body, index, text):
        vector = vector_of(text, body.get("dimensions") or DIMENSIONS)
        encoded = base64.b64encode(vector).decode() if body.get("encoding_format") == "base64" else vector.tolist()
        return {"object": "embedding", "index": index, "embedding": encoded}


@asynccontextmanager
async def embedding_upstream():
    upstream = EmbeddingUpstream()
    application = web.Application(client_max_size=2**30)
    application.router.add_post("/{path:.*}", upstream.serve)
    runner = web.AppRunner(application, shutdown_timeout=0.1, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield upstream
    finally:
        await runner.cleanup()
