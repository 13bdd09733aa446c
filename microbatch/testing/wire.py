"""The HTTP side of the simulated endpoint: request bodies and keys, and the bytes and objects of OpenAI's responses."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, cast

import msgspec
from aiohttp import web

from microbatch.testing.quota import go_duration, milliseconds
from microbatch.testing.reading import EndpointError

if TYPE_CHECKING:
    from collections.abc import Collection

    from microbatch.messages import Limits, Usage
    from microbatch.testing.reply import SimulatedReply

# Constant, so that two runs give the same bytes.
CREATED = 1_700_000_000

DONE = b"data: [DONE]\n\n"


def request_id(number: int) -> str:
    """Return the endpoint's id of its request *number*."""
    return f"req_{number:08d}"


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return *usage* as the wire has it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def completion_object(reply: SimulatedReply, number: int, model: str) -> dict[str, Any]:
    """Return the body of a call that is not streamed."""
    text = reply.pieces.text
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if reply.refusal or reply.tool else text,
        "refusal": text if reply.refusal else None,
    }
    if reply.tool is not None:
        message["tool_calls"] = [tool_call(reply.tool, text, number)]
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": CREATED,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}],
        "usage": usage_object(reply.usage),
        **_tier_of(reply),
    }


def _tier_of(reply: SimulatedReply) -> dict[str, str]:
    return {} if reply.service_tier is None else {"service_tier": reply.service_tier}


def tool_call(name: str, arguments: str, number: int) -> dict[str, Any]:
    """Return the call of a function in the reply to the request *number*."""
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def limit_headers(limits: Limits | None) -> dict[str, str]:
    """Return the x-ratelimit headers that say *limits*; none for a dimension without a limit."""
    headers: dict[str, str] = {}
    for kind in ("requests", "tokens"):
        if getattr(limits, f"limit_{kind}", None) is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(getattr(limits, f"limit_{kind}"))
            headers[f"x-ratelimit-remaining-{kind}"] = str(getattr(limits, f"remaining_{kind}"))
            headers[f"x-ratelimit-reset-{kind}"] = go_duration(getattr(limits, f"reset_{kind}"))
    return headers


def own_headers(number: int, limits: Limits | None) -> dict[str, str]:
    """Return the headers of every response to the request *number*."""
    return {"x-request-id": request_id(number), **limit_headers(limits)}


def wait_headers(error: EndpointError) -> dict[str, str]:
    """Return the headers that say when to try again, if *error* does."""
    wait = error.retry_after
    if wait is None:
        return {}
    if not math.isfinite(wait):  # a fault may say anything
        return {"retry-after": str(wait)}
    return {"retry-after": f"{milliseconds(wait) / 1_000:g}", "retry-after-ms": str(milliseconds(wait))}


def json_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object that a request's body holds."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise EndpointError(400, "We could not parse the JSON body of your request. The API expects a JSON payload.")
    return cast("dict[str, Any]", body)


def error_response(error: EndpointError, number: int) -> web.Response:
    """Return *error* as the answer to the request *number*."""
    headers = own_headers(number, error.limits) | wait_headers(error)
    return web.json_response(error.body, status=error.status, headers=headers)


def authorize(request: web.Request, api_keys: Collection[str] | None) -> str:
    """Return who asks: the Authorization header, or ""; its key must be among *api_keys* unless that is None."""
    given = request.headers.get("Authorization", "")
    if api_keys is None:
        return given
    scheme, _, key = given.partition(" ")
    if scheme.lower() != "bearer" or not key:
        message = "You didn't provide an API key. You need to provide your API key in an Authorization header."
        raise EndpointError(401, message)
    if key not in api_keys:
        # As OpenAI does, echo the key with its middle blotted out.
        message = f"Incorrect API key provided: {key[:4]}{'*' * 8}{key[-4:]}."
        raise EndpointError(401, message, code="invalid_api_key")
    return given


def list_object(request: web.Request, objects: list[dict[str, Any]], *, most: int, usual: int) -> dict[str, Any]:
    """Return the page of *objects*, newest first, that the query of *request* asks for.

    The query may have `after`, the id that the page follows, and `limit`: up to *most*, by default *usual*.
    """
    asked = request.query.get("limit", str(usual))
    if not asked.isdecimal() or not 1 <= int(asked) <= most:
        message = f"Invalid 'limit': expected an integer from 1 to {most}, but got {asked!r}."
        raise EndpointError(400, message, param="limit", code="invalid_value")
    after, start = request.query.get("after"), 0
    if after is not None:
        ids = [one["id"] for one in objects]
        if after not in ids:
            raise EndpointError(400, f"Invalid 'after': no such object: {after}", param="after", code="invalid_value")
        start = ids.index(after) + 1
    page = objects[start : start + int(asked)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + len(page) < len(objects),
    }


class Events:
    """The server-sent events of one streamed reply, as for the request *number* to *model*."""

    def __init__(self, reply: SimulatedReply, number: int, model: str, *, include_usage: bool) -> None:
        self._reply = reply
        self._number = number
        self._include_usage = include_usage
        named = msgspec.json.encode(
            {
                "id": f"chatcmpl-{number}",
                "object": "chat.completion.chunk",
                "created": CREATED,
                "model": model,
                **_tier_of(reply),
            }
        )
        self._start = b"data: " + named[:-1] + b',"choices":['
        # With include_usage every chunk has the field, null but for the last.
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def head(self) -> bytes:
        """Return the first event, which names the role."""
        tool = self._reply.tool
        delta: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._reply.refusal or tool else "",
            "refusal": None,
        }
        if tool is not None:
            delta["tool_calls"] = [{"index": 0, **tool_call(tool, "", self._number)}]
        return self._choice(delta, None)

    def pieces(self, start: int, end: int) -> bytes:
        """Return the events of some of the reply's pieces, one each."""
        # Thousands of these a second: all but the piece is made once.
        member, ending = (b'"refusal":' if self._reply.refusal else b'"content":'), b"}"
        if self._reply.tool is not None:
            member, ending = b'"tool_calls":[{"index":0,"function":{"arguments":', b"}}]}"
        before = self._start + b'{"index":0,"delta":{' + member
        after = ending + b',"finish_reason":null}' + self._end
        return b"".join([before + msgspec.json.encode(text) + after for text in self._reply.pieces.texts[start:end]])

    def tail(self) -> bytes:
        """Return the last events: why the model stopped, the usage, and the mark of the end."""
        events = self._choice({}, self._reply.finish_reason)
        if self._include_usage:
            usage = msgspec.json.encode(usage_object(self._reply.usage))
            events += self._start + b'],"usage":' + usage + b"}\n\n"
        return events + DONE

    def _choice(self, delta: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = msgspec.json.encode({"index": 0, "delta": delta, "finish_reason": finish_reason})
        return self._start + choice + self._end
