"""The reader of chat completions: the events of a stream, or one JSON body.

Sound JSON of the documented shape is decoded by msgspec. What it refuses is read again leniently: numbers in place of strings, a
choice's index as a string, `NaN` in unused fields. An event that cannot be read even so is *damage*: a NUL takes its place in the text,
which no JSON string and no answer can contain, so the answers around it are found to be broken and the others stand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.protocols import Completion
from microbatch.transports.error_parsing import Fault, read_fault
from microbatch.transports.lenient import Joiner, as_object, decode, decode_body, is_array, sound
from microbatch.transports.reply_fields import read_finish, read_tier, read_usage, total_usage
from microbatch.transports.tool_calls import ToolCalls

if TYPE_CHECKING:
    from microbatch.messages import Limits, Usage
    from microbatch.transports.reply_fields import Finish

GAP: Final = "\0"  # takes the place of an event that could not be read

# Event data of proxies that keep the connection open.
_KEEP_ALIVES: Final = frozenset({b"", b"ping", b"keepalive", b"heartbeat"})
_AROUND_WORDS: Final = b" \t-_:[]()"
_THINKING: Final = ("think", "thought", "reason")


def is_keep_alive(data: bytes) -> bool:
    """Return whether the *data* of an event, which is no JSON, only keeps the connection alive."""
    return data.lower().translate(None, _AROUND_WORDS) in _KEEP_ALIVES


class _Text(msgspec.Struct):
    content: str | list[Any] | None = None
    refusal: str | None = None
    # A model's reasoning beside its answer: the names of DeepSeek and vLLM, of OpenRouter, and of Ollama.
    reasoning_content: Any = None
    reasoning: Any = None
    thinking: Any = None
    tool_calls: Any = None
    function_call: Any = None
    usage: Any = None


class _Choice(msgspec.Struct):
    """A choice of a whole reply (`message`) or of a stream (`delta`)."""

    index: int | None = 0
    message: _Text | None = None
    delta: _Text | None = None
    finish_reason: Any = None
    error: Any = None
    usage: Any = None


class _Reply(msgspec.Struct):
    # Counts and names are read leniently: a reply is not lost because its bookkeeping is odd.
    choices: list[_Choice] | None = None
    usage: Any = None
    x_groq: Any = None
    token_usage: Any = None
    timings: Any = None
    meta: Any = None
    metadata: Any = None
    usage_metadata: Any = msgspec.field(default=None, name="usageMetadata")
    model: Any = None
    error: Any = None
    object: Any = None
    service_tier: Any = None


_REPLY: Final = msgspec.json.Decoder(_Reply)
_NO_TEXT: Final = _Text()
_NO_CHOICE: Final = _Choice()


class ReplyReader:
    """Collects the parts of a reply, from the events of a stream or from one JSON body.

    Attributes:
        finish: Why the model stopped; None until the endpoint says so.
        done: Whether the endpoint has ended the stream.
        spoke: Whether any JSON was read that is not an error.
        answering: Whether a choice was read, so that the endpoint has begun to answer.
        thought: Whether a part of the model's reasoning was read.
        calls: The calls of tools.
    """

    def __init__(self) -> None:
        self.finish: Finish | None = None
        self.done: bool = False
        self.spoke: bool = False
        self.answering: bool = False
        self.thought: bool = False
        self.calls: ToolCalls = ToolCalls()
        self._ending: Finish | None = None  # how it ended if the endpoint does not say
        self._joiner = Joiner()
        self._refusal: list[str] = []
        self._completion = Completion(None)  # as far as it is known
        self._reports: list[tuple[Usage, bool]] = []  # usage, and whether text came with it

    @property
    def complete(self) -> bool:
        """True if the answer is complete, whatever happens to the connection."""
        return self.done or self.finish is not None

    @property
    def lack(self) -> str:
        """The fault of a reply that is not `answering`, in words."""
        return "the answer has no choices" if self.spoke else "the answer is no chat completion"

    def event(self, data: bytes, *, torso: bool = False) -> str | Fault:
        """Read the data of one stream event; return its text, which may be empty, or its error.

        With *torso*, the event lacks its end because the stream was cut; then it is no damage if it cannot be read.
        """
        if self.done:
            return ""
        if data.strip() == b"[DONE]":
            self.done = True
            return self._joiner.rest()
        try:
            return self._take(data)
        except ValueError:
            fault = read_fault(data, 200)
            if fault is not None:
                return fault
            if torso or self.complete or is_keep_alive(data):
                return ""
            self._completion.damaged = True
            return self._joiner.rest() + GAP

    def whole(self, data: bytes) -> str | Fault:
        """Read a whole JSON body; return its text, which is empty if it is not `answering`, or its error."""
        try:
            text = self._take(data)
        except ValueError:
            text = ""
        if isinstance(text, Fault):
            return text
        if not self.answering:
            return read_fault(data, 200, hollow=True) or ""
        self._completion.body = decode_body(data)
        self.done = True
        return text + self._joiner.rest()

    def rest(self) -> str:
        """Return the text held back for a continuation, now that nothing follows."""
        return self._joiner.rest()

    def completion(self, request_id: str | None, limits: Limits | None = None) -> Completion:
        """Return how the call ended.

        A complete reply without a finish reason counts as stopped, or as broken off if it has no text or a part could not be read.
        """
        completion, finish = self._completion, self.finish
        if finish is None and self.done and not completion.damaged:
            finish = self._ending
        completion.finish_reason = None if finish == "broken" else finish
        completion.usage = total_usage(self._reports)
        completion.model = sound(completion.model)
        completion.refusal = sound("".join(self._refusal)) or None
        completion.request_id = request_id
        completion.limits = limits
        completion.thought = self.thought
        return completion

    def _take(self, data: bytes) -> str | Fault:
        """Read the JSON of an event or a body; raise ValueError if it is unreadable."""
        try:
            reply = _REPLY.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            reply = _read_leniently(data)
        choices = reply.choices or []
        if reply.error or reply.object == "error" or not choices or any(choice.error for choice in choices):
            fault = read_fault(data, 200)
            if fault is not None:
                return fault
        self.spoke = True
        if isinstance(reply.model, str) and reply.model:
            self._completion.model = reply.model
        tier = read_tier(reply.service_tier, reply.usage)
        if tier is not None:
            self._completion.service_tier = tier
        text = "".join(map(self._text, choices))
        usage = _reported(reply, choices[0] if choices else _NO_CHOICE)
        if usage is not None:
            self._reports.append((usage, bool(text)))
        return text

    def _text(self, choice: _Choice) -> str:
        if choice.index:
            return ""  # further choices are in the body
        self.answering = True
        self.finish = read_finish(choice.finish_reason) or self.finish
        part = choice.delta or choice.message or _NO_TEXT
        if part.reasoning_content or part.reasoning or part.thinking:
            self.thought = True
        if part.refusal:
            self._refusal.append(part.refusal)
            self._ending = "stop"
        if part.tool_calls or part.function_call:
            self._ending = "tool_calls"
            if choice.delta is not None:
                self.calls.take(part.tool_calls)
        content = part.content
        if content is None:
            return ""
        text = self._joiner.join(content if isinstance(content, str) else self._joined(content))
        if text:
            self._ending = self._ending or "stop"
        return text

    def _joined(self, parts: list[Any]) -> str:
        """Return content that comes in parts as one text, without parts that are no text (a model's thoughts)."""
        texts: list[str] = []
        for part in parts:
            fields = as_object(part)
            kind = fields.get("type")
            if isinstance(kind, str) and any(word in kind for word in _THINKING):
                self.thought = True
            elif kind in (None, "text", "output_text"):
                texts.append(_written(fields.get("text")) if fields else _written(part))
        return "".join(texts)


def _reported(reply: _Reply, choice: _Choice) -> Usage | None:
    """Return the usage in the first of the places where endpoints report it, or None."""
    part = choice.delta or choice.message or _NO_TEXT
    places = (reply.usage, choice.usage, part.usage, reply.usage_metadata, reply.token_usage, reply.meta, reply.timings)
    outer = (reply.x_groq, reply.metadata)
    if not any(places) and not any(outer):
        return None  # as in every event of a stream but its last
    return read_usage(*places, *(as_object(each).get("usage") for each in outer))


def _read_leniently(data: bytes) -> _Reply:
    """Return an event or a body that is not of the documented types; raise ValueError if it is no object, or its choices are none."""
    fields = _object(decode(data))
    listed = fields.get("choices")
    if listed is not None and not is_array(listed):
        raise ValueError("no array")
    choices = [_object(each) for each in listed or ()]
    for choice in choices:
        choice["index"] = _read_index(choice.get("index"))
        for part in (as_object(choice.get("message")), as_object(choice.get("delta"))):
            content, refusal = part.get("content"), part.get("refusal")
            part["content"] = content if content is None or is_array(content) else [content]
            part["refusal"] = refusal if isinstance(refusal, str) else None
    try:
        return msgspec.convert({**fields, "choices": choices}, _Reply)
    except msgspec.ValidationError:
        raise ValueError("no chat completion") from None


def _object(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError("no object")
    return as_object(value)


def _read_index(value: Any) -> int:
    """Return an index that may be a string or have a decimal point; what is no number stands for the only choice."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return 0


def _written(value: Any) -> str:
    """Return a string; a number or a constant as it was written, since some proxies send the JSON that a text happens to be."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, str | int | float):
        return "" if value is None else str(value)
    raise ValueError("no text")
