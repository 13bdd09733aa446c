"""What every request passes on its way in: the host check, the limit, and the translation of errors."""

from __future__ import annotations

import asyncio
import logging
import traceback
from typing import TYPE_CHECKING, Final

from aiohttp import web
from aiohttp.http import SERVER_SOFTWARE

from microbatch.errors import MicrobatchError
from microbatch.gateway.errors import Refusal, busy, refusal_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from microbatch.gateway.access import Access

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger("microbatch")

API: Final = "/v1/"

# aiohttp's own log quotes what it cannot parse, headers with keys included.
silent: Final = logging.Logger("microbatch.gateway.silent")  # noqa: LOG001 it must have no parent to pass records to
silent.addHandler(logging.NullHandler())


class Edge:
    """The middleware of the gateway.

    Args:
        access: Knows the gateway's hosts.
        max_requests: Most requests of the API that are served at once.

    Attributes:
        serving: Requests of the API that are being served.
        draining: No further ones are taken, since the gateway closes.
    """

    def __init__(self, access: Access, max_requests: int) -> None:
        self._access = access
        self._max_requests = max_requests
        self.serving = 0
        self.draining = False

    def add_to(self, application: web.Application) -> None:
        """Have every request of *application* pass."""
        application.middlewares.append(self._pass)
        application.on_response_prepare.append(self._prepare)

    @web.middleware
    async def _pass(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await self._answer(request, handler)
        if self.draining:
            response.force_close()  # of a stream that began before, whose headers promise nothing
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._access.check_host(request)
            if not request.path.startswith(API):
                return await handler(request)
            self._check_room()
            self.serving += 1
            try:
                return await handler(request)
            finally:
                self.serving -= 1
        except Refusal as refusal:
            return refusal.response()
        except MicrobatchError as error:
            return refusal_of(error).response()
        except web.HTTPException as error:
            return _refusal_from(error, request).response()
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client is gone
        except Exception as error:  # noqa: BLE001 a bug of ours must not end in aiohttp's words
            # Without the words of the exception: they may quote the request.
            logger.error(  # noqa: TRY400 see above
                "a bug in the gateway: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
            )
            return Refusal(500, "The gateway failed; its log says where.", code="gateway_error").response()

    def _check_room(self) -> None:
        if self.draining:
            raise busy("The gateway is shutting down.", "shutting_down")
        if self.serving >= self._max_requests:
            raise busy("The gateway has too many requests to answer; try again in a moment.", "overloaded")

    async def _prepare(self, _request: web.Request, response: web.StreamResponse) -> None:
        # Nobody needs to know which versions run here; an upstream's own word is relayed.
        if response.headers.get("Server") == SERVER_SOFTWARE:
            del response.headers["Server"]
        if self.draining:
            # aiohttp has written the header by now, and would only close: a client that is not told may be sending its next request.
            response.headers["Connection"] = "close"
            response.force_close()


def _refusal_from(error: web.HTTPException, request: web.Request) -> Refusal:
    """Return one of aiohttp's own refusals (404, 405, 413) in our words."""
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
    return Refusal(
        error.status, f"Invalid URL or method ({request.method} {request.path})", code="not_found", headers=headers
    )
