"""The codec of combined chat calls: several requests become one call, and its reply becomes their answers.

A codec has three operations: compose a combined call, demultiplex its reply, and compose and read a request alone. Live calls and
provider batches use this one. It depends on neither queues nor files, so that a codec for another endpoint can replace it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.containment import contained
from microbatch.errors import Filtered, MalformedAnswer, RequestFailed, TruncatedReply, mask
from microbatch.prompt.compose import (
    LARGEST_SUM,
    canary_line,
    compose,
    draw_word,
    instruction,
    limits_together,
)
from microbatch.prompt.ids import IdKey
from microbatch.prompt.outcome import ONLY_REASONING, CombinedReply, complaint
from microbatch.protocols import ChatCall
from microbatch.schema.asked_form import FIELDS
from microbatch.schema.decode import misfit_message
from microbatch.thoughts import after_leading_thought, after_thoughts, is_unfinished_thought

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from microbatch.protocols import Completion
    from microbatch.schema.answer_type import AnswerType


class Settings(msgspec.Struct, frozen=True):
    """The settings that the requests of a combined call have in common.

    Attributes:
        model: The model asked; None for the transport's.
        answer: The shape of an answer. Requests of one lane have equal schemas, though perhaps other Python types.
        max_tokens: Most tokens of an answer as callers have set it, or None.
        params: Further request fields, temperature included.
        headers: The caller's headers.
    """

    model: str | None
    answer: AnswerType
    max_tokens: int | None
    params: Mapping[str, Any]
    headers: Mapping[str, str]


class SingleReply(msgspec.Struct, frozen=True):
    """A single reply, read: output and text of the answer, or the error.

    Attributes:
        only_reasoning: Whether it was only the model's reasoning.
        unenforced: Whether nothing in it fits the schema, which the endpoint ignores then.
    """

    output: Any = None
    text: str = ""
    error: RequestFailed | None = None
    only_reasoning: bool = False
    unenforced: bool = False


class CombinedCall(msgspec.Struct, eq=False):
    """A combined call, and what is needed to take its reply apart.

    Attributes:
        ids: The ids of its items, in order; that of the canary is the last.
        canary: The word that the canary has to be answered with; None without a canary.
    """

    call: ChatCall
    ids: list[str]
    canary: str | None = None


class ChatCodec:
    """Wire format 1: several requests in one chat prompt, their answers in one JSON reply.

    Args:
        draw: Returns as many id endings as it is asked for; None derives them from the batch.
        key: The key of derived endings; None for that of this process.
        canary: Whether each combined prompt ends in a canary.
        keep_thoughts: Whether a single text answer keeps the thought before it.
    """

    def __init__(
        self,
        draw: Callable[[int], Sequence[str]] | None = None,
        *,
        key: IdKey | None = None,
        canary: bool = False,
        keep_thoughts: bool = False,
    ) -> None:
        self._draw = draw
        self._key = IdKey() if key is None else key
        self._canary = canary
        self._keep_thoughts = keep_thoughts
        self._shared: Sequence[Mapping[str, Any]] | None = None  # of the latest call, which the next one mostly shares
        self._shared_digest = b""

    def compose(
        self,
        settings: Settings,
        shared: Sequence[Mapping[str, Any]],
        lines: Sequence[bytes],
        bound: int | None = None,
        *,
        apart: Hashable = (),
    ) -> CombinedCall:
        """Return the call that asks for an answer to each of *lines*, from `item_line`, after the *shared* messages.

        The reply may take *bound* tokens. With None it may take what its callers allow together, if that is at most `LARGEST_SUM`.
        Calls that differ in these, in their model, form of answer or headers, or in *apart*, whose repr counts, have other ids.
        """
        draw = self._draw or self._key.draws(self._batch_bytes(settings, shared, lines, apart))
        answer, schema = settings.answer, settings.answer.batch_schema
        max_tokens = limits_together(settings.max_tokens, len(lines), canary=self._canary)
        if bound is not None or (max_tokens is not None and max_tokens > LARGEST_SUM):
            max_tokens = None
        canary = draw_word(draw) if self._canary else None
        if canary is not None:
            lines = [*lines, canary_line(canary)]
            schema = answer.watched_schema
        prompt, ids = compose(instruction(answer.words), lines, draw)
        call = ChatCall(
            messages=[*shared, {"role": "user", "content": prompt}],
            model=settings.model,
            params=_without_form(settings),
            headers=settings.headers,
            schema=schema,
            strict=answer.strict,
            max_tokens=max_tokens,
            bound=bound,
            json_object=answer.form is not None and answer.tool is None,
        )
        return CombinedCall(call, ids, canary)

    def _batch_bytes(
        self, settings: Settings, shared: Sequence[Mapping[str, Any]], lines: Sequence[bytes], apart: Hashable
    ) -> bytes:
        """Return what the ids of a call are derived from: equal for equal calls only, as no line holds a line break."""
        if shared is not self._shared:
            self._shared, self._shared_digest = shared, hashlib.blake2b(msgspec.json.encode(shared)).digest()
        # A reply that a proxy delivers to the wrong caller must not have that caller's ids: so headers, with credentials, are in it.
        about = repr((apart, settings.model, settings.answer.words, settings.headers))
        return b"\n".join((about.encode("utf-8", "surrogatepass"), self._shared_digest, *lines))

    def demultiplex(
        self, ids: Sequence[str], decoders: Sequence[Callable[[str], Any]], canary: str | None, *, early: bool
    ) -> CombinedReply:
        """Return what takes the reply to a combined call apart; see `CombinedReply`."""
        return CombinedReply(ids, decoders, canary, early=early)

    def compose_alone(
        self,
        settings: Settings,
        answer: AnswerType,
        messages: Sequence[Mapping[str, Any]],
        *,
        unenforced: bool = False,
    ) -> ChatCall:
        """Return the call that carries one request, with *settings* but for its own *answer*, and its own messages.

        *unenforced* if an answer to it was `SingleReply.unenforced`.
        """
        return ChatCall(
            messages=messages,
            model=settings.model,
            params=settings.params,
            headers=settings.headers,
            schema=answer.single_schema,
            strict=answer.strict,
            hint=answer.hint,
            max_tokens=settings.max_tokens,
            unenforced=unenforced,
        )

    def read_alone(self, answer: AnswerType, completion: Completion, content: str, *, combinable: bool) -> SingleReply:
        """Return the answer in *content*, the text of a single reply; set `completion.thought` if there was a thought in it.

        If the request was not *combinable*, or its own fields ask for a form, a text need not be an answer: tool calls and the like are
        in `completion.body`, which is the caller's as it is.
        """
        if completion.damaged:
            return SingleReply(error=MalformedAnswer("a part of the reply could not be read", raw=content))
        said, form = content, answer.form
        if not answer.is_text and form is None:
            completion.thought = completion.thought or after_thoughts(content) is not content
        elif not self._keep_thoughts:
            said = after_leading_thought(content)
            completion.thought = completion.thought or said is not content
        if answer.tool is not None:
            said = answer.tool.arguments_in(completion.body) or said
        if (form is not None or (not combinable and answer.is_text)) and completion.finish_reason is not None:
            return SingleReply(said, said)
        error = complaint(completion)
        if isinstance(error, Filtered):
            error.body = mask(content)
        elif error is None and completion.finish_reason == "length":
            error = self._cut_short(answer, completion, content, said)
        if error is not None:
            return SingleReply(error=error)
        with contained() as decoding:
            return SingleReply(*answer.decode_single(said))
        empty = not said.strip()
        reasoning = empty and _reasoned(completion)
        wrong = "the answer is empty" if empty else misfit_message(decoding.error)
        malformed = MalformedAnswer(ONLY_REASONING if reasoning else wrong, raw=content)
        malformed.__cause__ = decoding.error
        return SingleReply(
            error=malformed, only_reasoning=reasoning, unenforced=not empty and not answer.follows_schema(said)
        )

    def _cut_short(self, answer: AnswerType, completion: Completion, content: str, said: str) -> TruncatedReply | None:
        """Return the error of a single reply that the token limit ended; None for a text that has begun."""
        unfinished = not self._keep_thoughts and is_unfinished_thought(said)
        if unfinished or not said.strip():
            completion.thought = completion.thought or unfinished
            where = "before the answer began; raise max_tokens"
            if _reasoned(completion):
                where = f"by reasoning, {where}, or ask for less reasoning (reasoning_effort)"
            return TruncatedReply(f"the token limit was reached {where}", raw=content)
        return None if answer.is_text else TruncatedReply("the answer was cut off by the token limit", raw=content)


def _without_form(settings: Settings) -> Mapping[str, Any]:
    """Return the request fields of a combined call: those of *settings* without what asks for a form, which is its schema."""
    if settings.answer.form is None:
        return settings.params
    return {name: value for name, value in settings.params.items() if name not in FIELDS}


def _reasoned(completion: Completion) -> bool:
    return completion.thought or (completion.usage is not None and completion.usage.reasoning_tokens > 0)
