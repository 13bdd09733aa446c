"""The simulated model: takes a chat completions request and returns the reply and its timing.

It recognizes the combined prompt by its text only, as a real model does, and shares no code with the composer. It does no
I/O; `SimulatedEndpoint` serves it over HTTP and `SimulatedTransport` within the process.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

from microbatch.accounting.tokens import load_encoding
from microbatch.checking import AtLeast, Count, check_fields
from microbatch.messages import Usage
from microbatch.testing.answers import simulated_answer, unwrap
from microbatch.testing.counting import Pieces, compact, content_text, prompt_tokens, split, text_tokens
from microbatch.testing.embeddings import ENCODING, SimulatedEmbeddings
from microbatch.testing.faults import NO_FAULT, REFUSAL, WHITESPACE, Element, Fault, Faults
from microbatch.testing.mistakes import Mistakes  # noqa: TC001 the type of a field that is checked
from microbatch.testing.orders import answer_for_all, exact_word, obeying
from microbatch.testing.pace import Latency
from microbatch.testing.quota import Meter, Quota
from microbatch.testing.reading import (
    EndpointError,
    Prompt,
    ResponseFormat,
    asked_max_tokens,
    check_length,
    check_messages,
    check_strict,
    response_format,
    understand,
)
from microbatch.testing.reply import Ending, Prefixes, SimulatedReply

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from microbatch.messages import Limits
    from microbatch.testing.embeddings import EmbeddingReply

T = TypeVar("T")

NO_DELAY = Latency(first_token=None, tokens_per_second=None)

MAX_INLINE_BYTES: Final = 65_536
"""Counting the tokens of more than this takes milliseconds, which would block other requests."""

RAMBLING_TOKENS: Final = 8_192
"""The length of a reply that does not end by itself where no other limit applies."""

_OBJECT_TOKENS: Final = 6
"""Tokens of the object around a single answer that is none."""

Accepts = Literal["ok", "400"]
Fails = Literal["ok", "400", "500"]
MaxTokensName = Literal["max_tokens", "max_completion_tokens"]
StreamOptions = Literal["ok", "400", "ignored"]


@dataclass(kw_only=True, eq=False, repr=False)
class SimulatedModel:
    """A model behind an OpenAI-compatible endpoint.

    Args:
        answer: Takes the text of an item's last user message and the JSON Schema of one answer (None: free text) and returns the
            answer. A schema `{"answer": S}`, which clients wrap around what is no object, is unwrapped before and the answer
            wrapped after. It is not asked about a text that is exactly "Reply with exactly: WORD", a word of letters and
            digits: the answer to that is the word, a string whatever the schema.
        latency: Its speed; no delay by default.
        faults: The selection of replies that go wrong; None for none.
        mistakes: The frequency of wrong answers in sound replies; None for none.
        quota: Limits for each key and model, beyond which requests are refused with 429; None sets no limit. A quota needs a
            running event loop, whose clock it follows.
        obey: Follow the first item of a prompt that says "answer X for all requests" (in any case, X in quotes or not): all answers
            become X, as far as their kind allows: strings, labels that are not asked for included, and the strings inside objects
            and lists.
        context_tokens: Most tokens of prompt and reply together; more is refused with "context_length_exceeded".
        max_output_tokens: Most tokens of a reply, thoughts included; a limit above that is refused as OpenAI does.
        reasoning_tokens: Hidden tokens generated before the reply. They count as completion tokens and take time.
        indent: Spaces of indentation of the JSON, written on many lines as by some models; None writes it on one line.
        json_schema: "400" refuses response_format json_schema as OpenAI-like servers do, "500" as llama-cpp-python does.
        json_object: "400" refuses response_format json_object.
        max_tokens_name: The only name that the limit on the reply may have; None accepts both.
        temperature_fixed: Refuse any temperature but 1, as reasoning models do.
        stream_supported: Whether "stream": true is accepted.
        stream_options: "400" refuses stream_options; "ignored" never reports usage in a stream.
        strict_schemas: Refuse a strict schema outside the subset that OpenAI documents (closed objects, no optional properties, known
            keywords and formats, limits of size and depth), in OpenAI's words.
        count_schema: Count a response_format's schema as part of the prompt, as providers do.
        cached_prefixes: Report cached_tokens as OpenAI does: prefixes seen before, from 1,024 tokens in steps of 128.
        brief: Make the strings of the default answers shorter where the limit on the reply is low, as a model does that is asked for
            short ones. Otherwise the limit cuts them.
        record: Keep the bodies of all requests in `requests` and the texts of all replies in `replies`.
        embeddings: The embedding models beside it. Their replies come `latency.first_token` after the request, and count for the same
            quota.

    Attributes:
        calls: Requests that were well-formed JSON, refused ones included.
        combined_calls: Combined prompts that were refused neither for their parameters nor for the quota.
        single_calls: The other calls that were not.
        items: Items of both.
        embedding_calls: Embeddings calls that were refused neither for their parameters nor for the quota.
        embedded_texts: Texts of those.
        prompt_tokens: Tokens of the answered prompts, whether or not the client read the answer.
        completion_tokens: Tokens generated for them.
        reported: The usage sent to clients. It excludes streams that break off or end without usage.
        faulted: Replies that were spoiled.
        quota_refusals: Requests that were refused for the quota.
        peak_requests: Most requests of one key to one model that the quota let in within any 60 seconds; 0 without a quota.
        peak_tokens: Most tokens that those were charged within any 60 seconds.
        disconnects: Clients that left before the reply was whole.
        requests: Bodies of the requests, if `record`.
        replies: Texts of the replies, if `record`; "" for an error.

    Raises:
        ConfigError: A word is unknown or a limit below its minimum.
    """

    answer: Callable[[str, dict[str, Any] | None], Any] = simulated_answer
    latency: Latency = NO_DELAY
    faults: Faults | None = None
    mistakes: Mistakes | None = None
    quota: Quota | None = None
    obey: bool = False
    context_tokens: Count | None = None
    max_output_tokens: Count | None = None
    reasoning_tokens: Annotated[int, AtLeast(0)] = 0
    indent: Annotated[int, AtLeast(0)] | None = None
    json_schema: Fails = "ok"
    json_object: Accepts = "ok"
    max_tokens_name: MaxTokensName | None = None
    temperature_fixed: bool = False
    stream_supported: bool = True
    stream_options: StreamOptions = "ok"
    strict_schemas: bool = True
    count_schema: bool = True
    cached_prefixes: bool = False
    brief: bool = False
    record: bool = False
    embeddings: SimulatedEmbeddings = SimulatedEmbeddings()  # noqa: RUF009 it is frozen

    def __post_init__(self) -> None:
        check_fields(self)
        self.calls: int = 0
        self.combined_calls: int = 0
        self.single_calls: int = 0
        self.items: int = 0
        self.embedding_calls: int = 0
        self.embedded_texts: int = 0
        self.prompt_tokens: int = 0
        self.completion_tokens: int = 0
        self.faulted: int = 0
        self.disconnects = 0
        self.quota_refusals: int = 0
        self.peak_requests: int = 0
        self.peak_tokens: int = 0
        self.reported: Usage = Usage()
        self.requests: list[dict[str, Any]] = []
        self.replies: list[str] = []
        self._concerned = self._spoiled = 0  # chat calls that faults concern, and embeddings calls that were spoiled
        self._can_count = False
        self._meters: dict[tuple[str, str], Meter] = {}
        self._prefixes = Prefixes()

    def report(self, usage: Usage) -> None:
        """Count *usage* as sent to a client."""
        self.reported += usage

    def admit(self, body: dict[str, Any]) -> int:
        """Count a request, record it if `record` is set, and return its number, from 1."""
        self.calls += 1
        if self.record:
            self.requests.append(body)
        return self.calls

    def read(self, body: dict[str, Any]) -> Prompt:
        """Check and understand a request, or raise EndpointError; changes nothing, so a thread may do it."""
        check_messages(body)
        self._check_parameters(body)
        form = response_format(body)
        self._check_format(form, body["messages"])
        tokens = prompt_tokens(body["messages"])
        if form.schema is not None and self.count_schema:
            tokens += text_tokens(compact(form.schema))
        max_tokens = asked_max_tokens(body)
        check_length(tokens, max_tokens, context=self.context_tokens, output=self.max_output_tokens)
        return understand(body, tokens=tokens, max_tokens=max_tokens)

    def _check_parameters(self, body: Mapping[str, Any]) -> None:
        for name, other in (("max_tokens", "max_completion_tokens"), ("max_completion_tokens", "max_tokens")):
            if self.max_tokens_name == other and body.get(name) is not None:
                message = f"Unsupported parameter: '{name}' is not supported with this model. Use '{other}' instead."
                raise EndpointError(400, message, param=name, code="unsupported_parameter")
        temperature = body.get("temperature")
        if self.temperature_fixed and temperature is not None and temperature != 1:
            message = f"'temperature' does not support {temperature} with this model. Only the default (1) value is supported."
            raise EndpointError(400, f"Unsupported value: {message}", param="temperature", code="unsupported_value")
        if body.get("stream") and not self.stream_supported:
            message = "Unsupported value: 'stream' does not support true with this model. Supported values are: false."
            raise EndpointError(400, message, param="stream", code="unsupported_value")
        if body.get("stream_options") is None:
            return
        if not body.get("stream"):
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise EndpointError(400, message, param="stream_options")
        if self.stream_options == "400":
            message = "Unsupported parameter: 'stream_options' is not supported with this model."
            raise EndpointError(400, message, param="stream_options", code="unsupported_parameter")

    def _check_format(self, form: ResponseFormat, messages: Sequence[Mapping[str, Any]]) -> None:
        if form.kind == "json_schema" and self.json_schema == "500":
            message = (
                "[{'type': 'literal_error', 'loc': ('body', 'response_format', 'type'), "
                "'msg': \"Input should be 'text' or 'json_object'\", 'input': 'json_schema'}]"
            )
            raise EndpointError(500, message, kind="internal_server_error")
        if {"json_schema": self.json_schema, "json_object": self.json_object}.get(form.kind) == "400":
            message = f"Invalid parameter: 'response_format' of type '{form.kind}' is not supported with this model."
            raise EndpointError(400, message, param="response_format", code="unsupported_value")
        if form.kind == "json_schema" and self.strict_schemas:
            check_strict(form)
        if form.kind == "json_object" and not any(
            "json" in content_text(message.get("content")).lower() for message in messages
        ):
            message = (
                "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'."
            )
            raise EndpointError(400, message, param="messages")

    def charge(self, body: Mapping[str, Any], key: str, tokens: int = 0) -> Limits | None:
        """Charge a request to the quota of its *key* and model, and return what is left; None without a quota.

        Raises:
            EndpointError: The quota refuses it.
        """
        if self.quota is None:
            return None
        name = str(body.get("model"))
        meter = self._meters.get((key, name))
        if meter is None:
            meter = self._meters[key, name] = Meter(self.quota, name)
        try:
            return meter.charge(tokens, asyncio.get_running_loop().time())
        except EndpointError:
            self.quota_refusals += 1
            raise
        finally:
            requests, tokens = meter.peaks
            self.peak_requests = max(self.peak_requests, requests)
            self.peak_tokens = max(self.peak_tokens, tokens)

    async def respond(self, body: dict[str, Any], key: str, size: int = 0) -> SimulatedReply:
        """Read a request, in a thread if its *size* in bytes is large, and reply to it.

        Raises:
            EndpointError: The request or the quota refuses it, or a fault is an error response.
        """
        try:
            prompt = self.read(body) if size <= MAX_INLINE_BYTES else await asyncio.to_thread(self.read, body)
        except EndpointError as error:
            error.limits = self.charge(body, key)  # what is refused counts as a request
            raise
        return self.reply(prompt, key)

    async def embed(self, body: dict[str, Any], key: str, size: int = 0) -> EmbeddingReply:
        """Read an embeddings request, in a thread if its *size* in bytes is large, and reply to it.

        Raises:
            EndpointError: As `respond`.
        """
        if not self._can_count:
            await asyncio.to_thread(load_encoding, ENCODING)  # takes half a second
            self._can_count = True
        embeddings, run = self.embeddings, partial(_call, in_thread=size > MAX_INLINE_BYTES)
        try:
            request = await run(embeddings.read, body)
        except EndpointError as error:
            error.limits = self.charge(body, key)
            raise
        limits = self.charge(body, key, request.tokens)
        fault = None if embeddings.faults is None else embeddings.faults.draw(self.embedding_calls, self._spoiled)
        self.embedding_calls += 1
        self.embedded_texts += len(request.texts)
        self._spoiled += fault is not None
        self.faulted += fault is not None
        refusal = embeddings.error(None if fault is None else fault[0])
        if refusal is not None:
            refusal.limits = limits
            raise refusal
        reply = await run(embeddings.reply, request, fault)
        reply.limits = limits
        if reply.ending != "hang":
            self.prompt_tokens += request.tokens
        return reply

    def reply(self, prompt: Prompt, key: str = "") -> SimulatedReply:
        """Charge *prompt*, which `read` returned, to the quota of *key*, answer it, and count it.

        Raises:
            EndpointError: The quota refuses it, or the reply is spoiled by a fault that is an error response.
        """
        try:
            reply = self._reply(prompt, key)
        except EndpointError:
            if self.record:
                self.replies.append("")
            raise
        if reply.ending != "hang":
            self.prompt_tokens += reply.usage.prompt_tokens
            self.completion_tokens += reply.usage.completion_tokens
        if self.record:
            self.replies.append(reply.pieces.text)
        return reply

    def _reply(self, prompt: Prompt, key: str) -> SimulatedReply:
        faults = self.faults if self.faults is not None and self.faults.concern(combined=prompt.combined) else None
        drawn = None if faults is None else faults.draw(self._concerned, self.faulted - self._spoiled)
        fault = drawn or NO_FAULT
        if not prompt.combined:
            fault = fault.for_single(typed=prompt.typed)
        error = fault.error(None if faults is None else faults.retry_after)
        reply = None
        completion = prompt.max_tokens or 0
        if error is None and prompt.max_tokens is None and self.quota is not None:
            # What a reply without a limit will cost is only known once it is written, even if it is then refused.
            reply = self._written(prompt, fault)
            completion = reply.usage.completion_tokens
        limits = self.charge(prompt.body, key, prompt.tokens + completion)
        self.combined_calls += prompt.combined
        self.single_calls += not prompt.combined
        self.items += len(prompt.items)
        self.faulted += drawn is not None
        self._concerned += faults is not None
        if error is not None:
            error.limits = limits
            raise error
        reply = reply or self._written(prompt, fault)
        reply.limits = limits
        if self.cached_prefixes:
            reply.usage += Usage(cached_tokens=self._prefixes.seen(prompt.body["messages"]))
        return reply

    def _written(self, prompt: Prompt, fault: Fault) -> SimulatedReply:
        text, ends = self._text(prompt, fault)
        return self._finish(prompt, split(text), ends, fault)

    def _text(self, prompt: Prompt, fault: Fault) -> tuple[str, list[int]]:
        """Return the reply's text and where each element ends in it."""
        if fault.kind in ("whitespace", "refusal"):
            return (WHITESPACE if fault.kind == "whitespace" else REFUSAL), []
        order = answer_for_all(text for _, text in prompt.items) if self.obey else None
        values = [self._value(text, prompt, order) for _, text in prompt.items]
        if prompt.combined:
            text, ends = self._results(self._elements(prompt, values, fault), fault)
        else:
            text = self._single(prompt, values[0], fault)
            ends = [len(text)]
        if fault.kind == "fenced":
            before, after = fault.fenced()
            return before + text + after, [end + len(before) for end in ends]
        return text, ends

    def _elements(self, prompt: Prompt, values: list[Any], fault: Fault) -> list[Element]:
        elements = [(name, value) for (name, _), value in zip(prompt.items, values, strict=True)]
        if fault.kind == "rambling":
            return fault.rambling(elements, self._reply_limit(prompt) or RAMBLING_TOKENS)
        words = {name for name, text in prompt.items if exact_word(text)}
        return fault.elements(elements, None if prompt.as_text else prompt.schema, words)

    def _results(self, elements: list[Element], fault: Fault) -> tuple[str, list[int]]:
        """Return a combined reply, and where each element ends in it."""
        texts = [compact({"id": name, "answer": answer}, self.indent) for name, answer in elements]
        if fault.kind == "broken_json":
            at = fault.random.randrange(len(texts))
            texts[at] = fault.broken(texts[at])
        head = '{"results":['
        ends = [length + len(head) + place for place, length in enumerate(accumulate(map(len, texts)))]
        return head + ",".join(texts) + "]}", ends

    def _single(self, prompt: Prompt, value: Any, fault: Fault) -> str:
        if prompt.schema is None or prompt.as_text:
            return _as_object(value) if prompt.bare else str(value)
        if fault.kind == "wrong_type":
            inner = unwrap(prompt.schema)
            value = (
                fault.wrong(value, prompt.schema) if inner is None else {"answer": fault.wrong(value["answer"], inner)}
            )
        text = compact(value, self.indent)
        return fault.broken(text) if fault.kind == "broken_json" else text

    def _value(self, text: str, prompt: Prompt, order: str | None) -> Any:
        """Return the answer to one item; without mistakes the same wherever it is asked, unless there is an *order* for all."""
        inner = None if prompt.schema is None else unwrap(prompt.schema)
        word = exact_word(text)
        if word is not None:
            said = word if order is None else order
            return said if inner is None or prompt.combined else {"answer": said}
        schema = prompt.schema if inner is None else inner
        size, wrong, answer = len(prompt.items), self.mistakes, self.answer_to(prompt)
        value = answer(text, schema) if wrong is None else wrong.answer(answer, text, schema, size)
        if prompt.schema is None:
            said = compact(value) if prompt.bare and isinstance(value, dict) else str(value)
            return said if order is None else order
        if order is not None:
            value = obeying(order, value)
        if inner is not None:
            value = {"answer": value}
        return compact(value) if prompt.as_text else value

    def answer_to(self, prompt: Prompt) -> Callable[[str, dict[str, Any] | None], Any]:
        """Return what answers an item of *prompt*."""
        most = prompt.most_each
        if not self.brief or most is None or self.answer is not simulated_answer:
            return self.answer
        wrapped = not prompt.combined and prompt.schema is not None and unwrap(prompt.schema) is not None
        around = _OBJECT_TOKENS if prompt.bare or wrapped else 0
        return partial(simulated_answer, max_tokens=most - around)

    def _reply_limit(self, prompt: Prompt) -> int | None:
        """Return the most tokens that the reply to *prompt* may have, or None for any number."""
        window = None if self.context_tokens is None else self.context_tokens - prompt.tokens
        limits = (prompt.max_tokens, window, self.max_output_tokens)
        return min((limit for limit in limits if limit is not None), default=None)

    def _finish(self, prompt: Prompt, pieces: Pieces, ends: list[int], fault: Fault) -> SimulatedReply:
        """Cut the reply where limits and faults want it, and say how it ends."""
        finish_reason: str | None = "stop"
        ending: Ending = "done"
        hidden = self.reasoning_tokens
        most = self._reply_limit(prompt)
        if most is None and fault.kind == "rambling":
            most = RAMBLING_TOKENS
        if most is not None and hidden + pieces.tokens > most:
            pieces, hidden, finish_reason = pieces.within(max(0, most - hidden)), min(hidden, most), "length"
        if fault.kind in ("truncated", "filtered", "cut", "reset", "stall"):
            pieces = pieces.head(fault.cut(len(pieces.texts)))
        match fault.kind:
            case "truncated":
                finish_reason = "length"
            case "filtered":
                finish_reason = "content_filter"
            case "cut" | "reset" | "stall" as ending:
                finish_reason = None
            case "hang" as ending:
                pieces, finish_reason = pieces.head(0), None
        if prompt.tool is not None and not prompt.named and finish_reason == "stop":
            finish_reason = "tool_calls"  # as OpenAI has it; a call that the request names ends with "stop"
        return SimulatedReply(
            pieces=pieces,
            times=self.latency.times(pieces, ends, hidden),
            finish_reason=finish_reason,
            usage=Usage(prompt.tokens, hidden + pieces.tokens, reasoning_tokens=hidden),
            thinking=self.latency.thinking(hidden),
            ending=ending,
            refusal=fault.kind == "refusal",
            tool=None if fault.kind == "refusal" else prompt.tool,
            service_tier=_granted(prompt.body.get("service_tier")),
        )


async def _call(function: Callable[..., T], *args: object, in_thread: bool) -> T:
    return await asyncio.to_thread(function, *args) if in_thread else function(*args)


def _granted(tier: object) -> str | None:
    """Return the service tier of a request that asks for *tier*: that one, and for "auto" the usual one, under OpenAI's name."""
    return "default" if tier == "auto" else tier if isinstance(tier, str) else None


def _as_object(said: str) -> str:
    """Return what the model says where it must write an object: that, if it is one, else one that holds it."""
    try:
        is_object = isinstance(json.loads(said), dict)
    except ValueError:
        is_object = False
    return said if is_object else compact({"answer": said})
