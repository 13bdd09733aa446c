"""Exceptions.

All derive from `MicrobatchError`; those that can end an accepted submit derive from `RequestFailed`. Data is in attributes; `str`,
`repr` and pickles never contain a provider's body, a key or a prompt. They have the words of a refusal, at most 300 characters, without
keys and without what they quote of the prompt.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.messages import Limits, TokenLimits

MAX_BODY_CHARS = 2_048
"""Longest part of a body or reply that an error keeps."""

# Providers echo the key they refuse ("Incorrect API key provided: sk-..."), and proxies echo headers.
_KEYS = re.compile(r"(?i)\b(?:sk|pk|rk|gsk|xai|key)-[\w.*-]{4,}|\bBearer\s+[^\s\"',]+")

# Attributes that may contain a customer's text or an endpoint's headers, and are not pickled.
_PRIVATE = frozenset({"body", "completion", "limits", "raw"})


UNPAID: Final = "microbatch: not retried, because the retry budget is used up (RetryPolicy.budget, reserve)"
"""Note on transient errors that were not retried for this reason."""


def mask(text: str) -> str:
    """Return at most 2 KB of *text*, with everything that looks like a key replaced."""
    return _KEYS.sub("***", text[: 2 * MAX_BODY_CHARS])[:MAX_BODY_CHARS]


class MicrobatchError(Exception):
    """Base of all exceptions of this library."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the type, the message and the public attributes."""
        state = {name: value for name, value in self.__dict__.items() if name not in _PRIVATE}
        return type(self), self.args, state

    def replica(self) -> Self:
        """Return a new error of the same type and data, chained to this one.

        Each caller of a failed batch gets its own, so that notes and tracebacks of one caller do not appear at another.
        """
        twin = type(self)(*self.args)
        twin.__dict__.update(self.__dict__)
        if notes := getattr(self, "__notes__", None):
            twin.__notes__ = [*notes]
        twin.__cause__ = self
        return twin


class ConfigError(MicrobatchError, ValueError):
    """A setting or an argument is wrong; nothing was queued or sent.

    A transport raises it for a call that it cannot send, which ends the requests of that call.

    Attributes:
        attempts: Earlier upstream calls that carried the request; usually 0.
    """

    attempts: int = 0


class BatcherClosed(MicrobatchError):
    """The batcher is not open, or belongs to another event loop; nothing was queued or sent."""


class Overloaded(MicrobatchError):
    """`max_queued` requests are pending and `when_full` forbids waiting; nothing was queued or sent."""


class IdConflict(MicrobatchError):
    """The spool holds another request under this id; nothing was queued."""


class StorageError(MicrobatchError):
    """A spool or a cache cannot be reached, read or written. The operation was not acknowledged."""


class RequestFailed(MicrobatchError):
    """Base of the errors that can end an accepted submit.

    Attributes:
        attempts: Upstream calls that carried this request.
        completion: The endpoint's JSON, if the request was sent alone and its answer is unusable; else None. Neither in `str` nor in
            pickles.
    """

    def __init__(self, message: str = "", *, attempts: int = 0) -> None:
        super().__init__(message)
        self.attempts = attempts
        self.completion: dict[str, Any] | None = None


class DeadlineExceeded(RequestFailed, TimeoutError):
    """The `timeout` of the submit passed. Its call is cancelled if no other caller waits for it."""


class ShutDown(RequestFailed):
    """The batcher closed before the answer arrived."""


class BudgetExceeded(RequestFailed):
    """The call was not sent, because it would have cost more than is left of `Microbatcher(budget=)`.

    Attributes:
        retry_after: Seconds until the next period of the budget begins; None if it has no period, or its store cannot be used.
    """

    def __init__(self, message: str = "", *, retry_after: float | None = None, attempts: int = 0) -> None:
        super().__init__(message, attempts=attempts)
        self.retry_after = retry_after


class TransportError(RequestFailed):
    """The call failed: there was no answer, or it was cut off."""


class ConnectFailed(TransportError):
    """The endpoint could not be reached, or the connection broke.

    Attributes:
        again: Whether it broke because the endpoint closed a connection that was kept open, most likely before it read the request.
            Sending it at once is not a retry.
        unsent: Whether it is certain that nothing of the call was sent, because there never was a connection.
    """

    again: bool = False
    unsent: bool = False


class TransportTimeout(TransportError, TimeoutError):
    """The endpoint took longer than the transport's `timeout`, or was silent for `idle_timeout` during its answer."""


class StatusError(TransportError):
    """The endpoint answered with an error.

    Attributes:
        status: HTTP status. For an error in a 200, the status that it names, else 200.
        code: The endpoint's error code (`insufficient_quota`), or None.
        param: The request field at fault, or None.
        request_id: The endpoint's id of the call, or None.
        retry_after: Seconds to wait according to the endpoint, or None.
        body: The response body, at most 2 KB, keys masked. It may quote the prompt, so it is neither in `str` nor in pickles.
        again: Whether the transport has learned from this refusal and will send the same call differently. Sending it at once is not
            a retry.
        should_retry: The endpoint's `x-should-retry`, or None.
        limits: The endpoint's rate limits: `Limits`, or the headers to read them from; None if it sent none.
        token_limits: The token limits in a refusal of `ChatCall.bound`, else None.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status: int = 0,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        body: str = "",
        again: bool = False,
        should_retry: bool | None = None,
        limits: Limits | Mapping[str, str] | None = None,
        token_limits: TokenLimits | None = None,
        attempts: int = 0,
    ) -> None:
        super().__init__(message, attempts=attempts)
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after
        self.body: str = mask(body)
        self.again = again
        self.should_retry = should_retry
        self.limits = limits
        self.token_limits = token_limits


class BadRequest(StatusError):
    """The endpoint refuses this request (400, 404, 413, 422, and 429 for a request larger than the limit itself)."""


class ContextTooLong(StatusError):
    """The prompt does not fit the model's context window."""


class Filtered(StatusError):
    """A content filter stopped the prompt or the answer.

    The status is 200 for a reply that the filter stopped, and for a reply without choices that was repeated.
    """


class AuthFailed(StatusError):
    """The key is missing, wrong, or not allowed to do this (401, 403)."""


class QuotaExhausted(StatusError):
    """The account is out of credit or over a spending limit (402, and other statuses in such words); retrying does not help."""


class RateLimited(StatusError):
    """Too many requests or tokens at present (429); retrying later helps."""


class ServerError(StatusError):
    """The endpoint failed (408, 409, 424, 425, 498, 499, 5xx), or a status 200 holds no answer (200, or the status that it names)."""


class ReplyError(RequestFailed):
    """The model's reply has no usable answer to this request.

    Attributes:
        raw: The model's text for this request, at most 2 KB. Neither in `str` nor in pickles.
    """

    def __init__(self, message: str = "", *, raw: str = "", attempts: int = 0) -> None:
        super().__init__(message, attempts=attempts)
        self.raw: str = mask(raw)


class MissingAnswer(ReplyError):
    """The reply held no answer to this request."""


class MalformedAnswer(ReplyError):
    """The answer is empty, is not JSON, or does not fit `output_type`: the message names the type, the field and the rule."""


class TruncatedReply(ReplyError):
    """The typed answer was cut off by the token limit, so it cannot be decoded."""


class Refused(ReplyError):
    """The model declined to answer."""
