"""POST /v1/chat/completions: submitted to the batcher, or relayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from microbatch.errors import MicrobatchError
from microbatch.gateway.access import not_json
from microbatch.gateway.chat_request import read_chat_request, read_control_headers
from microbatch.gateway.completion import (
    DONE,
    completion_despite,
    completion_for,
    encode,
    encode_events,
    encode_usage_event,
)
from microbatch.gateway.errors import translate

if TYPE_CHECKING:
    from microbatch.client import Microbatcher
    from microbatch.gateway.access import Access
    from microbatch.gateway.chat_request import ChatRequest
    from microbatch.gateway.relay import Relay
    from microbatch.gateway.settings import GatewaySettings
    from microbatch.messages import Reply

PATH: Final = "/chat/completions"


class ChatRoute:
    """Serves chat completions; *model* is the one for requests that name none."""

    def __init__(
        self, batcher: Microbatcher, access: Access, relay: Relay, settings: GatewaySettings, model: str | None
    ) -> None:
        self._batcher = batcher
        self._access = access
        self._relay = relay
        self._settings = settings
        self._model = model

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer *request*."""
        caller = self._access.caller(request)
        if request.content_type != "application/json":
            raise not_json()
        options, combine = read_control_headers(request)
        body = await self._relay.read_body(request)
        if not combine or caller.in_address or "Content-Encoding" in request.headers:
            return await self._relay.serve(request, PATH, body, caller)
        chat = read_chat_request(body, model=self._model)
        if chat.relayed:
            return await self._relay.serve(request, PATH, body, caller)
        try:
            reply = await self._batcher.submit(
                **chat.arguments,
                **options,
                headers=caller.headers or None,
                tenant=caller.tenant,
                timeout=self._settings.request_timeout,
            )
        except MicrobatchError as error:
            completion = completion_despite(error, chat.model)
            if completion is None:
                raise translate(error) from error
            return await self._send(request, chat, completion, None)
        if self._settings.exact_usage and not chat.stream:
            await reply.settled()
        return await self._send(request, chat, completion_for(chat, reply), reply)

    async def _send(
        self, request: web.Request, chat: ChatRequest, completion: dict[str, Any], reply: Reply[str] | None
    ) -> web.StreamResponse:
        headers = {} if reply is None else _reply_headers(reply)
        if not chat.stream:
            return web.Response(body=encode(completion), content_type="application/json", headers=headers)
        events = encode_events(completion, include_usage=chat.include_usage)
        headers["Cache-Control"] = "no-cache"
        if not (chat.include_usage and reply is not None and self._settings.exact_usage and reply.usage.estimated):
            if chat.include_usage:
                events += encode_usage_event(completion)
            return web.Response(body=events + DONE, content_type="text/event-stream", charset="utf-8", headers=headers)
        # The usage follows when the endpoint has reported it; the answer need not wait for it.
        response = web.StreamResponse(headers={**headers, "Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await self._relay.write(response, events)
        await reply.settled()
        await self._relay.write(response, encode_usage_event(completion, reply.usage) + DONE)
        await response.write_eof()
        return response


def _reply_headers(reply: Reply[str]) -> dict[str, str]:
    headers = {"X-Microbatch-Route": reply.route, "X-Microbatch-Batch-Size": str(reply.batch_size)}
    if reply.request_id is not None:
        headers["x-request-id"] = reply.request_id
    return headers
