"""A combined call: its requests, its prompt, and its reply as it is taken apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microbatch.batching.call_state import CallState
    from microbatch.batching.lane_history import LaneHistory
    from microbatch.batching.permits import Permit
    from microbatch.batching.ticket import Ticket
    from microbatch.prompt.codec import ChatCodec, CombinedCall
    from microbatch.prompt.demultiplexer import Answer


class Batch:
    """A combined call, composed and ready to be sent.

    Attributes:
        tickets: Its requests.
        combined: What the codec composed.
        call: The call itself.
        history: What is known of the lane.
        permit: Pays the call.
        call_state: The call under way.
        line_bytes: The length of each request's line.
        reply: Takes the reply apart.
        answers: Answers found and not handed out yet: pairs of position and decoded answer.
        answer_bytes: The length of each answer so far.
        bug: An error of handing them out, or None.
        repeated: Whether it was sent again as it is, after a cut that left nothing.
        bound: The bound it was composed with, None for none; that of the call may be lowered since.
        tries: Whether that is larger than any bound the model is known to accept.
        instead: Whether it is made instead of a call whose bound was too low.
    """

    __slots__ = (
        "_codec",
        "_early",
        "answer_bytes",
        "answers",
        "bound",
        "bug",
        "call",
        "call_state",
        "combined",
        "history",
        "instead",
        "line_bytes",
        "permit",
        "repeated",
        "reply",
        "tickets",
        "tries",
    )

    def __init__(
        self,
        tickets: list[Ticket],
        codec: ChatCodec,
        combined: CombinedCall,
        history: LaneHistory,
        permit: Permit,
        call_state: CallState,
        *,
        early: bool,
        tries: bool = False,
        instead: bool = False,
    ) -> None:
        self.tickets = tickets
        self.combined = combined
        self.call = combined.call
        self.history = history
        self.permit = permit
        self.call_state = call_state
        self.bound = combined.call.bound
        self.tries = tries
        self.instead = instead
        self.line_bytes = [len(ticket.line) for ticket in tickets]
        self.bug: BaseException | None = None
        self.repeated = False
        self._codec = codec
        self._early = early
        self.reset()

    def reset(self) -> None:
        """Start on a new reply: nothing of the one before was used."""
        decoders = [ticket.answer.decode for ticket in self.tickets]
        combined = self.combined
        self.reply = self._codec.demultiplex(combined.ids, decoders, canary=combined.canary, early=self._early)
        self.answers: list[Answer] = []
        self.answer_bytes = [0] * len(self.tickets)
        self.call_state.found = 0
