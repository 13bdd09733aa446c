"""What the end of a call means for the requests it carried. Judges; acts on nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from microbatch.errors import (
    BadRequest,
    ContextTooLong,
    Filtered,
    MalformedAnswer,
    MissingAnswer,
    Refused,
    ReplyError,
    RequestFailed,
    TransportError,
    TruncatedReply,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from microbatch.batching.demultiplexer import Demultiplexer
    from microbatch.batching.ticket import Ticket
    from microbatch.protocols import Completion

# Statuses of a refusal that one of the items may be to blame for. 404 names the model, not the request.
_BLAMEABLE = frozenset({400, 413, 422})

Ending = Literal["complete", "length", "cut", "refused", "failed"]
"""How a combined call ended: with a reply, at the token limit, cut off, refused for something an item may be to blame for,
or failed for reasons that no item has to do with."""


class Open(msgspec.Struct):
    """A request that a combined call left open, and the error its caller would get if it were not asked again."""

    ticket: Ticket
    error: ReplyError


class Outcome(msgspec.Struct):
    """How a combined call ended.

    Attributes:
        ending: See `Ending`.
        asked: Requests it carried.
        open: Those that still wait for an answer.
        error: What ended it, for endings other than "complete" and "length".
        damaged: Whether the reply itself is to blame for what is open.
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
    open: list[Open]
    error: RequestFailed | None = None
    damaged: bool = False
    heard: bool = True
    sound: bool = True
    in_order: bool = True
    past_the_end: bool = False
    bounded: bool = False
    again: bool = False
    runaway: bool = False


def ending(completion: Completion | None, error: RequestFailed | None, *, heard: bool) -> Ending:
    """Return how a combined call ended.

    Args:
        completion: How the endpoint ended it, None if it did not.
        error: What the transport raised, or None.
        heard: Whether any text had come.
    """
    if error is not None:
        if isinstance(error, ContextTooLong | Filtered) or (
            isinstance(error, BadRequest) and error.status in _BLAMEABLE
        ):
            return "refused"
        # An error after the first words is a cut: what was finished before it stands.
        return "cut" if heard and isinstance(error, TransportError) else "failed"
    if completion is None or completion.finish_reason in (None, "error"):
        return "cut"
    if completion.refusal is not None or completion.finish_reason == "content_filter":
        return "refused"
    return "length" if completion.finish_reason == "length" else "complete"


def complaint(completion: Completion | None) -> RequestFailed | None:
    """Return what is wrong with a reply as a whole, or None."""
    if completion is None:
        return None
    if completion.refusal is not None:
        return Refused("the model declined to answer", raw=completion.refusal)
    if completion.finish_reason == "content_filter":
        return Filtered(
            "the endpoint's content filter stopped the answer", status=200, request_id=completion.request_id
        )
    if completion.finish_reason in (None, "error"):
        return TransportError("the reply was cut off: it ended without a finish_reason")
    return None


def left_open(
    tickets: Sequence[Ticket], demultiplexer: Demultiplexer, *, truncated: bool, trusted: bool = True
) -> Iterator[Open]:
    """Yield the requests of an ended call that still wait, with what their callers would be told.

    Args:
        tickets: The requests.
        demultiplexer: What took the reply apart.
        truncated: Whether it hit the token limit.
        trusted: Whether its canary was answered right, if it had one.
    """
    faults = {index: (fault, raw) for index, fault, raw in demultiplexer.faults()}
    for index, ticket in enumerate(tickets):
        if ticket.future.done():
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
        yield Open(ticket, error)


def read_alone(ticket: Ticket, completion: Completion, content: str) -> tuple[Any, str, RequestFailed | None]:
    """Return output and text of a single reply, and the error if there is none to be had."""
    if not ticket.combinable and ticket.answer.is_text and completion.finish_reason is not None:
        return content, content, None  # tool calls and the like: what matters is in `body`
    error = complaint(completion)
    if error is None and completion.finish_reason == "length" and not ticket.answer.is_text:
        error = TruncatedReply("the answer was cut off by the token limit", raw=content)
    if error is not None:
        return None, "", error
    try:
        return *ticket.answer.decode_single(content), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as reason:  # noqa: BLE001 a user's validator may raise anything; a Rust panic is no Exception
        wrong = "is empty" if not content.strip() else "does not fit output_type"
        malformed = MalformedAnswer(f"the answer {wrong}", raw=content)
        malformed.__cause__ = reason
        return None, "", malformed
