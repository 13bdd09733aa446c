"""`Exchange`: one request to an endpoint and its response, the base of attempts at calls."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from microbatch.errors import ConnectFailed
from microbatch.transports.credentials import is_credential
from microbatch.transports.error_parsing import has_failed, read_failure, to_error, unanswered
from microbatch.transports.http import guarded, read_some

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence

    import aiohttp

    from microbatch.errors import StatusError, TransportTimeout
    from microbatch.transports.error_parsing import Fault
    from microbatch.transports.http import Clock

MAX_ERROR_BYTES: Final = 1024 * 1024
ERROR_GRACE: Final = 5.0
"""Seconds to wait for the body of an error."""


@dataclass(eq=False, repr=False, kw_only=True)
class Exchange(abc.ABC):
    """One request, from the first byte sent to the last one read.

    Attributes:
        where: What errors call the endpoint.
        headers: Those of the request.
        address_secrets: Parts of the address that may be keys.
    """

    clock: Clock
    where: str
    headers: Mapping[str, str]
    address_secrets: Sequence[str]

    def __post_init__(self) -> None:
        self._response: aiohttp.ClientResponse

    @abc.abstractmethod
    async def _receive(self) -> None:
        """Read the response, whose headers have arrived."""

    @abc.abstractmethod
    def _asked(self) -> Sequence[Any] | None:
        """Return the contents of what was sent, which errors must not quote; None leaves the endpoint's words out of them."""

    @abc.abstractmethod
    def _learned(self, fault: Fault, error: StatusError) -> StatusError:
        """Learn from *error*, read from *fault*, and return the error to raise."""

    async def _exchange(self, sending: Awaitable[aiohttp.ClientResponse]) -> TransportTimeout | ConnectFailed | None:
        """Wait for the response, which *sending* returns when its headers have arrived, and read it.

        Returns:
            Why it broke off, to be raised if what has arrived is of no use; None if it did not.
        """
        try:
            async with self.clock.scope:
                self._response = await guarded(sending, self.where)
                try:
                    await self._receive()
                finally:
                    # A half-read connection must not return to the pool: the next call would read the rest of this answer. Read to its
                    # end it has returned already, and this has no effect.
                    self._response.close()
        except TimeoutError:
            if not self.clock.scope.expired():
                raise  # not the clock's
            return self.clock.error(self.where)
        except ConnectFailed as error:
            return error
        return None

    @property
    def _content_type(self) -> str:
        return self._response.content_type if "Content-Type" in self._response.headers else ""

    async def _check_status(self) -> None:
        """Raise the error of a response whose status is no success."""
        response = self._response
        if has_failed(response.status):
            self.clock.begin()
            raw = await read_some(response, MAX_ERROR_BYTES, ERROR_GRACE)
            self._refuse(read_failure(raw, response.status))

    def _refuse(self, fault: Fault) -> NoReturn:
        """Raise the error for *fault*, and learn from it what the endpoint does not support."""
        error = to_error(
            fault,
            where=self.where,
            headers=self._response.headers,
            secrets=self._secrets(),
            keyless=not any(map(is_credential, self.headers)),
            asked=self._asked(),
        )
        raise self._learned(fault, error)

    def _no_answer(self, lack: str, raw: bytes, size: int, *, known: bool, blocked: bool = False) -> NoReturn:
        """Raise the error for a status 200 without an answer.

        It is a failure of the endpoint or of a proxy, as a 502 is.

        Args:
            lack: The fault of the answer, in words.
            raw: The beginning of its body.
            size: The bytes of its body.
            known: Whether the address is known to be right.
            blocked: Whether a filter is the likely cause.
        """
        message = f"{lack}; it sent {self._content_type or 'no content type'}, {size} bytes"
        if not known:
            message += ". base_url usually ends in /v1"
        secrets, headers = self._secrets(), self._response.headers
        raise unanswered(message, blocked=blocked, where=self.where, headers=headers, raw=raw, secrets=secrets)

    def _secrets(self) -> list[str]:
        """Return what errors must not quote: header values, the key inside Authorization, and secrets in the address."""
        values = {part for value in self.headers.values() for part in (value, value.rpartition(" ")[2])}
        public = {"application/json", "microbatch"}
        known = {*(value for value in values - public if len(value) >= 8), *self.address_secrets}  # noqa: PLR2004
        return sorted(known, key=len, reverse=True)  # one may be a part of another
