"""The request bodies of chat completions, in live calls and as lines of a provider's batch file; `reply_reader` reads the replies.

Also chat completions for answers that have none of the endpoint's own.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Any, Final

from microbatch.errors import BadRequest, ConfigError, ServerError
from microbatch.messages import texts_of
from microbatch.protocols import ChatCall
from microbatch.transports.capabilities import OF_PARAMS, Capabilities, Plan, Rung
from microbatch.transports.error_parsing import Fault, has_failed, read_failure, to_error
from microbatch.transports.lenient import as_object, is_array
from microbatch.transports.reply_reader import ReplyReader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from microbatch.errors import StatusError
    from microbatch.messages import Usage
    from microbatch.protocols import Completion
    from microbatch.transports.capabilities import Structured

# Fields whose replies hold more than one text; only the JSON body of a reply that is not streamed carries it all.
_MORE_THAN_TEXT: Final = ("tools", "functions", "logprobs", "top_logprobs", "modalities", "audio")
# Fields that may be left out or renamed.
_OPTIONAL: Final = (*OF_PARAMS, "max_tokens", "max_completion_tokens")
_SYSTEM_ROLES: Final = ("system", "developer")
_RUNGS: Final = {"json_schema": Rung.JSON_SCHEMA, "json_object": Rung.JSON_OBJECT}


def can_stream(call: ChatCall) -> bool:
    """Return whether the reply to *call* can hold nothing but one text, or calls of tools whose events go on as they are."""
    params = call.params if call.on_event is None else {**call.params, "tools": None}
    return params.get("n") in (None, 1) and not any(params.get(name) for name in _MORE_THAN_TEXT)


def request_body(call: ChatCall, model: str, plan: Plan) -> dict[str, Any]:
    """Return the request body of one attempt, without what the endpoint does not support according to *plan*."""
    messages: list[Mapping[str, Any]] = list(call.messages)
    body: dict[str, Any] = {"model": model, "messages": messages, **call.params}
    for name in OF_PARAMS:
        if name not in plan.sent:
            body.pop(name, None)
    for name in ("max_tokens", "max_completion_tokens"):
        if name in plan.sent:
            body[name] = call.max_tokens if plan.bound is None else plan.bound
    if plan.rung is Rung.JSON_SCHEMA:
        named = {"name": "answers", "strict": call.strict, "schema": call.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    elif plan.rung is not None:
        if plan.hint and call.hint is not None:
            _insert(call.hint, messages, joined=plan.hint == "joined")
        if plan.rung is Rung.JSON_OBJECT and _mentions_json(messages):
            body["response_format"] = {"type": "json_object"}
    if "stream" in plan.sent:
        body["stream"] = plan.stream
    if "stream_options" in plan.sent:
        body["stream_options"] = {"include_usage": True}
    return body


def _insert(hint: str, messages: list[Mapping[str, Any]], *, joined: bool) -> None:
    """Insert *hint* before the last message, or join it to the first one if that is a system message, else to the user's last text.

    Many chat templates take a system message in the first place only, some none (Gemma's, Mistral's older ones).
    """
    users = [at for at, message in enumerate(messages) if message.get("role") == "user"]
    at = 0 if messages and messages[0].get("role") in _SYSTEM_ROLES else users[-1] if users else None
    if not joined or at is None:
        messages.insert(max(0, len(messages) - 1), {"role": "system", "content": hint})
        return
    content = messages[at].get("content")
    joint = [*content, {"type": "text", "text": hint}] if is_array(content) else f"{content}\n\n{hint}"
    messages[at] = {**messages[at], "content": joint}


def _mentions_json(messages: list[Mapping[str, Any]]) -> bool:
    """Return whether the word is in the messages; without it OpenAI and DeepSeek answer json_object with a 400."""
    return any("json" in text.lower() for message in messages for text in texts_of(message.get("content")))


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's `usage` object; an estimate is marked `microbatch_estimated`."""
    fields: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens:
        fields["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    if usage.estimated:
        fields["microbatch_estimated"] = True
    return fields


def completion_object(
    content: str | None,
    *,
    model: str | None,
    usage: Usage | None = None,
    finish_reason: str = "stop",
    refusal: str | None = None,
    members: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a chat completion; *members* are further ones of its message, such as calls of tools."""
    message = {"role": "assistant", "content": content, "refusal": refusal, **(members or {})}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),  # noqa: TID251 the field is a date
        "model": model or "",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}],
        "usage": None if usage is None else usage_object(usage),
    }


class BatchWire:
    """Writes and reads the lines of batch files; *model* is that of calls that name none. See `Capabilities` for *structured*.

    What the endpoint does not support is learned from refused lines, and left out of the lines of later files.
    """

    def __init__(self, model: str | None, *, where: str, structured: Structured | None = None) -> None:
        self.model = model
        self._where = where
        self._capabilities = Capabilities(structured)

    def body(self, call: ChatCall) -> dict[str, Any]:
        """Return the body of the line for *call*; raise `ConfigError` if no model is named anywhere."""
        model = call.model or self.model
        if not model:
            raise ConfigError("no model: name one for the worker, or in the requests")
        return request_body(call, model, self._plan(call, model))

    def read(
        self, status: int, raw: bytes, *, request_id: str | None, sent: Callable[[], Mapping[str, Any]]
    ) -> tuple[str, Completion]:
        """Return the text of a reply, and how it ended; *sent* returns the request body, and is called for refusals only.

        Raises:
            StatusError: It is a refusal. With `again`, `body` returns something else for the same call from now on.
            ServerError: It is no chat completion, or one without an answer.
        """
        reader = ReplyReader()
        text = read_failure(raw, status) if has_failed(status) else reader.whole(raw)
        if isinstance(text, Fault):
            error = to_error(text, where=self._where, headers={})
            if type(error) is BadRequest:
                error = self._capabilities.learn(self._plan_of(sent()), text, error, asyncio.get_running_loop().time())
            raise error
        if not reader.answering:
            raise ServerError(reader.lack, status=200)
        completion = reader.completion(request_id)
        if reader.finish is None:
            completion.finish_reason = None  # a provider that writes files always gives a finish reason
        return text, completion

    def refusal(self, status: int, headers: Mapping[str, str], raw: bytes) -> StatusError:
        """Return the error for a failed response of the provider's API."""
        return to_error(read_failure(raw, status), where=self._where, headers=headers)

    def _plan(self, call: ChatCall, model: str) -> Plan:
        now = asyncio.get_running_loop().time()
        return self._capabilities.plan(call, (self._where, model, b""), now, stream=None)

    def _plan_of(self, body: Mapping[str, Any]) -> Plan:
        """Return the plan by which *body* was made, however long ago."""
        form = as_object(body.get("response_format"))
        schema = as_object(form.get("json_schema")).get("schema")
        params = {name: body[name] for name in OF_PARAMS if name in body}
        call = ChatCall(messages=body.get("messages", ()), model=body["model"], schema=schema, params=params)
        today = self._plan(call, body["model"])
        sent = frozenset(name for name in _OPTIONAL if name in body)
        return Plan(call, today.entry, _RUNGS.get(form.get("type", "")), sent, today.digest)
