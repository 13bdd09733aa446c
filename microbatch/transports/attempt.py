"""`Attempt`: sends one call and reads the answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from microbatch.transports.chat_wire import completion_object
from microbatch.transports.error_parsing import Fault
from microbatch.transports.exchange import MAX_ERROR_BYTES, Exchange
from microbatch.transports.http import Pacer, guarded, read_all
from microbatch.transports.lenient import is_json
from microbatch.transports.reply_reader import ReplyReader
from microbatch.transports.response_headers import read_limits, request_id
from microbatch.transports.sse import SSEDecoder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import aiohttp

    from microbatch.errors import StatusError
    from microbatch.protocols import Completion
    from microbatch.transports.capabilities import Capabilities, Plan

MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
# Seconds to wait, once the answer is complete, for the usage, the end mark, and the end of the body (which frees the connection).
FINISH_GRACE: Final = 2.0
DONE_GRACE: Final = 0.1

_BOM: Final = b"\xef\xbb\xbf"
# Beginnings of the lines of an event stream.
_FIELDS: Final = (b"data:", b"event:", b"id:", b"retry:", b":")


@dataclass(eq=False, repr=False, kw_only=True)
class Attempt(Exchange):
    """One attempt at one call.

    Attributes:
        on_event: See `ChatCall`.
    """

    plan: Plan
    capabilities: Capabilities
    on_text: Callable[[str], None]
    on_event: Callable[[bytes], None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reader = ReplyReader()
        self._accepted = self._gave_text = self._finished_early = False

    async def run(self, sending: Awaitable[aiohttp.ClientResponse]) -> Completion:
        """Make the attempt; *sending* returns the response when its headers have arrived."""
        failure = await self._exchange(sending)
        # A finish reason that more text has followed comes with every chunk, and so says nothing of the end.
        complete = self._reader.done or (self._reader.complete and not self._finished_early)
        if failure is not None and not complete:
            raise failure
        headers = self._response.headers
        completion = self._reader.completion(request_id(headers), read_limits(headers))
        completion.bound = self.plan.bound
        if completion.body is None and (calls := self._reader.calls.joined()):
            reason, members = completion.finish_reason or "tool_calls", {"tool_calls": calls}
            completion.body = completion_object(None, model=completion.model, finish_reason=reason, members=members)
        return completion

    async def _receive(self) -> None:
        await self._check_status()
        response = self._response
        if self.on_event is not None:
            self.on_event(b"")
        head = bytearray()
        form = "unclear"
        while form == "unclear" and len(head) < MAX_REPLY_BYTES:
            chunk = await guarded(response.content.readany(), self.where)
            if not chunk:
                break
            head += chunk
            form = _form(head)
        # The content type is often wrong (openclaw#97454: JSON for a stream; one-api: an event stream for JSON), the text never.
        if form == "events" or (form != "json" and (self._content_type == "text/event-stream" or self.plan.stream)):
            raw = await self._receive_stream(bytes(head))
        else:
            self.clock.begin()
            raw = await read_all(response, MAX_REPLY_BYTES, self.where, begun=head)
            text = self._reader.whole(raw)
            if isinstance(text, Fault):
                self._refuse(text)
            self._deliver(text)
        if not self._reader.answering:
            # Gemini sends no choices, and no reason, for a prompt that its filter has blocked, each time that it is asked
            # (BerriAI/litellm#40252).
            blocked = self._reader.spoke and self.capabilities.unanswered(self.plan)
            self._no_answer(self._reader.lack, raw, len(raw), known=self.capabilities.answered, blocked=blocked)

    async def _receive_stream(self, head: bytes) -> bytes:
        """Take a stream; return what of it came before it began to answer."""
        decoder = SSEDecoder()
        pacer = Pacer(self._response, self.clock.interval, self.clock.end)
        received = bytearray()
        chunk = head
        while chunk:
            if not self._reader.answering and len(received) < MAX_ERROR_BYTES:
                received += chunk
            self._take_events(decoder.feed(chunk))
            if (self._gave_text or self._reader.thought) and not self._reader.complete:
                pacer.pause()
            chunk = await guarded(pacer.read(), self.where)
        self._take_events(decoder.close(), torso=True)
        self._deliver(self._reader.rest())
        return bytes(received)

    def _take_events(self, events: Sequence[bytes], *, torso: bool = False) -> None:
        """Take the data of events; with *torso* they may be incomplete, because the stream was cut."""
        reader = self._reader
        was_complete, was_done = reader.complete, reader.done
        texts: list[str] = []
        for data in filter(None, events):  # an empty event only keeps the connection alive
            self.clock.begin()
            complete = reader.complete
            text = reader.event(data, torso=torso)
            if isinstance(text, Fault):
                self._deliver("".join(texts))
                self._refuse(text)
            is_for_caller = not reader.done and data.lstrip()[:1] == b"{" and (not torso or is_json(data))
            if self.on_event is not None and is_for_caller:
                self.on_event(data)
                self.on_text("")  # it cannot be taken back, as a text cannot
            if text:
                texts.append(text)
                # Some endpoints send a finish reason with every chunk, which does not mark the end then.
                self._finished_early = self._finished_early or complete
        self._deliver("".join(texts))
        if reader.done:
            if not was_done:
                self.clock.grace(DONE_GRACE)
        elif reader.complete and not self._finished_early and self._gave_text:
            if not was_complete:
                self.clock.grace(FINISH_GRACE)
        elif any(events) and (self._gave_text or reader.thought):
            # Not before the first words: until then an endpoint may be silent while the model reasons.
            self.clock.feed()

    def _deliver(self, text: str) -> None:
        if self._reader.answering and not self._accepted:
            # At the first sign and not at the end: a call whose callers have all been answered is cancelled before it.
            self._accepted = True
            self.capabilities.accepted(self.plan, asyncio.get_running_loop().time())
        if text:
            self._gave_text = True
            self.on_text(text)

    def _asked(self) -> Sequence[Any]:
        return [message.get("content") for message in self.plan.call.messages]

    def _learned(self, fault: Fault, error: StatusError) -> StatusError:
        if self._gave_text:
            return error
        return self.capabilities.learn(self.plan, fault, error, asyncio.get_running_loop().time())


def _form(head: bytearray) -> Literal["json", "events", "neither", "unclear"]:
    """Return the form of a body that begins with *head*; "unclear" if that is too short to tell."""
    text = bytes(head.removeprefix(_BOM).lstrip())
    if text[:1] in (b"{", b"["):
        return "json"
    if text.startswith(_FIELDS):
        return "events"
    return "unclear" if len(text) < max(map(len, _FIELDS)) else "neither"
