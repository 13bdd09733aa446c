"""POST /v1/chat/completions: submitted to the batcher and answered with a completion or its events, or relayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from microbatch.errors import (
    MAX_BODY_CHARS,
    Filtered,
    MalformedAnswer,
    MicrobatchError,
    Refused,
    ReplyError,
    RequestFailed,
    TruncatedReply,
)
from microbatch.gateway.access import not_json
from microbatch.gateway.chat_request import read_chat_request, read_control_headers
from microbatch.gateway.errors import translate
from microbatch.gateway.event_stream import DONE, EventStream
from microbatch.gateway.route import Route
from microbatch.gateway.served import reply_headers, served
from microbatch.messages import Usage
from microbatch.openai.chat_completion import completion_of, first_choice, first_message
from microbatch.transports.chat_wire import completion_object, usage_object
from microbatch.transports.lenient import as_object, is_array

if TYPE_CHECKING:
    from microbatch.gateway.chat_request import ChatRequest
    from microbatch.gateway.upstream import Place
    from microbatch.live_answer import LiveAnswer
    from microbatch.messages import Reply

_OF_A_DELTA: Final = ("role", "content", "refusal")
_ALREADY_PAID: Final = frozenset({"cache", "shared", "similar"})
"""Routes of answers whose calls another request has paid for."""

_encode: Final = msgspec.json.Encoder().encode


class ChatRoute(Route):
    """Serves chat completions."""

    async def serve(self, request: web.Request, place: Place) -> web.StreamResponse:
        """Answer *request*, which goes to *place*."""
        caller, record = self._access.caller(request), served(request)
        record.tenant = caller.tenant
        if request.content_type != "application/json":
            raise not_json()
        options, combine = read_control_headers(request)
        body = await self._relay.read_body(request)
        if not combine or caller.in_address or "Content-Encoding" in request.headers:
            return await self._relay.serve(request, place.path, body, caller)
        chat = read_chat_request(body, model=place.model or self._model, harmless=self._harmless)
        record.model = chat.model or None
        if chat.arguments is None or (chat.stream and self._settings.streams == "relay"):
            return await self._relay.serve(request, place.path, chat.body, caller, alone=chat.alone)
        asked = {**chat.arguments, "model": chat.model} if place.model else chat.arguments
        async with self._batcher.open_answer(
            **asked,
            **options,
            streamed=chat.stream and self._settings.streams == "auto",
            headers=caller.headers | place.headers or None,
            tenant=caller.tenant,
            timeout=self._settings.request_timeout,
        ) as live:
            if chat.stream:
                return await self._stream(request, chat, live)
            reply: Reply[str] | None = None
            try:
                reply = record.reply = await live.reply()
                if self._settings.exact_usage:
                    await reply.settled()
                completion = _completion_for(chat, reply)
            except MicrobatchError as error:
                completion = _completion_despite(error, chat.model) or {}
                if not completion:
                    raise
        return web.Response(body=_encode(completion), content_type="application/json", headers=reply_headers(reply))

    async def _stream(self, request: web.Request, chat: ChatRequest, live: LiveAnswer) -> web.StreamResponse:
        """Answer *request* with a stream."""
        stream = EventStream(request, self._relay, include_usage=chat.include_usage)
        await stream.follow(live)
        reply: Reply[str] | None = None
        try:
            reply = served(request).reply = await live.reply()
            completion = _completion_for(chat, reply)
        except MicrobatchError as error:
            completion = _completion_despite(error, chat.model) or {}
            if stream.response is None and not completion:
                raise
            # The endpoint's events end with its finish reason, except where an error takes its place.
            told = isinstance(error, ReplyError) or (isinstance(error, Filtered) and stream.told_finish)
            if not completion or (stream.relayed and not told):
                served(request).fail(error)
                return await stream.fail(translate(error))
        await stream.begin(reply_headers(reply))
        events = b"" if stream.relayed else _encode_events(completion, include_usage=chat.include_usage)
        if not chat.include_usage or stream.told_usage:
            return await stream.end(events + DONE)
        usage = None
        if reply is not None and self._settings.exact_usage and reply.usage.estimated:
            # The usage follows when the endpoint has reported it; the answer need not wait for it.
            await stream.send(events)
            events, usage = b"", (await reply.settled()).usage
        return await stream.end(events + _encode_usage_event(completion, usage) + DONE)


def _completion_for(request: ChatRequest, reply: Reply[str]) -> dict[str, Any]:
    """Return the completion to send: the endpoint's own if the request was sent alone, else one of the same shape.

    The endpoint's content is replaced by the reply's text where it may have a code fence or an object around the requested JSON, and
    where it is a list of parts but events need text. Its usage is replaced where several calls carried the request.
    """
    body = reply.body
    if body is None:
        return completion_of(reply, request.model)
    completion = dict(body)
    in_parts = request.stream and is_array(first_message(body).get("content"))
    if (request.typed or in_parts) and (first := first_choice(body)):
        message = {**first_message(body), "content": reply.text}
        completion["choices"] = [{**first, "message": message}, *body["choices"][1:]]
    usage, reported = reply.usage, as_object(body.get("usage"))
    if reply.route in _ALREADY_PAID or reply.batch_size > 1:
        completion["usage"] = usage_object(usage)
    elif not usage.estimated and reported.get("prompt_tokens", usage.prompt_tokens) != usage.prompt_tokens:
        # Only prompts are compared: endpoints differ in what they count as completion and total.
        completion["usage"] = {**reported, **_with_details(usage_object(usage), reported)}
    return completion


def _completion_despite(error: MicrobatchError, model: str | None) -> dict[str, Any] | None:
    """Return the completion that an endpoint would have sent where microbatch has an error, or None if clients get an error, too.

    Refusals, filtered and truncated answers have status 200; clients tell them by their fields. An answer that does not fit is theirs
    to judge.
    """
    match error:
        case Refused():
            made = completion_object(None, model=model, refusal=error.raw or str(error))
        case TruncatedReply():
            made = completion_object(error.raw, model=model, finish_reason="length")
        case Filtered() if error.status < 400:  # noqa: PLR2004 (the first class of HTTP's errors)
            made = completion_object(None, model=model, finish_reason="content_filter")
        case MalformedAnswer() if error.completion is not None or len(error.raw) < MAX_BODY_CHARS:
            made = completion_object(error.raw, model=model)
        case _:
            return None
    own = error.completion if isinstance(error, RequestFailed) else None
    return made if own is None else dict(own)


def _encode_events(completion: dict[str, Any], *, include_usage: bool) -> bytes:
    """Return a completion as the events of a stream, without the usage and the end mark."""
    message = first_message(completion)
    content, refusal = message.get("content"), message.get("refusal")
    deltas: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": "" if refusal is None else None, "refusal": None}, None)
    ]
    # Further members that endpoints send: reasoning, citations.
    further = {name: value for name, value in message.items() if name not in _OF_A_DELTA and value}
    if is_array(calls := further.get("tool_calls")):
        # In a stream each names its place, since its arguments may come in pieces.
        further["tool_calls"] = [{"index": index, **as_object(call)} for index, call in enumerate(calls)]
    deltas += [(part, None) for part in (further, {"content": content}, {"refusal": refusal}) if any(part.values())]
    deltas.append(({}, first_choice(completion).get("finish_reason")))
    # As OpenAI does: with include_usage, every chunk has the field, and it is null in all but the last one.
    rest: dict[str, Any] = {"usage": None} if include_usage else {}
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason} for delta, reason in deltas]
    return b"".join(_event(completion, choices=[choice], **rest) for choice in choices)


def _encode_usage_event(completion: dict[str, Any], usage: Usage | None = None) -> bytes:
    """Return the event that holds the usage: *usage* if it became known later, else the completion's."""
    known = completion.get("usage") if usage is None else usage_object(usage)
    return _event(completion, choices=[], usage=known or usage_object(Usage(estimated=True)))


def _event(completion: dict[str, Any], **fields: Any) -> bytes:
    """Return an event with the *fields* of a chunk of *completion*."""
    head = {name: value for name, value in completion.items() if name not in ("choices", "usage")}
    return b"data: " + _encode({**head, "object": "chat.completion.chunk", **fields}) + b"\n\n"


def _with_details(usage: dict[str, Any], reported: dict[str, Any]) -> dict[str, Any]:
    """Return *usage* with the details that only *reported* has."""
    return {
        name: {**as_object(reported.get(name)), **value} if isinstance(value, dict) else value
        for name, value in usage.items()
    }
