"""Makes the attempts of one call. Until retries have a budget, a call is sent again only when its transport says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microbatch.errors import RequestFailed, StatusError, TransportError

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.protocols import ChatCall, Completion, Transport

# The ladder has two steps, and an endpoint may refuse the names of max_tokens, temperature, stream and stream_options, and
# one schema; a transport that still learns after this many refusals is going round in circles.
_MAX_LESSONS = 8


class Sender:
    """Sends calls through *transport*, and again at once when a refusal taught it how to send them better.

    Attributes:
        repeats: Attempts that repeated a failed attempt of the same call.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.repeats = 0

    async def send(self, call: ChatCall, on_text: Callable[[str], None], on_attempt: Callable[[], None]) -> Completion:
        """Send *call* until it succeeds or fails for good.

        Args:
            call: What to ask.
            on_text: Takes the pieces of the answer.
            on_attempt: Called before each attempt.

        Raises:
            RequestFailed: The last attempt's error. Anything else a transport raises comes as a `TransportError` from it.
        """
        lessons = 0
        while True:
            on_attempt()
            try:
                return await self._transport.send(call, on_text)
            except StatusError as error:
                if not error.again or lessons >= _MAX_LESSONS:
                    raise
                lessons += 1
                self.repeats += 1
            except RequestFailed:
                raise
            except Exception as error:
                raise TransportError(f"the transport raised {type(error).__name__}") from error
