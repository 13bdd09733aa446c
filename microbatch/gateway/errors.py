"""Every way to say no, in the shape that OpenAI's clients turn into their error classes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from microbatch.errors import (
    BatcherClosed,
    ConfigError,
    DeadlineExceeded,
    MalformedAnswer,
    MicrobatchError,
    MissingAnswer,
    Overloaded,
    ReplyError,
    RequestFailed,
    ShutDown,
    StatusError,
    TransportTimeout,
)
from microbatch.transports.lenient import as_object, is_array

if TYPE_CHECKING:
    from collections.abc import Mapping

_BUSY: Final = {"Retry-After": "1"}
"""For refusals that another moment, or another gateway, may well not repeat."""

_TYPES: Final[Mapping[int, str]] = {429: "rate_limit_error", 403: "permission_error", 401: "authentication_error"}
_UNUSABLE: Final[Mapping[type[ReplyError], str]] = {
    MalformedAnswer: "malformed_answer",
    MissingAnswer: "missing_answer",
}
_SERVER_ERRORS: Final = range(500, 600)
_ERRORS: Final = range(400, 600)
_FIRST_UNRETRIED: Final[tuple[type[MicrobatchError], ...]] = (BatcherClosed, Overloaded, ShutDown)


class Refusal(Exception):
    """A request is answered with an error.

    Args:
        status: The HTTP status.
        message: What is wrong, for the caller's eyes.
        code: A word for programs, or None.
        kind: OpenAI's `type`; None takes the usual one of the status.
        param: The request field at fault, or None.
        headers: Further headers of the answer.
        close: Whether the connection is of no use any more.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: object = None,
        kind: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.kind = kind
        self.param = param
        self.headers = dict(headers or {})
        self.close = close

    def response(self) -> web.Response:
        """Return the answer that says so."""
        kind = self.kind or _TYPES.get(
            self.status, "server_error" if self.status in _SERVER_ERRORS else "invalid_request_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        response = web.Response(
            status=self.status,
            body=msgspec.json.encode({"error": error}),
            content_type="application/json",
            headers=self.headers,
        )
        if self.close:
            response.force_close()
        return response


def busy(message: str, code: str) -> Refusal:
    """Return the refusal of what may be tried again elsewhere, or in a second."""
    return Refusal(503, message, code=code, headers=_BUSY)


def refusal_of(error: MicrobatchError, *, relayed: bool = False) -> Refusal:
    """Return what a client is told of *error*.

    Args:
        error: What ended the request.
        relayed: Whether it was one attempt at relaying, so that a client may well retry.
    """
    refusal = _refusal_of(error)
    if isinstance(error, RequestFailed) and not relayed and not isinstance(error, _FIRST_UNRETRIED):
        # What could be gained by trying again has been tried; clients that do so as well multiply the calls.
        refusal.headers["x-should-retry"] = "false"
    return refusal


def _refusal_of(error: MicrobatchError) -> Refusal:
    match error:
        case ConfigError():
            return Refusal(400, str(error), code="invalid_request")
        case Overloaded():
            return busy("The gateway has too many requests to answer; try again in a moment.", "overloaded")
        case BatcherClosed() | ShutDown():
            return busy("The gateway is shutting down.", "shutting_down")
        case DeadlineExceeded():
            return Refusal(504, str(error), code="deadline_exceeded")
        case TransportTimeout():
            return Refusal(504, str(error), code="upstream_timeout")
        case StatusError():
            return _as_the_endpoint(error)
        case ReplyError():
            return Refusal(502, str(error), code=_UNUSABLE.get(type(error), "unusable_reply"))
        case _:
            return Refusal(502, str(error), code="upstream_unreachable")


def _as_the_endpoint(error: StatusError) -> Refusal:
    """Return the endpoint's own refusal, as far as it can be read."""
    said = _said(error.body)
    message, kind, param = said.get("message"), said.get("type"), said.get("param")
    code = said.get("code", error.code)
    refusal = Refusal(
        # A redirect, or an error within a 200, is an answer of no use to the client.
        error.status if error.status in _ERRORS else 502,
        message if isinstance(message, str) and message else str(error),
        code=code if isinstance(code, str | int | None) else error.code,
        kind=kind if isinstance(kind, str) and kind else None,
        param=param if isinstance(param, str) else error.param,
    )
    if error.request_id is not None:
        refusal.headers["x-request-id"] = error.request_id
    if error.retry_after is not None:
        refusal.headers["Retry-After"] = str(math.ceil(error.retry_after))
        refusal.headers["retry-after-ms"] = str(math.ceil(error.retry_after * 1000))
    return refusal


def _said(body: str) -> dict[str, Any]:
    """Return the error object in *body*; empty where there is none, or it was cut."""
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return {}
    if is_array(data) and data:  # as Gemini's compatible endpoint answers
        data = data[0]
    return as_object(as_object(data).get("error", data))
