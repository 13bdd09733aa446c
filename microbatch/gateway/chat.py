"""POST /v1/chat/completions: asked through the batcher, answered as the endpoint would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from microbatch.errors import MicrobatchError, RequestFailed
from microbatch.gateway.access import not_json
from microbatch.gateway.bodies import read_body, write_chunk
from microbatch.gateway.chat_request import Asked, read_asked
from microbatch.gateway.completion import (
    DONE,
    Answer,
    as_it_came,
    first_message,
    made,
    said_despite,
    said_in,
    usage_object,
)
from microbatch.gateway.control_headers import Wishes, read_wishes
from microbatch.gateway.errors import refusal_of
from microbatch.gateway.relay import relay

if TYPE_CHECKING:
    from microbatch.client import Microbatcher
    from microbatch.gateway.access import Access, Caller
    from microbatch.gateway.settings import GatewaySettings
    from microbatch.messages import Reply

PATH: Final = "/chat/completions"
_FREE: Final = frozenset({"cache", "shared"})
"""Routes of answers whose calls somebody else has paid."""


class Chat:
    """Serves chat completions.

    Args:
        batcher: What is asked.
        access: Who may ask.
        settings: The gateway's.
        model: The model for those who name none, or None.
    """

    def __init__(self, batcher: Microbatcher, access: Access, settings: GatewaySettings, model: str | None) -> None:
        self._batcher = batcher
        self._access = access
        self._settings = settings
        self._model = model

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer *request*.

        Raises:
            Refusal: It cannot be answered.
            ConfigError: A field of its body is wrong.
        """
        caller = self._access.caller(request)
        if request.content_type != "application/json":
            raise not_json()
        wishes = read_wishes(request)
        body = await read_body(request, timeout=self._settings.client_timeout)
        if not wishes.batch or caller.in_address or "Content-Encoding" in request.headers:
            return await self._relay(request, body, caller)
        asked = read_asked(body, model=self._model)
        if asked.relayed:
            return await self._relay(request, body, caller)
        try:
            reply = await self._ask(asked, caller, wishes)
        except MicrobatchError as error:
            said = said_despite(error)
            if said is None:
                raise refusal_of(error) from error
            own = error.completion if isinstance(error, RequestFailed) else None
            completion = made(said, asked.model or self._model, None) if own is None else as_it_came(own)
            return await self._send(request, asked, Answer(completion), None)
        if self._settings.exact_usage and not asked.stream:
            await reply.settled()
        return await self._send(request, asked, Answer(self._completion(asked, reply)), reply)

    def _completion(self, asked: Asked, reply: Reply[str]) -> dict[str, Any]:
        if reply.body is None:
            return made(said_in(reply), reply.model or asked.model or self._model, reply.usage)
        # A piece of a stream is a text, also where the whole comes in parts.
        as_text = asked.typed or (asked.stream and not isinstance(first_message(reply.body).get("content"), str))
        completion = as_it_came(reply.body, content=reply.text if as_text else None, usage=reply.usage)
        if reply.route in _FREE:
            completion["usage"] = usage_object(reply.usage)
        return completion

    async def _relay(self, request: web.Request, body: bytes, caller: Caller) -> web.StreamResponse:
        query = f"?{request.rel_url.raw_query_string}" if request.rel_url.raw_query_string else ""
        return await relay(self._batcher, request, PATH + query, body, caller, timeout=self._settings.client_timeout)

    async def _ask(self, asked: Asked, caller: Caller, wishes: Wishes) -> Reply[str]:
        return await self._batcher.submit(
            asked.messages,
            model=asked.model,
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            params=asked.params or None,
            headers=caller.headers or None,
            tenant=caller.tenant,
            priority=wishes.priority,
            timeout=self._settings.request_timeout,
            use_cache=wishes.use_cache,
        )

    async def _send(
        self, request: web.Request, asked: Asked, answer: Answer, reply: Reply[str] | None
    ) -> web.StreamResponse:
        headers = {} if reply is None else _told(reply)
        if not asked.stream:
            return web.Response(body=answer.whole(), content_type="application/json", headers=headers)
        events = answer.events(include_usage=asked.include_usage)
        headers["Cache-Control"] = "no-cache"
        if not (asked.include_usage and reply is not None and self._settings.exact_usage and reply.usage.estimated):
            if asked.include_usage:
                events += answer.usage_event()
            return web.Response(body=events + DONE, content_type="text/event-stream", charset="utf-8", headers=headers)
        # The answer need not wait for the bill.
        response = web.StreamResponse(headers={**headers, "Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await write_chunk(response, events, timeout=self._settings.client_timeout)
        await reply.settled()
        await write_chunk(response, answer.usage_event(reply.usage) + DONE, timeout=self._settings.client_timeout)
        await response.write_eof()
        return response


def _told(reply: Reply[str]) -> dict[str, str]:
    headers = {"X-Microbatch-Route": reply.route, "X-Microbatch-Batch-Size": str(reply.batch_size)}
    if reply.request_id is not None:
        headers["x-request-id"] = reply.request_id
    return headers
