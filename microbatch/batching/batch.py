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
        line_bytes: The length of each request's line.
        bound: The bound it was composed with, None for none; that of the call may be lowered since.
        early: Whether answers are handed out before the end of the reply.
        tries: Whether the bound is larger than any that the model is known to accept.
        instead: Whether it is made instead of a call whose bound was too low.
        repeated: Whether it was sent again as it is, after a cut that left nothing.
        bug: An error of handing out answers, or None.
        reply: Takes the reply apart.
        answers: Answers found and not handed out yet: pairs of position and decoded answer.
        answer_bytes: The length of each answer so far.
    """

    def __init__(
        self,
        tickets: list[Ticket],
        codec: ChatCodec,
        combined: CombinedCall,
        history: LaneHistory,
        permit: Permit,
        call_state: CallState,
    ) -> None:
        self.tickets = tickets
        self.codec = codec
        self.combined = combined
        self.call = combined.call
        self.history = history
        self.permit = permit
        self.call_state = call_state
        self.line_bytes = [len(ticket.line) for ticket in tickets]
        self.bound = combined.call.bound
        self.early = self.tries = self.instead = self.repeated = False
        self.bug: BaseException | None = None

    def reset(self) -> None:
        """Start on a new reply: nothing of the one before was used."""
        combined, decoders = self.combined, [ticket.answer.decode for ticket in self.tickets]
        self.reply = self.codec.demultiplex(combined.ids, decoders, combined.canary, early=self.early)
        self.answers: list[Answer] = []
        self.answer_bytes = [0] * len(self.tickets)
        self.call_state.found = 0
