"""What the end of a call means for the requests it carried. Judges; acts on nothing."""

from __future__ import annotations

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
    ReplyError,
    RequestFailed,
    TransportError,
    TruncatedReply,
    mask,
)
from microbatch.prompt.thoughts import after_leading_thought, after_thoughts, is_unfinished_thought

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from microbatch.batching.ticket import Ticket
    from microbatch.prompt.demultiplexer import Demultiplexer
    from microbatch.protocols import Completion

# Statuses of a refusal that one of the items may be to blame for. 404 names the model, not the request; a 429 that is no RateLimited
# speaks of the request's size.
_BLAMEABLE = frozenset({400, 413, 422, 429})

_OK, _FORBIDDEN = 200, 403
_STOPPED = "content_filter"

ONLY_REASONING = (
    "the answer is empty, all that came is the model's reasoning; "
    "turn reasoning off for this model, or its server's reasoning parser"
)
"""The message of an error."""

Ending = Literal["complete", "length", "cut", "refused", "failed"]
"""How a combined call ended: with a reply, at the token limit, cut off, refused for something an item may be to blame for,
or failed for reasons that no item has to do with."""


class Unanswered(msgspec.Struct):
    """A request that a combined call left open, and the error its caller would get if it were not asked again."""

    ticket: Ticket
    error: ReplyError


class CallOutcome(msgspec.Struct):
    """How a combined call ended.

    Attributes:
        ending: See `Ending`.
        asked: Requests it carried.
        open: Those that still wait for an answer.
        error: What ended it, for endings other than "complete" and "length".
        damaged: Whether the reply itself is to blame for what is open.
        only_reasoning: Whether all that came is the model's reasoning, though it ended as it should.
        heard: Whether the reply had any text.
        sound: Whether it had an element that was asked for and fits.
        in_order: Whether its elements came in the order in which they were asked for, none twice and none that was not.
        past_the_end: Whether it went on after as many elements as were asked for, with nothing of use.
        bounded: Whether the call was made with a bound of ours.
        again: Whether its bound was too low: what is open is asked again together, with a higher one.
        runaway: Whether the model did not stop where it should have.
    """

    ending: Ending
    asked: int
    open: list[Unanswered]
    error: RequestFailed | ConfigError | None = None
    damaged: bool = False
    only_reasoning: bool = False
    heard: bool = True
    sound: bool = True
    in_order: bool = True
    past_the_end: bool = False
    bounded: bool = False
    again: bool = False
    runaway: bool = False


def ending(
    completion: Completion | None,
    error: RequestFailed | ConfigError | None,
    *,
    heard: bool,
    has_worked: bool = False,
) -> Ending:
    """Return how a combined call ended.

    Args:
        completion: How the endpoint ended it, None if it did not.
        error: What the transport raised, or None.
        heard: Whether any text had come.
        has_worked: Whether calls under the same key were answered before, so that a 403 is about what was asked.
    """
    if error is not None:
        if _may_be_an_items(error, has_worked=has_worked):
            return "refused"
        # An error after the first words is a cut: what was finished before it stands.
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
    # A transport that cannot send a call may be unable to because of one item. Finding that out costs no attempts.
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
        return Filtered(
            "the endpoint's content filter stopped the answer",
            status=200,
            code=_STOPPED,
            request_id=completion.request_id,
        )
    if completion.finish_reason in (None, "error"):
        return TransportError("the reply was cut off: it ended without a finish_reason")
    return None


def unanswered_of(
    tickets: Sequence[Ticket], demultiplexer: Demultiplexer, *, truncated: bool, trusted: bool = True
) -> Iterator[Unanswered]:
    """Yield the requests of an ended call that still wait, with what their callers would be told.

    Args:
        tickets: The requests.
        demultiplexer: What took the reply apart.
        truncated: Whether it hit the token limit.
        trusted: Whether its canary was answered right, if it had one.
    """
    faults = {index: (fault, raw) for index, fault, raw in demultiplexer.faults()}
    for index, ticket in enumerate(tickets):
        if ticket.done:
            continue
        fault, raw = faults.get(index, ("overlong" if trusted else "distrusted", ""))
        error: ReplyError
        if fault == "missing" and truncated:
            error = TruncatedReply("the combined reply hit the token limit before this answer")
        elif fault == "missing":
            error = MissingAnswer("the combined reply held no answer to this request")
        elif fault == "repeated":
            error = MalformedAnswer("the combined reply held several answers to this request")
        elif fault == "distrusted":
            error = MalformedAnswer("the combined reply got its canary wrong, so none of its answers is trusted")
        elif fault == "overlong":
            error = MalformedAnswer("the answer is longer than max_tokens allows")
        else:
            error = MalformedAnswer("the answer in the combined reply does not fit output_type", raw=raw)
        yield Unanswered(ticket, error)


def may_differ(error: RequestFailed | ConfigError | None, *, after_combined: bool) -> bool:
    """Return whether a single request that ended in *error* may be answered when it is asked once more.

    It may if the answer does not fit, and after a combined call also if a filter stopped it midway: the next one is another.
    """
    if isinstance(error, Filtered):
        return after_combined and (error.status, error.code) == (_OK, _STOPPED) and bool(error.body)
    return isinstance(error, MalformedAnswer)


def read_alone(
    ticket: Ticket, completion: Completion, content: str, *, keep_thoughts: bool = False
) -> tuple[Any, str, RequestFailed | None]:
    """Return output and text of a single reply, and the error if there is none to be had.

    Args:
        ticket: The request.
        completion: How the call ended.
        content: The text of the reply.
        keep_thoughts: Whether a plain text keeps the thought before it.
    """
    if completion.damaged:
        return None, "", MalformedAnswer("a part of the reply could not be read", raw=content)
    said = content
    if not ticket.answer.is_text:
        completion.thought = completion.thought or after_thoughts(content) is not content
    elif not keep_thoughts:
        said = after_leading_thought(content)
        completion.thought = completion.thought or said is not content
    if not ticket.combinable and ticket.answer.is_text and completion.finish_reason is not None:
        return said, said, None  # tool calls and the like: what matters is in `body`
    error = complaint(completion)
    if isinstance(error, Filtered):
        error.body = mask(content)
    elif error is None and completion.finish_reason == "length":
        unfinished = not keep_thoughts and is_unfinished_thought(said)
        if unfinished or not said.strip():
            completion.thought = completion.thought or unfinished
            error = TruncatedReply(f"the token limit was reached {_before_the_answer(completion)}", raw=content)
        elif not ticket.answer.is_text:
            error = TruncatedReply("the answer was cut off by the token limit", raw=content)
    if error is not None:
        return None, "", error
    try:
        return *ticket.answer.decode_single(said), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as reason:  # noqa: BLE001 a user's validator may raise anything; a Rust panic is no Exception
        wrong = "the answer is empty" if not said.strip() else "the answer does not fit output_type"
        if not said.strip() and _reasoned(completion):
            wrong = ONLY_REASONING
        malformed = MalformedAnswer(wrong, raw=content)
        malformed.__cause__ = reason
        return None, "", malformed


def _reasoned(completion: Completion) -> bool:
    """Whether a reply shows that the model has reasoned."""
    return completion.thought or (completion.usage is not None and completion.usage.reasoning_tokens > 0)


def _before_the_answer(completion: Completion) -> str:
    if not _reasoned(completion):
        return "before the answer began; raise max_tokens"
    return "by reasoning, before the answer began; raise max_tokens, or ask for less reasoning (reasoning_effort)"
