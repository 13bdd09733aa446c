"""One attempt at one call: what the endpoint answers is read, timed, handed on and learned from."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Literal, NoReturn

from microbatch.errors import BadRequest, ConnectFailed, ServerError, StatusError
from microbatch.transports.bound_refusals import read_refusal, words_of
from microbatch.transports.credentials import is_credential
from microbatch.transports.error_parsing import Fault, read_fault, to_error, unanswered
from microbatch.transports.http import guarded, read_all, read_some
from microbatch.transports.reply_reader import ReplyReader
from microbatch.transports.response_headers import read_limits
from microbatch.transports.sse import SSEDecoder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    import aiohttp

    from microbatch.errors import TransportTimeout
    from microbatch.messages import Limits
    from microbatch.protocols import Completion
    from microbatch.transports.capabilities import Capabilities, Plan
    from microbatch.transports.http import Clock

MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
MAX_ERROR_BYTES: Final = 1024 * 1024
# What still comes after the answer is complete (usage, the end mark, the end of the body that lets the connection be used
# again) is worth only so long a wait.
FINISH_GRACE: Final = 2.0
DONE_GRACE: Final = 0.1
ERROR_GRACE: Final = 5.0

_BOM: Final = b"\xef\xbb\xbf"
# How a line of an event stream may begin.
_FIELDS: Final = (b"data:", b"event:", b"id:", b"retry:", b":")


class Attempt:
    """One attempt at one call, from the first byte sent to the last one read."""

    def __init__(
        self,
        plan: Plan,
        capabilities: Capabilities,
        clock: Clock,
        on_text: Callable[[str], None],
        *,
        where: str,
        headers: Mapping[str, str],
        secrets: Sequence[str] = (),
    ) -> None:
        self._plan = plan
        self._capabilities = capabilities
        self._clock = clock
        self._on_text = on_text
        self._where = where
        self._headers = headers
        self._known_secrets = secrets
        self._reader = ReplyReader()
        self._accepted = False
        self._gave_text = False
        self._finished_early = False

    async def run(self, sending: Awaitable[aiohttp.ClientResponse]) -> Completion:
        """Make the attempt; *sending* ends when the answer's head is there."""
        request_id: str | None = None
        limits: Limits | None = None
        timeout: TransportTimeout | None = None
        try:
            async with self._clock.scope:
                response = await guarded(sending, self._where)
                try:
                    request_id = response.headers.get("x-request-id")
                    limits = read_limits(response.headers)
                    await self._receive(response)
                finally:
                    # A half-read connection must not go back to the pool: the next call would read this answer's rest.
                    # Read to its end it is back there already, and this does nothing.
                    response.close()
        except TimeoutError:
            if not self._clock.scope.expired():
                raise  # not of our making
            if not self._reader.complete:
                timeout = self._clock.error(self._where)
        except ConnectFailed:
            if not self._reader.complete:
                raise
        if timeout is not None:
            raise timeout  # out here, where nothing of aiohttp's is attached to it
        completion = self._reader.completion(request_id, limits)
        completion.bound = self._plan.bound
        return completion

    async def _receive(self, response: aiohttp.ClientResponse) -> None:
        kind = response.content_type if "Content-Type" in response.headers else ""
        if not 200 <= response.status < 300:  # noqa: PLR2004 (the class of success)
            raw = await read_some(response, MAX_ERROR_BYTES, ERROR_GRACE)
            self._refuse(read_fault(raw, response.status), raw, response)
        head = bytearray()
        form = "unclear"
        while form == "unclear" and len(head) < MAX_REPLY_BYTES:
            chunk = await guarded(response.content.readany(), self._where)
            if not chunk:
                break
            head += chunk
            form = _form(head)
        # The content type is often wrong (openclaw#97454: JSON for a stream; one-api: an event stream for JSON), the text never.
        if form == "events" or (form != "json" and (kind == "text/event-stream" or self._plan.stream)):
            await self._receive_stream(bytes(head), response, kind)
        else:
            raw = await read_all(response, MAX_REPLY_BYTES, self._where, begun=head)
            self._take_whole(raw, kind, response)

    def _take_whole(self, raw: bytes, kind: str, response: aiohttp.ClientResponse) -> None:
        try:
            text = self._reader.whole(raw)
        except ServerError as error:
            self._no_answer(str(error), raw, kind, response)
        self._deliver(text, raw, response)

    async def _receive_stream(self, head: bytes, response: aiohttp.ClientResponse, kind: str) -> None:
        decoder = SSEDecoder()
        received = bytearray()
        chunk = head
        while chunk:
            if not self._reader.answering and len(received) < MAX_ERROR_BYTES:
                received += chunk
            for data in decoder.feed(chunk):
                self._take_event(data, response)
            chunk = await guarded(response.content.readany(), self._where)
        for data in decoder.close():
            self._take_event(data, response, torso=True)
        self._deliver(self._reader.rest(), b"", response)
        if not self._reader.answering:
            said = "the stream has no choices" if self._reader.spoke else "the answer is no chat completion"
            self._no_answer(said, bytes(received), kind, response)

    def _take_event(self, data: bytes, response: aiohttp.ClientResponse, *, torso: bool = False) -> None:
        """Take the data of an event; *torso* if it lacks its end, and may say no more than that the stream was cut."""
        if not data:
            return  # a keep-alive in the form of an empty event
        reader = self._reader
        was_complete, was_done = reader.complete, reader.done
        text = reader.event(data, torso=torso)
        if text and not isinstance(text, Fault):
            # Some endpoints give a finish reason with every chunk; then it tells nothing of the end.
            self._finished_early = self._finished_early or was_complete
        if reader.done:
            if not was_done:
                self._clock.grace(DONE_GRACE)
        elif reader.complete and not self._finished_early and (text or self._gave_text):
            if not was_complete:
                self._clock.grace(FINISH_GRACE)
        elif text or self._gave_text or reader.thought:
            # Not before the first words: until then an endpoint may be as silent as the model that thinks behind it.
            self._clock.feed()
        self._deliver(text, data, response)

    def _deliver(self, text: str | Fault, raw: bytes, response: aiohttp.ClientResponse) -> None:
        if isinstance(text, Fault):
            self._refuse(text, raw, response)
        if self._reader.answering and not self._accepted:
            # At the first sign and not at the end: a call whose callers have all been answered is cancelled before it.
            self._accepted = True
            self._capabilities.accepted(self._plan, asyncio.get_running_loop().time())
        if text:
            self._gave_text = True
            self._on_text(text)

    def _no_answer(self, said: str, raw: bytes, kind: str, response: aiohttp.ClientResponse) -> NoReturn:
        """Raise what a status 200 without an answer means.

        It is trouble of the endpoint's, as a 502 is, or of a proxy before it. But Gemini answers a prompt that its filter has blocked
        without choices and without a word on why, every time that it is asked (BerriAI/litellm#40252).
        """
        told = f"{said}; it sent {kind or 'no content type'}, {len(raw)} bytes"
        if not self._capabilities.answered:
            told += ". base_url usually ends in /v1"
        blocked = self._reader.spoke and self._capabilities.unanswered(self._plan)
        raise unanswered(
            told, blocked=blocked, where=self._where, headers=response.headers, raw=raw, secrets=self._secrets()
        )

    def _refuse(self, fault: Fault | None, raw: bytes, response: aiohttp.ClientResponse) -> NoReturn:
        """Raise what *fault* means, after learning from it."""
        fault = fault or Fault(response.status)
        error = to_error(
            fault,
            where=self._where,
            headers=response.headers,
            raw=raw,
            secrets=self._secrets(),
            keyless=not any(map(is_credential, self._headers)),
        )
        if not self._gave_text:
            self._learn(fault, error)
            if not error.again:
                error = self._about_bound(error, fault, raw)
        raise error

    def _learn(self, fault: Fault, error: StatusError) -> None:
        now = asyncio.get_running_loop().time()
        if type(error) is BadRequest and error.status in (400, 422):
            error.again = self._capabilities.refused(
                self._plan, code=fault.code, param=fault.param, message=fault.message, now=now
            )
        elif type(error) is ServerError and error.status == 500:  # noqa: PLR2004
            self._capabilities.failed(self._plan)

    def _about_bound(self, error: StatusError, fault: Fault, raw: bytes) -> StatusError:
        """Return *error*, or what to raise instead because it is the call's bound that is refused."""
        if self._plan.call.max_tokens is not None:
            return error
        said = read_refusal(f"{fault.message} {words_of(raw)}", error.status, self._plan.bound or 0)
        if said is None:
            return error
        if not self._capabilities.bound_refused(self._plan, said):
            error.token_limits = said if self._plan.bound is not None else None
            return error
        # A refusal for credit is no reason to stop all calls, nor one for tokens a minute to slow down, if less may be asked for.
        return BadRequest(
            str(error),
            status=error.status,
            code=error.code,
            param=error.param,
            request_id=error.request_id,
            limits=error.limits,
            body=error.body,
            again=True,
            token_limits=said,
        )

    def _secrets(self) -> list[str]:
        """Return what an answer must not echo: header values, the key inside Authorization, and what the address holds."""
        values = {part for value in self._headers.values() for part in (value, value.rpartition(" ")[2])}
        public = {"application/json", "microbatch"}
        known = {*(value for value in values - public if len(value) >= 8), *self._known_secrets}  # noqa: PLR2004
        return sorted(known, key=len, reverse=True)  # one may be a part of another


def _form(head: bytearray) -> Literal["json", "events", "neither", "unclear"]:
    """Return what a body is that begins with *head*; "unclear" as long as too little has come."""
    text = bytes(head.removeprefix(_BOM).lstrip())
    if text[:1] in (b"{", b"["):
        return "json"
    if text.startswith(_FIELDS):
        return "events"
    if _BOM.startswith(bytes(head)) or any(field.startswith(text) for field in _FIELDS):
        return "unclear"
    return "neither"
