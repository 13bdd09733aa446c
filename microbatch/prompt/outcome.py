"""Judgement of combined replies: their answers, what is unanswered, how the call ended. No side effects."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from microbatch.errors import (
    AuthFailed,
    BadRequest,
    ConfigError,
    ContextTooLong,
    Filtered,
    MalformedAnswer,
    MissingAnswer,
    Refused,
    RequestFailed,
    TransportError,
    TruncatedReply,
)
from microbatch.prompt.compose import check_canary
from microbatch.prompt.demultiplexer import Demultiplexer
from microbatch.schema.decode import misfit_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from microbatch.errors import ReplyError
    from microbatch.prompt.demultiplexer import Answer
    from microbatch.protocols import Completion

# Statuses of a refusal that one item may cause. 404 names the model, not the request; a 429 that is no RateLimited refuses the
# request's size.
_BLAMEABLE = frozenset({400, 413, 422, 429})

_OK, _FORBIDDEN = 200, 403
_STOPPED = "content_filter"

ONLY_REASONING = (
    "the answer is empty, all that came is the model's reasoning; "
    "turn reasoning off for this model, or its server's reasoning parser"
)
"""The message of an error."""

_DISTRUSTED = "the combined reply got its canary wrong, so none of its answers is trusted"

Ending = Literal["complete", "length", "cut", "refused", "failed"]
"""The ending of a combined call: a whole reply, the token limit, broken off, refused for something that one item may have caused,
or failed for a reason that no item has caused."""


class CombinedReply:
    """The reply to a combined call, taken apart as it arrives.

    Args:
        ids: See `CombinedCall`.
        decoders: For each request, what decodes the JSON of its answer; raises if it does not fit.
        canary: See `CombinedCall`.
        early: Whether answers are delivered before the end of the reply; not with a canary.

    Attributes:
        ids: As given.
        elements: The demultiplexer.
        heard: Whether any text has come.
        sound: Whether any element was asked for and fits.
        trusted: After `close`: whether the canary was answered right, if there is one.
    """

    def __init__(
        self, ids: Sequence[str], decoders: Sequence[Callable[[str], Any]], canary: str | None = None, *, early: bool
    ) -> None:
        self.ids = ids
        self._size = len(decoders)
        if canary is not None:
            decoders = [*decoders, partial(check_canary, canary)]
        self.elements: Demultiplexer = Demultiplexer(ids, decoders, early=early)
        self.heard: bool = False
        self.sound: bool = False
        self.trusted: bool = canary is None

    def feed(self, text: str) -> list[Answer]:
        """Take the next piece of the reply; return the answers that can be delivered now."""
        self.heard = self.heard or bool(text)
        answers = self.elements.feed(text)
        self.sound = self.sound or bool(answers)
        return answers

    def close(self, ending: Ending) -> list[Answer]:
        """End the reply; return the remaining answers, none if the canary was answered wrong."""
        complete = ending == "complete"
        answers = self.elements.close(ended=complete or ending in ("length", "refused"), complete=complete)
        self.sound = self.sound or bool(answers)
        if not self.trusted:
            self.trusted = any(position == self._size for position, _ in answers)
            answers = [answer for answer in answers if answer[0] < self._size] if self.trusted else []
        return answers

    def unanswered(self, ending: Ending) -> Iterator[tuple[int, ReplyError]]:
        """Yield the position of each request that the reply does not answer, with the error that says why."""
        if not self.trusted:
            for position in range(self._size):
                yield position, MalformedAnswer(_DISTRUSTED)
            return
        for position, fault, raw in self.elements.faults():
            if fault == "missing" and ending == "length":
                yield position, TruncatedReply("the combined reply hit the token limit before this answer")
            elif fault == "missing":
                yield position, MissingAnswer("the combined reply held no answer to this request")
            elif fault == "repeated":
                yield position, MalformedAnswer("the combined reply held several answers to this request")
            else:
                wrong = misfit_message(self.elements.errors.get(position))
                yield position, MalformedAnswer(f"{wrong}, in the combined reply", raw=raw)


class CallOutcome(msgspec.Struct):
    """The outcome of a combined call.

    Attributes:
        asked: Requests it carried.
        unanswered: The positions of those that still wait.
        completion: The end of the reply as the endpoint reported it; None if it did not.
        error: The error that ended the call, or what is wrong with the reply as a whole; None for neither.
        bounded: Whether the call was composed with a bound.
        again: Whether the bound was too low: what is unanswered is asked again together, with a higher one.
        runaway: Whether the model did not stop where it should have.
    """

    ending: Ending
    asked: int
    unanswered: list[int]
    reply: CombinedReply
    completion: Completion | None = None
    error: RequestFailed | ConfigError | None = None
    bounded: bool = False
    again: bool = False
    runaway: bool = False

    @property
    def damaged(self) -> bool:
        """True if the reply itself is the reason for what is unanswered."""
        elements = self.reply.elements
        return bool(self.unanswered) and (elements.damaged or any(True for _ in elements.faults()))

    @property
    def only_reasoning(self) -> bool:
        """True if the reply ended properly and was the model's reasoning only."""
        completion = self.completion
        return self.ending == "complete" and not self.reply.heard and completion is not None and completion.thought


def ending(
    completion: Completion | None, error: RequestFailed | ConfigError | None, *, heard: bool, has_worked: bool = False
) -> Ending:
    """Return how a combined call ended.

    Args:
        completion: The end of the reply as the endpoint reported it; None if it did not.
        error: The transport's error, or None.
        heard: Whether any text had come.
        has_worked: Whether calls under the same key were answered before, so that a 403 refuses what was asked.
    """
    if error is not None:
        if _may_be_an_items(error, has_worked=has_worked):
            return "refused"
        # After an error in the middle of a reply, the answers that were complete before it are valid.
        return "cut" if heard and isinstance(error, TransportError) else "failed"
    if completion is None or completion.finish_reason in (None, "error"):
        return "cut"
    if completion.refusal is not None or completion.finish_reason == _STOPPED:
        return "refused"
    return "length" if completion.finish_reason == "length" else "complete"


def _may_be_an_items(error: RequestFailed | ConfigError, *, has_worked: bool) -> bool:
    """Return whether one item of a combined call may be the cause of *error*."""
    if isinstance(error, AuthFailed):
        return has_worked and error.status == _FORBIDDEN
    # One item may be the reason why a transport cannot send a call. Finding out which costs no attempts.
    return isinstance(error, ConfigError | ContextTooLong | Filtered) or (
        isinstance(error, BadRequest) and error.status in _BLAMEABLE
    )


def complaint(completion: Completion | None) -> RequestFailed | None:
    """Return what is wrong with a reply as a whole, or None."""
    if completion is None:
        return None
    if completion.refusal is not None:
        return Refused("the model declined to answer", raw=completion.refusal)
    if completion.finish_reason == _STOPPED:
        message, request_id = "the endpoint's content filter stopped the answer", completion.request_id
        return Filtered(message, status=_OK, code=_STOPPED, request_id=request_id)
    if completion.finish_reason in (None, "error"):
        return TransportError("the reply was cut off: it ended without a finish_reason")
    return None


def may_differ(error: RequestFailed | ConfigError | None, *, after_combined: bool) -> bool:
    """Return whether a single request that ended in *error* may be answered when it is asked once more.

    True if the answer does not fit. After a combined call also if a filter stopped the answer midway, because the next answer is
    another one.
    """
    if isinstance(error, Filtered):
        return after_combined and (error.status, error.code) == (_OK, _STOPPED) and bool(error.body)
    return isinstance(error, MalformedAnswer)
