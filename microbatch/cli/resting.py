"""A transport that sends nothing while its endpoint does not answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from microbatch.errors import RequestFailed, TransportError
from microbatch.spool.endpoint import Cause, cause_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.protocols import ChatCall, Completion, Transport
    from microbatch.spool.endpoint import Endpoint


class RestingTransport:
    """Sends through another transport, as far as *endpoint* allows, and notes there how each attempt ends.

    During an outage calls wait here, unsent, instead of using up their attempts; nobody waits for the answers of bulk work.

    Args:
        transport: Sends; every attribute but `send` is its own.
        endpoint: Whether the endpoint answers.
    """

    def __init__(self, transport: Transport, endpoint: Endpoint) -> None:
        self._transport = transport
        self._endpoint = endpoint

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the transport within."""
        return getattr(self._transport, name)

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Make one attempt at *call* when its turn has come; see `Transport.send`.

        Raises:
            ShutDown: Nothing is sent any more.
            TransportError: The attempt failed.
        """
        endpoint = self._endpoint
        tries = await endpoint.allow()
        sent = asyncio.get_running_loop().time()
        endpoint.begin()
        try:
            completion = await self._transport.send(call, on_text)
        except RequestFailed as error:
            if cause_of(error) is Cause.REQUEST:
                endpoint.succeeded(sent)  # it answers, if only to say no
            else:
                endpoint.failed(error, sent)
            raise
        else:
            if completion.finish_reason in (None, "error"):
                endpoint.failed(TransportError("the reply was cut off"), sent)
            else:
                endpoint.succeeded(sent)
            return completion
        finally:
            endpoint.end()
            if tries:
                endpoint.tried()

    async def aclose(self) -> None:
        """Close the transport within."""
        await self._transport.aclose()


class DirectTransport:
    """Sends through another transport, which its owner opens and closes: for what is to be sent during a rest.

    Args:
        transport: Sends; every attribute but these methods is its own.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the transport within."""
        return getattr(self._transport, name)

    async def open(self) -> None:
        """Leave that to the owner."""

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Make one attempt at *call*; see `Transport.send`."""
        return await self._transport.send(call, on_text)

    async def aclose(self) -> None:
        """Leave that to the owner."""
