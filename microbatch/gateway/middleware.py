"""The middleware of all requests: the host check, the limit on requests, and the translation of errors."""

from __future__ import annotations

import asyncio
import logging
import traceback
from typing import TYPE_CHECKING, Final

from aiohttp import web
from aiohttp.http import SERVER_SOFTWARE

from microbatch.errors import MicrobatchError
from microbatch.gateway.errors import GatewayError, overloaded, shutting_down, translate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from microbatch.gateway.access import Access

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger("microbatch")

API: Final = "/v1/"

# aiohttp's own log quotes what it cannot parse, including headers with keys.
silent: Final = logging.Logger("microbatch.gateway.silent")  # noqa: LOG001 it must have no parent to pass records to
silent.addHandler(logging.NullHandler())


class Middleware:
    """The middleware of the gateway, which serves at most *max_requests* API requests at once.

    Attributes:
        serving: API requests being served.
        draining: The gateway is closing and takes no further API requests.
    """

    def __init__(self, access: Access, max_requests: int) -> None:
        self._access = access
        self._max_requests = max_requests
        self.serving = 0
        self.draining = False

    def add_to(self, application: web.Application) -> None:
        """Handle every request of *application*."""
        application.middlewares.append(self._handle)
        application.on_response_prepare.append(self._prepare)

    @web.middleware
    async def _handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await self._answer(request, handler)
        if self.draining:
            response.force_close()  # a stream that began before draining has sent its headers
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._access.check_host(request)
            if not request.path.startswith(API):
                return await handler(request)
            self._check_capacity()
            self.serving += 1
            try:
                return await handler(request)
            finally:
                self.serving -= 1
        except GatewayError as error:
            return error.response()
        except MicrobatchError as error:
            return translate(error).response()
        except web.HTTPException as error:
            return _from_aiohttp(error, request).response()
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client is gone
        except Exception as error:  # noqa: BLE001 aiohttp would answer a bug in its own words
            # Without the exception's text, which may quote the request.
            logger.error(  # noqa: TRY400 see above
                "a bug in the gateway: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
            )
            return GatewayError(500, "The gateway failed; its log says where.", code="gateway_error").response()

    def _check_capacity(self) -> None:
        if self.draining:
            raise shutting_down()
        if self.serving >= self._max_requests:
            raise overloaded()

    async def _prepare(self, _request: web.Request, response: web.StreamResponse) -> None:
        # Versions are not disclosed; an upstream's own Server header is relayed.
        if response.headers.get("Server") == SERVER_SOFTWARE:
            del response.headers["Server"]
        if self.draining:
            # force_close alone closes without announcing it, and the client may be sending its next request already.
            response.headers["Connection"] = "close"
            response.force_close()


def _from_aiohttp(error: web.HTTPException, request: web.Request) -> GatewayError:
    """Return one of aiohttp's own errors (404, 405, 413) in OpenAI's shape."""
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
    message = f"Invalid URL or method ({request.method} {request.path})"
    return GatewayError(error.status, message, code="not_found", headers=headers)
