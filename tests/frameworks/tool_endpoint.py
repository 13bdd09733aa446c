"""A simulated endpoint that calls tools, as the frameworks' structured modes need."""

from __future__ import annotations

import itertools
import json
from typing import Any, Self

import aiohttp
from aiohttp import web
from cities import model_answer

from microbatch.testing import Latency, SimulatedEndpoint

REPLY_SHAPE = '{"results":[{"id":"...","answer":...}]}'
"""What every combined prompt holds."""

PIECE = 12
"""Characters of the arguments in one event."""


class ToolEndpoint:
    """A `SimulatedEndpoint` behind a server that turns calls of tools, and json_object, into requests with a schema, and back.

    As at OpenAI, a call of a tool that `tool_choice` names ends with the reason "stop", and any other with "tool_calls". Combined
    prompts and all else reach the simulated endpoint unchanged.

    Attributes:
        bodies: The bodies of the chat completions that were asked for, in order of arrival.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.base_url = ""
        self._simulated = SimulatedEndpoint(answer=self._answer, latency=Latency(first_token=0, tokens_per_second=0))
        self._in_words = False
        self._ids = itertools.count(1)

    async def __aenter__(self) -> Self:
        await self._simulated.open()
        self._session = aiohttp.ClientSession()
        application = web.Application(client_max_size=2**26)
        application.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await self._session.close()
        await self._simulated.aclose()

    @property
    def calls(self) -> int:
        return len(self.bodies)

    def _answer(self, text: str, schema: dict[str, Any] | None) -> Any:
        if schema is None and self._in_words:
            return json.dumps(model_answer(text, {}))
        return model_answer(text, schema)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        # A model does what the caller's own words ask for. A test asks in one way only, so that the latest request tells.
        self._in_words = "json" in json.dumps(body["messages"][:-1]).lower()
        form = body.get("response_format") or {}
        if REPLY_SHAPE in json.dumps(body["messages"][-1]).replace('\\"', '"'):
            return await self._pass_on(request, body)
        if body.get("tools") and body.get("tool_choice") != "none" and body["messages"][-1]["role"] == "user":
            return await self._call_tool(request, body)
        if form.get("type") == "json_object":
            if not self._in_words:
                message = "'messages' must contain the word 'json' in some form, to use 'json_object'."
                return web.json_response({"error": {"message": message, "param": "messages"}}, status=400)
            return await self._pass_on(request, {**body, "response_format": _format({"type": "object"})})
        return await self._pass_on(request, body)

    async def _pass_on(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        async with self._ask(request, body) as answer:
            response = web.StreamResponse(
                status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]}
            )
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response

    def _ask(self, request: web.Request, body: dict[str, Any]) -> Any:
        headers = {"Authorization": request.headers.get("Authorization", "")}
        return self._session.post(f"{self._simulated.base_url}/chat/completions", json=body, headers=headers)

    async def _call_tool(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        choice = body.get("tool_choice")
        named = choice["function"]["name"] if isinstance(choice, dict) else None
        tool = next(each["function"] for each in body["tools"] if named in (None, each["function"]["name"]))
        kept = {name: value for name, value in body.items() if name in ("model", "messages", "max_tokens")}
        async with self._ask(request, {**kept, "response_format": _format(tool["parameters"])}) as answer:
            completion = await answer.json()
        if answer.status >= 400:
            return web.json_response(completion, status=answer.status)
        function = {"name": tool["name"], "arguments": completion["choices"][0]["message"]["content"]}
        call = {"id": f"call_{next(self._ids):024d}", "type": "function", "function": function}
        reason = "tool_calls" if named is None else "stop"
        if body.get("stream"):
            include = bool((body.get("stream_options") or {}).get("include_usage"))
            events = _events(completion, call, reason, include_usage=include)
            return web.Response(body=events, content_type="text/event-stream", charset="utf-8")
        message = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call]}
        completion["choices"] = [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}]
        return web.json_response(completion)


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _events(completion: dict[str, Any], call: dict[str, Any], reason: str, *, include_usage: bool) -> bytes:
    """Return a call of a tool as OpenAI streams it: the name first, then the arguments in pieces."""
    head = {name: completion[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    arguments = call["function"]["arguments"]
    begun = {"index": 0, **call, "function": {**call["function"], "arguments": ""}}
    deltas: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": None, "tool_calls": [begun]}, None)
    ]
    for start in range(0, len(arguments), PIECE):
        piece = {"index": 0, "function": {"arguments": arguments[start : start + PIECE]}}
        deltas.append(({"tool_calls": [piece]}, None))
    deltas.append(({}, reason))
    chunks = [
        {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]}
        for delta, finish_reason in deltas
    ]
    if include_usage:
        chunks = [{**chunk, "usage": None} for chunk in chunks]
        chunks.append({**head, "choices": [], "usage": completion["usage"]})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
