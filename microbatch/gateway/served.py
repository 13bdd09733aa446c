"""The facts about one request to the gateway, for its log, its metrics and its dashboard."""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from microbatch.accounting.labels import tenant_name
from microbatch.errors import MicrobatchError, RequestFailed, mask

if TYPE_CHECKING:
    from microbatch.messages import Reply, Usage

ID_HEADER: Final = "X-Request-Id"
OWN_ID_HEADER: Final = "X-Microbatch-Request-Id"
CALLER_HEADER: Final = "X-Microbatch-Caller"

DISCONNECTED: Final = "disconnected"
"""The reason of a request whose connection ended before its answer did."""

UPSTREAM: Final = "upstream"
"""The reason of a relayed request to which the endpoint answered with an error."""

_FAILURES: Final = 400
_CLIENT_CLOSED_REQUEST: Final = 499  # nginx's
_ID: Final = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_MOST_CHARS: Final = 200


class Served(msgspec.Struct, kw_only=True, eq=False):
    """A request, from its arrival to the end of its answer.

    Attributes:
        id: The client's X-Request-Id, or one made up.
        id_given: Whether it is the client's.
        method: Its HTTP method.
        path: Its path without the query.
        began: Loop time of its arrival.
        page: Whether it is for one of the gateway's own pages.
        tenant: Digest of the caller's credentials and tenant header; None for a caller without any, or not known.
        model: The model that it names, else the gateway's; None if not known.
        forwarded: Whether it was relayed.
        reply: The batcher's reply; None for a request that was relayed, or not answered.
        spent: The usage that the endpoint reported for a relayed request, and its price in US dollars, None if that is unknown; None if
            it reported none.
        upstream_id: The endpoint's id of the call.
        status: The status of the answer; 499 if the connection ended before.
        reason: Why it failed: a class of errors, or a code of the gateway's own; None if it has not.
        reported: Whether the batcher's events tell of the failure, too.
        seconds: Time from its arrival to the end of its answer.
    """

    id: str
    id_given: bool
    method: str
    path: str
    began: float
    page: bool = False
    tenant: str | None = None
    model: str | None = None
    forwarded: bool = False
    reply: Reply[Any] | None = None
    spent: tuple[Usage, float | None] | None = None
    upstream_id: str | None = None
    status: int = 0
    reason: str | None = None
    reported: bool = False
    seconds: float = 0.0

    @property
    def route(self) -> str | None:
        """The route of the answer, as in `Reply.route`, or "forward" or "page"; None for a request that was refused."""
        if self.reply is not None:
            return self.reply.route
        return "forward" if self.forwarded else "page" if self.page else None

    @property
    def answered(self) -> bool:
        """True if it has an answer that is no error."""
        return self.reason is None and self.status < _FAILURES

    def fail(self, reason: str | Exception) -> None:
        """Note why it failed, unless that is known."""
        if self.reason is None:
            self.reason = reason if isinstance(reason, str) else type(reason).__name__
            self.reported = isinstance(reason, RequestFailed)

    def disconnect(self) -> None:
        """Note that the connection ended before the answer did; a reason that is known stays."""
        if self.reason is None:
            self.reason = DISCONNECTED
        self.status = self.status or _CLIENT_CLOSED_REQUEST

    def end(self, status: int) -> None:
        """Note the *status* of the answer that was given."""
        self.status = status
        if status >= _FAILURES:
            self.fail(UPSTREAM if self.forwarded else str(status))

    def identify(self, response: web.StreamResponse) -> None:
        """Add the headers that name the request and its caller to *response*, and note the endpoint's id.

        X-Request-Id is the client's, else the endpoint's, else that of the gateway.
        """
        headers = response.headers
        self.upstream_id = headers.get(ID_HEADER)
        if self.id_given or self.upstream_id is None:
            headers[ID_HEADER] = self.id
        headers[OWN_ID_HEADER] = self.id
        if self.tenant is not None:
            headers[CALLER_HEADER] = tenant_name(self.tenant)

    def line(self, time: str) -> dict[str, Any]:
        """Return the fields of the access log, without texts and keys; *time* is when the request ended."""
        reply = self.reply
        fields: dict[str, Any] = {
            "time": time,
            "id": self.id,
            "upstream_id": _plain(reply.request_id if reply is not None and reply.request_id else self.upstream_id),
            "method": _plain(self.method),
            "path": _plain(self.path),
            "status": self.status,
            "reason": self.reason,
            "latency": round(self.seconds, 6),
            "route": self.route,
            "model": _plain(self.model),
            "tenant": None if self.tenant is None else tenant_name(self.tenant),
        }
        if reply is not None:
            fields |= {"batch_size": reply.batch_size, "waited": round(reply.waited, 6)}
        spent = self.spent if reply is None else (reply.usage, reply.cost_usd)
        if spent is not None:
            usage, cost_usd = spent
            fields |= {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "estimated": usage.estimated,
                "cost_usd": cost_usd,
            }
        return fields


_KEY: Final = web.RequestKey("microbatch.served", Served)


def begin(request: web.BaseRequest, *, page: bool) -> Served:
    """Return the record of *request*, which has arrived; `served` finds it again."""
    given = request.headers.get(ID_HEADER, "")
    id_given = _ID.fullmatch(given) is not None and mask(given) == given
    record = Served(
        id=given if id_given else f"req_{secrets.token_hex(12)}",
        id_given=id_given,
        method=request.method,
        path=request.path,
        began=asyncio.get_running_loop().time(),
        page=page,
    )
    request[_KEY] = record
    return record


def served(request: web.BaseRequest) -> Served:
    """Return the record of *request*."""
    return request[_KEY]


def is_recorded(request: web.BaseRequest) -> bool:
    """Return whether *request* has a record."""
    return _KEY in request


def reply_headers(reply: Reply[Any] | None) -> dict[str, str]:
    """Return the headers that say how an answer came about; without a *reply* none."""
    if reply is None:
        return {}
    headers = {"X-Microbatch-Route": reply.route, "X-Microbatch-Batch-Size": str(reply.batch_size)}
    if reply.request_id is not None:
        headers["x-request-id"] = reply.request_id
    return headers


def reason_of(error: Exception, code: object) -> str:
    """Return the reason of a request that ended with *error*, one of the gateway's own with *code*.

    A code is a reason only if it is the gateway's: an endpoint may make up any.
    """
    cause = error.__cause__
    return type(cause).__name__ if isinstance(cause, MicrobatchError) else str(code)


def _plain(text: str | None) -> str | None:
    """Return a foreign *text* without what looks like a key and without control characters and line separators, and cut."""
    if text is None:
        return None
    shown = mask(text)[:_MOST_CHARS]
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in shown)
