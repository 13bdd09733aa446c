"""One attempt at one call: what the endpoint answers is read, timed, handed on and learned from."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, NoReturn

from microbatch.errors import BadRequest, ConnectFailed, ServerError, TransportError
from microbatch.transports.bound_refusals import read_refusal, words_of
from microbatch.transports.chat_wire import ReplyReader
from microbatch.transports.error_shapes import Fault, read_fault, to_error
from microbatch.transports.http_edge import CREDENTIALS, guarded, read_all, read_some
from microbatch.transports.limit_headers import read_limits
from microbatch.transports.sse import SSEDecoder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import aiohttp

    from microbatch.errors import StatusError
    from microbatch.protocols import Completion
    from microbatch.transports.http_edge import Clock
    from microbatch.transports.ladder import Ladder, Plan

MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
MAX_ERROR_BYTES: Final = 1024 * 1024
# What still comes after the answer is complete (usage, the end mark, the end of the body that lets the connection be used
# again) is worth only so long a wait.
FINISH_GRACE: Final = 2.0
DONE_GRACE: Final = 0.1
ERROR_GRACE: Final = 5.0


class Attempt:
    """One attempt at one call, from the first byte sent to the last one read."""

    def __init__(
        self,
        plan: Plan,
        ladder: Ladder,
        clock: Clock,
        on_text: Callable[[str], None],
        *,
        where: str,
        headers: Mapping[str, str],
    ) -> None:
        self._plan = plan
        self._ladder = ladder
        self._clock = clock
        self._on_text = on_text
        self._where = where
        self._headers = headers
        self._reader = ReplyReader()
        self._accepted = False
        self._gave_text = False

    async def run(self, sending: Awaitable[aiohttp.ClientResponse]) -> Completion:
        """Make the attempt; *sending* ends when the answer's head is there."""
        request_id = limits = None
        try:
            async with self._clock.scope:
                response = await guarded(sending, self._where)
                try:
                    self._clock.feed()
                    request_id = response.headers.get("x-request-id")
                    limits = read_limits(response.headers)
                    await self._receive(response)
                finally:
                    # A half-read connection must not go back to the pool: the next call would read this answer's rest.
                    # Read to its end it is back there already, and this does nothing.
                    response.close()
        except TimeoutError as error:
            if not self._clock.scope.expired():
                raise  # not of our making
            if not self._reader.complete:
                raise self._clock.error(self._where) from error
        except ConnectFailed:
            if not self._reader.complete:
                raise
        completion = self._reader.completion(request_id, limits)
        completion.bound = self._plan.bound
        return completion

    async def _receive(self, response: aiohttp.ClientResponse) -> None:
        kind = response.content_type if "Content-Type" in response.headers else ""
        if not 200 <= response.status < 300:  # noqa: PLR2004 (the class of success)
            raw = await read_some(response, MAX_ERROR_BYTES, ERROR_GRACE)
            self._refuse(read_fault(raw, response.status), raw, response)
        elif kind == "text/event-stream" or ("stream" in self._plan.sent and not kind.endswith("json")):
            await self._receive_stream(response, kind)
        else:
            self._clock.watch(None)
            raw = await read_all(response, MAX_REPLY_BYTES, self._where)
            self._take_whole(raw, kind, response)

    def _take_whole(self, raw: bytes, kind: str, response: aiohttp.ClientResponse) -> None:
        try:
            text = self._reader.whole(raw)
        except TransportError as error:
            described = f"{kind or 'no content type'}, {len(raw)} bytes"
            raise TransportError(f"{self._where}: {error}; it sent {described}. base_url usually ends in /v1") from None
        self._deliver(text, raw, response)

    async def _receive_stream(self, response: aiohttp.ClientResponse, kind: str) -> None:
        decoder = SSEDecoder()
        while chunk := await guarded(response.content.readany(), self._where):
            for data in decoder.feed(chunk):
                self._take_event(data, response)
        for data in decoder.close():
            try:
                self._take_event(data, response)
            except TransportError as error:
                # The torso of an event says no more than that the stream was cut.
                if type(error) is not TransportError:
                    raise
        if not self._reader.spoke and not self._reader.done and kind != "text/event-stream":
            raise TransportError(
                f"{self._where} answered a stream request with {kind or 'no content type'} and no events"
            )

    def _take_event(self, data: bytes, response: aiohttp.ClientResponse) -> None:
        if not data:
            return  # a keep-alive in the form of an empty event
        was_complete, was_done = self._reader.complete, self._reader.done
        try:
            text = self._reader.event(data)
        except TransportError as error:
            if was_complete:
                return
            raise TransportError(f"{self._where} sent an event that cannot be read: {error}") from None
        if self._reader.done:
            if not was_done:
                self._clock.shorten(DONE_GRACE)
        elif self._reader.complete:
            if not was_complete:
                self._clock.shorten(FINISH_GRACE)
        else:
            self._clock.feed()
        self._deliver(text, data, response)

    def _deliver(self, text: str | Fault, raw: bytes, response: aiohttp.ClientResponse) -> None:
        if isinstance(text, Fault):
            self._refuse(text, raw, response)
        if self._reader.spoke and not self._accepted:
            # At the first sign and not at the end: a call whose callers have all been answered is cancelled before it.
            self._accepted = True
            self._ladder.accepted(self._plan, asyncio.get_running_loop().time())
        if text:
            self._gave_text = True
            self._on_text(text)

    def _refuse(self, fault: Fault | None, raw: bytes, response: aiohttp.ClientResponse) -> NoReturn:
        """Raise what *fault* means, after learning from it."""
        fault = fault or Fault(response.status)
        error = to_error(
            fault,
            where=self._where,
            headers=response.headers,
            raw=raw,
            secrets=_secrets(self._headers),
            keyless=not any(name.lower() in CREDENTIALS for name in self._headers),
        )
        if not self._gave_text:
            now = asyncio.get_running_loop().time()
            if type(error) is BadRequest and error.status in (400, 422):
                error.again = self._ladder.refused(
                    self._plan, code=fault.code, param=fault.param, message=fault.message, now=now
                )
            elif type(error) is ServerError and error.status == 500:  # noqa: PLR2004
                self._ladder.failed(self._plan)
            if not error.again:
                error = self._about_bound(error, fault, raw)
        raise error

    def _about_bound(self, error: StatusError, fault: Fault, raw: bytes) -> StatusError:
        """Return *error*, or what to raise instead because it is the call's bound that is refused."""
        if self._plan.call.max_tokens is not None:
            return error
        said = read_refusal(f"{fault.message} {words_of(raw)}", error.status, self._plan.bound or 0)
        if said is None:
            return error
        if not self._ladder.bound_refused(self._plan, said):
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


def _secrets(headers: Mapping[str, str]) -> list[str]:
    """Return what an answer must not echo: header values, and the key inside Authorization. The longest come first."""
    values = {part for value in headers.values() for part in (value, value.rpartition(" ")[2])}
    public = {"application/json", "microbatch"}
    return sorted((value for value in values - public if len(value) >= 8), key=len, reverse=True)  # noqa: PLR2004
