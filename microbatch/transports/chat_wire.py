"""Chat completions on the wire: the request that is written, the replies that are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.errors import TransportError
from microbatch.protocols import Completion
from microbatch.transports.error_shapes import Fault, as_object, is_array, read_fault
from microbatch.transports.ladder import Rung
from microbatch.transports.reported_usage import read_usage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.messages import Limits, Usage
    from microbatch.protocols import ChatCall
    from microbatch.transports.ladder import Plan

# Fields whose replies hold more than one text; only the JSON of a reply that is not streamed carries it all.
_MORE_THAN_TEXT: Final = ("tools", "functions", "logprobs", "top_logprobs", "modalities", "audio")


class _Text(msgspec.Struct):
    content: str | list[Any] | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    """A choice of a whole reply (`message`) or of a stream (`delta`); `text` is what both boil down to."""

    index: int | None = 0
    message: _Text | None = None
    delta: _Text | None = None
    finish_reason: str | None = None
    error: Any = None
    usage: Any = None


class _Reply(msgspec.Struct):
    # Counts and names are read leniently: a reply is not lost because its bookkeeping is odd.
    choices: list[_Choice] | None = None
    usage: Any = None
    x_groq: Any = None
    usage_metadata: Any = msgspec.field(default=None, name="usageMetadata")
    model: Any = None
    error: Any = None
    object: Any = None


_REPLY: Final = msgspec.json.Decoder(_Reply)


def can_stream(call: ChatCall) -> bool:
    """Return whether the text is all that the reply to *call* can hold."""
    params = call.params
    return params.get("n") in (None, 1) and not any(params.get(name) for name in _MORE_THAN_TEXT)


def compose(call: ChatCall, model: str, plan: Plan) -> dict[str, Any]:
    """Return the request body of one attempt: the call as it is, less what *plan* says the endpoint does not take."""
    messages: list[Mapping[str, Any]] = list(call.messages)
    body: dict[str, Any] = {"model": model, "messages": messages, **call.params}
    if "temperature" not in plan.sent:
        body.pop("temperature", None)
    for name in ("max_tokens", "max_completion_tokens"):
        if name in plan.sent:
            body[name] = call.max_tokens if plan.bound is None else plan.bound
    if plan.rung is Rung.JSON_SCHEMA:
        named = {"name": "answers", "strict": call.strict, "schema": call.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    elif plan.rung is not None:
        if call.hint is not None:
            messages.insert(max(0, len(messages) - 1), {"role": "system", "content": call.hint})
        if plan.rung is Rung.JSON_OBJECT and _mentions_json(messages):
            body["response_format"] = {"type": "json_object"}
    if "stream" in plan.sent:
        body["stream"] = True
    if "stream_options" in plan.sent:
        body["stream_options"] = {"include_usage": True}
    return body


def encode(body: dict[str, Any]) -> bytes:
    """Return *body* as JSON.

    Raises:
        TypeError: A value has no JSON form; so for the other builtin errors of the encoder.
    """
    return msgspec.json.encode(body)


class ReplyReader:
    """Gathers what a reply says beside its text, over the events of a stream or from one JSON body.

    Attributes:
        finish_reason: Why the model stopped, or None as long as the endpoint has not said.
        done: The endpoint has said that the stream is over.
        spoke: Something other than an error was read.
    """

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.done = False
        self.spoke = False
        self._usage: Usage | None = None
        self._model: str | None = None
        self._refusal: list[str] = []
        self._body: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        """Whether the answer is all there, so that what happens to the connection no longer matters."""
        return self.done or self.finish_reason is not None

    def event(self, data: bytes) -> str | Fault:
        """Take one stream event; return its text, which may be empty, or the error that it is.

        Raises:
            TransportError: It is no chunk of a chat completion.
        """
        if self.done:
            return ""
        if data.strip() == b"[DONE]":
            self.done = True
            return ""
        return self._take(data)

    def whole(self, data: bytes) -> str | Fault:
        """Take a whole JSON body; return its text, which may be empty, or the error that it is.

        Raises:
            TransportError: It is no chat completion.
        """
        text = self._take(data)
        if isinstance(text, Fault):
            return text
        body = msgspec.json.decode(data)
        if not body.get("choices"):
            raise TransportError("the answer has no choices; base_url does not lead to chat completions")
        self._body = body
        return text

    def completion(self, request_id: str | None, limits: Limits | None = None) -> Completion:
        """Return how the call ended."""
        return Completion(
            finish_reason=self.finish_reason,
            usage=self._usage,
            model=self._model,
            refusal="".join(self._refusal) or None,
            request_id=request_id,
            body=self._body,
            limits=limits,
        )

    def _take(self, data: bytes) -> str | Fault:
        try:
            reply = _REPLY.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            fault = read_fault(data, 200)
            if fault is not None:
                return fault
            # The decoder's words quote no values, but its context may; so neither is passed on.
            raise TransportError(f"the answer is no chat completion ({type(error).__name__})") from None
        choices = reply.choices or []
        if reply.error or reply.object == "error" or any(choice.error for choice in choices):
            fault = read_fault(data, 200)
            if fault is not None:
                return fault
        self.spoke = True
        places = (reply.usage, *(choice.usage for choice in choices[:1]), as_object(reply.x_groq).get("usage"))
        self._usage = read_usage(*places, reply.usage_metadata) or self._usage
        if isinstance(reply.model, str) and reply.model:
            self._model = reply.model
        return "".join(map(self._text, choices))

    def _text(self, choice: _Choice) -> str:
        if choice.index:
            return ""  # further choices are in the body
        self.finish_reason = choice.finish_reason or self.finish_reason
        text = choice.delta or choice.message or _Text()
        if text.refusal:
            self._refusal.append(text.refusal)
        return _joined(text.content)


def _joined(content: Any) -> str:
    """Return content that may come in parts as one text; parts that are no text (a model's thoughts) are left out."""
    if not is_array(content):
        return content if isinstance(content, str) else ""
    parts = [as_object(part) for part in content]
    texts = [part.get("text") for part in parts if part.get("type", "text") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _mentions_json(messages: list[Mapping[str, Any]]) -> bool:
    # OpenAI and DeepSeek answer json_object with a 400 unless the word is somewhere in the messages.
    return any("json" in _joined(message.get("content")).lower() for message in messages)
