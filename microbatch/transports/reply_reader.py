"""Chat completions as they come back: the events of a stream, or one JSON body.

Sound JSON of the documented shape is decoded by msgspec. What it refuses is read once more, leniently: numbers where texts belong, a
choice's index as a text, `NaN` in fields that nobody uses. An event that cannot be read even so is *damage*: a NUL takes its place in
the text, where no JSON string and no answer can have one, so the answers around it are found to be broken and the others stand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.errors import ServerError
from microbatch.protocols import Completion
from microbatch.transports.error_parsing import Fault, read_fault
from microbatch.transports.finish_reasons import read_finish
from microbatch.transports.lenient import Joiner, as_object, decode, decode_body, is_array
from microbatch.transports.reported_usage import read_usage

if TYPE_CHECKING:
    from microbatch.messages import Limits, Usage
    from microbatch.transports.finish_reasons import Finish

GAP: Final = "\0"
"""Stands in the text for an event that could not be read."""

# What some proxies send as the data of an event so that the connection stays open.
_KEEP_ALIVES: Final = frozenset({b"", b"ping", b"keepalive", b"heartbeat"})
_AROUND_WORDS: Final = b" \t-_:[]()"
_THINKING: Final = ("think", "thought", "reason")


class _Text(msgspec.Struct):
    content: str | list[Any] | None = None
    refusal: str | None = None
    # The names under which a model's reasoning comes beside its answer: DeepSeek's and vLLM's; OpenRouter's; Ollama's.
    reasoning_content: Any = None
    reasoning: Any = None
    thinking: Any = None
    tool_calls: Any = None
    function_call: Any = None


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
    usage_metadata: Any = msgspec.field(default=None, name="usageMetadata")
    model: Any = None
    error: Any = None
    object: Any = None


_REPLY: Final = msgspec.json.Decoder(_Reply)
_NO_TEXT: Final = _Text()


class ReplyReader:
    """Gathers what a reply says beside its text, over the events of a stream or from one JSON body.

    Attributes:
        finish: Why the model stopped, or None as long as the endpoint has not said.
        done: The endpoint has said that the stream is over.
        spoke: JSON was read that is no error.
        answering: A choice was read, so the endpoint has begun to answer.
        thought: A part of the model's reasoning was read.
    """

    def __init__(self) -> None:
        self.finish: Finish | None = None
        self.done = False
        self.spoke = False
        self.answering = False
        self.thought = False
        self._damaged = False
        self._ending: Finish | None = None  # how it ended if the endpoint does not say
        self._joiner = Joiner()
        self._usage: Usage | None = None
        self._model: str | None = None
        self._refusal: list[str] = []
        self._body: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        """Whether the answer is all there, so that what happens to the connection no longer matters."""
        return self.done or self.finish is not None

    def event(self, data: bytes, *, torso: bool = False) -> str | Fault:
        """Take one stream event; return its text, which may be empty, or the error that it is.

        Args:
            data: Its data.
            torso: Whether its end is missing, so that it is no damage if it cannot be read: the stream was cut in it.
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
            if torso or self.complete or data.lower().translate(None, _AROUND_WORDS) in _KEEP_ALIVES:
                return ""
            self._damaged = True
            return self._joiner.rest() + GAP

    def whole(self, data: bytes) -> str | Fault:
        """Take a whole JSON body; return its text, which may be empty, or the error that it is.

        Raises:
            ServerError: It is no chat completion, or one without an answer.
        """
        try:
            text = self._take(data)
        except ValueError:
            text = ""
        if isinstance(text, Fault):
            return text
        if not self.answering:
            fault = read_fault(data, 200, hollow=True)
            if fault is not None:
                return fault
            raise ServerError(f"the answer {'has no choices' if self.spoke else 'is no chat completion'}", status=200)
        self._body = decode_body(data)
        self.done = True
        return text + self._joiner.rest()

    def rest(self) -> str:
        """Return the text that was held back for what may still have come; nothing does."""
        return self._joiner.rest()

    def completion(self, request_id: str | None, limits: Limits | None = None) -> Completion:
        """Return how the call ended.

        A reply that is all there without a word on why it ended has ended by itself; it counts as broken off if it has no text to
        show for it, or if a part of it could not be read.
        """
        finish = self.finish
        if finish is None and self.done and not self._damaged:
            finish = self._ending
        return Completion(
            finish_reason=None if finish == "broken" else finish,
            usage=self._usage,
            model=self._model,
            refusal="".join(self._refusal) or None,
            request_id=request_id,
            body=self._body,
            limits=limits,
            thought=self.thought,
            damaged=self._damaged,
        )

    def _take(self, data: bytes) -> str | Fault:
        """Take the JSON of an event or a body.

        Raises:
            ValueError: It cannot be read.
        """
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
        places = (reply.usage, *(choice.usage for choice in choices[:1]), as_object(reply.x_groq).get("usage"))
        self._usage = read_usage(*places, reply.usage_metadata) or self._usage
        if isinstance(reply.model, str) and reply.model:
            self._model = reply.model
        return "".join(map(self._text, choices))

    def _text(self, choice: _Choice) -> str:
        if choice.index:
            return ""  # further choices are in the body
        self.answering = True
        self.finish = read_finish(choice.finish_reason) or self.finish
        said = choice.delta or choice.message or _NO_TEXT
        if said.reasoning_content or said.reasoning or said.thinking:
            self.thought = True
        if said.refusal:
            self._refusal.append(said.refusal)
            self._ending = "stop"
        if said.tool_calls or said.function_call:
            self._ending = "tool_calls"
        content = said.content
        if content is None:
            return ""
        text = self._joiner.join(content if isinstance(content, str) else self._joined(content))
        if text:
            self._ending = self._ending or "stop"
        return text

    def _joined(self, parts: list[Any]) -> str:
        """Return content that comes in parts as one text; parts that are no text (a model's thoughts) are left out."""
        texts: list[str] = []
        for part in parts:
            fields = as_object(part)
            kind = fields.get("type")
            if isinstance(kind, str) and any(word in kind for word in _THINKING):
                self.thought = True
            elif kind in (None, "text", "output_text"):
                texts.append(_written(fields.get("text")) if fields else _written(part))
        return "".join(texts)


def _read_leniently(data: bytes) -> _Reply:
    """Return what an event or a body says that is not of the documented types.

    Raises:
        ValueError: It is no JSON object, or its choices are none.
    """
    fields = _an_object(decode(data))
    usage, groq, metadata, *rest = map(fields.get, ("usage", "x_groq", "usageMetadata", "model", "error", "object"))
    choices = [
        _Choice(
            _read_index(choice.get("index")),
            *(_read_text(choice[name]) if choice.get(name) is not None else None for name in ("message", "delta")),
            *(choice.get(name) for name in ("finish_reason", "error", "usage")),
        )
        for choice in map(_an_object, _an_array(fields.get("choices")))
    ]
    return _Reply(choices, usage, groq, metadata, *rest)


def _read_text(value: Any) -> _Text:
    said = _an_object(value)
    content, refusal = said.get("content"), said.get("refusal")
    return _Text(
        content if content is None or is_array(content) else [content],
        refusal if isinstance(refusal, str) else None,
        *(said.get(name) for name in ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")),
    )


def _read_index(value: Any) -> int:
    """Return an index that may be written as a text or with a decimal point; what is no number stands for the only choice."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return 0


def _written(value: Any) -> str:
    """Return a text; a number or a constant as it was written, since some proxies send the JSON that a text happens to be.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, str | int | float):
        return "" if value is None else str(value)
    raise ValueError("no text")


def _an_object(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError("no object")
    return as_object(value)


def _an_array(value: Any) -> list[Any]:
    if value is not None and not is_array(value):
        raise ValueError("no array")
    return value or []
