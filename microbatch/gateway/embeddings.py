"""POST /v1/embeddings: the texts of a request are embedded together with those of others, or the request is relayed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from microbatch.gateway.access import JSON, not_json
from microbatch.gateway.chat_request import read_control_headers
from microbatch.gateway.route import Route
from microbatch.gateway.served import reply_headers, served
from microbatch.gateway.vectors import encode_list, encode_pieces, is_small
from microbatch.openai.embedding import EmbeddingRequest, embed_all, read_embedding_request, reply_of, usage_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from microbatch.gateway.upstream import Place
    from microbatch.messages import Embedding, Reply


class EmbeddingsRoute(Route):
    """Serves embeddings.

    Attributes:
        texts: Texts that were asked for, of requests that were not relayed.
    """

    texts: int = 0

    async def serve(self, request: web.Request, place: Place) -> web.StreamResponse:
        """Answer *request*, which goes to *place*.

        Unlike a chat completion, one that cannot be read is relayed: it is the endpoint that refuses it.
        """
        caller, record = self._access.caller(request), served(request)
        record.tenant = caller.tenant
        is_json = request.content_type == JSON
        if not is_json and not caller.credentials:
            raise not_json()
        options, combine = read_control_headers(request)
        body = await self._relay.read_body(request)
        asked: EmbeddingRequest | tuple[str, ...] = ()
        if combine and is_json and not caller.in_address and "Content-Encoding" not in request.headers:
            asked = _read(body, self._harmless)
        model = place.model or self._model
        if isinstance(asked, EmbeddingRequest):
            model = asked.arguments["model"] or model
        if not isinstance(asked, EmbeddingRequest) or not model:
            alone = asked if isinstance(asked, tuple) else ()
            return await self._relay.serve(request, place.path, body, caller, alone=alone)
        record.model = model
        self.texts += len(asked.texts)
        embeddings = await embed_all(
            self._batcher,
            asked.texts,
            **{**asked.arguments, "model": model},
            **options,
            headers=caller.headers | place.headers or None,
            tenant=caller.tenant,
            timeout=self._settings.request_timeout,
        )
        record.reply = reply = reply_of(embeddings)
        return await self._answer(request, asked, reply)

    async def _answer(
        self, request: web.Request, asked: EmbeddingRequest, reply: Reply[list[Embedding]]
    ) -> web.StreamResponse:
        """Send *reply*: at once, or in pieces if it is long."""
        vectors = [embedding.vector for embedding in reply.output]
        encoding = asked.encoding or "float"
        fields = {"model": reply.model or served(request).model, "usage": usage_of(reply)}
        headers = reply_headers(reply)
        if is_small(vectors):
            body = encode_list(vectors, encoding, fields)
            return web.Response(body=body, content_type=JSON, headers=headers)
        response = web.StreamResponse(headers={**headers, "Content-Type": JSON})
        return await self._relay.send(request, response, encode_pieces(vectors, encoding, fields))


def _read(body: bytes, harmless: Collection[str]) -> EmbeddingRequest | tuple[str, ...]:
    """Return the request in *body*, or the names of the fields that keep it from being combined: none if it is no JSON object."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    return read_embedding_request(fields, harmless=harmless) if isinstance(fields, dict) else ()
