"""Error responses of the gateway, in the shape that OpenAI's clients turn into their exceptions."""

from __future__ import annotations

import math
import re
from dataclasses import fields as fields_of
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from microbatch.errors import (
    BatcherClosed,
    BudgetExceeded,
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
from microbatch.gateway.settings import GatewaySettings
from microbatch.policy import FlushPolicy
from microbatch.transports.lenient import as_object, first_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TYPES: Final[Mapping[int, str]] = {429: "rate_limit_error", 403: "permission_error", 401: "authentication_error"}
_SHOWN: Final[Sequence[tuple[type[MicrobatchError], int, str]]] = (
    (ConfigError, 400, "invalid_request"),
    (DeadlineExceeded, 504, "deadline_exceeded"),
    (TransportTimeout, 504, "upstream_timeout"),
    (MalformedAnswer, 502, "malformed_answer"),
    (MissingAnswer, 502, "missing_answer"),
    (ReplyError, 502, "unusable_reply"),
    (MicrobatchError, 502, "upstream_unreachable"),
)
"""Errors that are answered with their own message, the first class that fits: class, status and code."""

_ERRORS: Final = range(400, 600)
NOT_FOUND: Final = 404
_LONGEST_WAIT: Final = 2.0**31 - 1
"""Seconds: the longest wait that is named, within the range of what clients read."""

_SETTINGS: Final = [
    field.name for kind in (FlushPolicy, GatewaySettings) for field in fields_of(kind) if "_" in field.name
]
_WORDS: Final[Sequence[tuple[str, str]]] = (
    (r"\bapi_key= ?(?:or|,) OPENAI_API_KEY", "OPENAI_API_KEY"),
    (r"\bapi_key\b=?", "OPENAI_API_KEY"),
    (r"\bbase_url\b=?", "--upstream"),
    (r"\bquery=", "--query"),
    (r"\b(rpm|tpm)=", r"--\1"),
    (r"\btls_(cert|key)\b=?", r"--tls-\1"),
    (r"\(timeout\)", "(--upstream-timeout)"),
    (r" ?in headers=|; use headers= for credentials", ""),
    (r"\boutput_type\b", "response_format"),
)
"""Python's names of what has a flag, or a name of its own in requests, as regular expressions, and what is said instead."""


class GatewayError(Exception):
    """An error response.

    Args:
        kind: OpenAI's `type`; None for the usual one of the status.
        param: The request field at fault, or None.
        close: Whether to close the connection.
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
        usual = "server_error" if status >= 500 else "invalid_request_error"  # noqa: PLR2004
        self.error: dict[str, str | object | None] = {
            "message": message,
            "type": kind or _TYPES.get(status, usual),
            "param": param,
            "code": code,
        }
        self.headers: dict[str, str] = dict(headers or {})
        self.close = close

    def response(self) -> web.Response:
        """Return the response."""
        body = msgspec.json.encode({"error": self.error})
        response = web.Response(status=self.status, body=body, content_type="application/json", headers=self.headers)
        if self.close:
            response.force_close()
        return response


def translate(error: MicrobatchError, *, relayed: bool = False) -> GatewayError:
    """Return the error response for *error*, of a request that was *relayed*, hence tried only once, or submitted."""
    translated = _translate(error)
    if isinstance(error, RequestFailed) and not relayed and not isinstance(error, ShutDown):
        # Retries have been made; further ones by the client would multiply the calls.
        translated.headers["x-should-retry"] = "false"
    return translated


def _translate(error: MicrobatchError) -> GatewayError:
    if isinstance(error, StatusError):
        return _from_status(error)
    if isinstance(error, Overloaded):
        message = "The gateway has too many requests to answer; try again in a moment."
        return GatewayError(503, message, code="overloaded", headers={"Retry-After": "1"})
    if isinstance(error, BudgetExceeded):
        return _over_budget(error)
    if isinstance(error, BatcherClosed | ShutDown):  # another gateway may answer
        message = "The gateway is shutting down."
        return GatewayError(503, message, code="shutting_down", headers={"Retry-After": "1"})
    status, code = next((status, code) for kind, status, code in _SHOWN if isinstance(error, kind))
    return GatewayError(status, in_flags(str(error)), code=code)


def _over_budget(error: BudgetExceeded) -> GatewayError:
    """Return what OpenAI sends when an account is out of credit; clients are not told what others have spent."""
    left = error.retry_after
    again = "." if left is None else f"; it is whole again in {math.ceil(left)} s."
    return GatewayError(
        429,
        f"The budget of this gateway does not allow this request{again}",
        code="insufficient_quota",
        kind="insufficient_quota",
        # Clients would retry a 429 by themselves.
        headers={"x-should-retry": "false"} | ({} if left is None else {"Retry-After": str(math.ceil(left))}),
    )


def from_aiohttp(error: web.HTTPException, request: web.Request) -> GatewayError:
    """Return one of aiohttp's own errors (404, 405, 413) in OpenAI's shape."""
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
    message = f"Invalid URL or method ({request.method} {request.path}); the API is below /v1/"
    return GatewayError(error.status, message, code="not_found", headers=headers)


def in_flags(message: str) -> str:
    """Return a message about arguments in Python with the names of the flags of `microbatch serve` and of the fields of requests."""
    for pattern, word in _WORDS:
        message = re.sub(pattern, word, message)
    return re.sub(rf"\b(?:{'|'.join(_SETTINGS)})\b", lambda found: "--" + found[0].replace("_", "-"), message)


def _from_status(error: StatusError) -> GatewayError:
    """Return the endpoint's own error, as far as it can be read."""
    fields = _error_object(error.body)
    message, kind, param = fields.get("message"), fields.get("type"), fields.get("param")
    if not isinstance(message, str) or not message:
        message = in_flags(str(error))
    elif error.status == NOT_FOUND and not fields.get("code") and "model" not in message.lower():
        message += " (the gateway's --upstream usually ends in /v1)"
    code = fields.get("code", error.code)
    headers: dict[str, str] = {}
    if error.request_id is not None:
        headers["x-request-id"] = error.request_id
    if error.retry_after is not None:
        wait = min(error.retry_after, _LONGEST_WAIT)
        headers["Retry-After"] = str(math.ceil(wait))
        headers["retry-after-ms"] = str(math.ceil(wait * 1000))
    return GatewayError(
        # A redirect, and an error in a 200, mean nothing to the client.
        error.status if error.status in _ERRORS else 502,
        message,
        code=code if isinstance(code, str | int | None) else error.code,
        kind=kind if isinstance(kind, str) and kind else None,
        param=param if isinstance(param, str) else error.param,
        headers=headers,
    )


def _error_object(body: str) -> dict[str, Any]:
    """Return the error object in *body*; empty if there is none, or the body was cut."""
    try:
        data = as_object(first_of(msgspec.json.decode(body)))  # Gemini's compatible endpoint sends an array
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return {}
    return as_object(data.get("error", data))
