"""What can go wrong, as a tree sorted by whose fault it is.

Everything derives from `MicrobatchError`. All that can end an accepted submit derives from `RequestFailed`. Data is in attributes;
`str`, `repr` and pickles never hold a provider's body, a key or a prompt.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.messages import Limits, TokenLimits

MAX_BODY_CHARS = 2_048
"""Provider bodies and raw replies are kept to this length, so that an error stays cheap to hold."""

# Providers echo the key they refuse ("Incorrect API key provided: sk-..."), and proxies echo headers.
_KEYS = re.compile(r"(?i)\b(?:sk|pk|rk|gsk|xai|key)-[\w.*-]{4,}|\bBearer\s+[^\s\"',]+")

# Attributes that may hold a customer's words, or an endpoint's headers; they stay in this process.
_PRIVATE = frozenset({"body", "completion", "limits", "raw"})


UNPAID: Final = "microbatch: not retried, because the retry budget is used up (RetryPolicy.budget, reserve)"
"""A note on errors that might have been avoided by asking again."""


def mask(text: str) -> str:
    """Return *text* cut to 2 KB with whatever looks like a key blotted out."""
    return _KEYS.sub("***", text[: 2 * MAX_BODY_CHARS])[:MAX_BODY_CHARS]


class MicrobatchError(Exception):
    """Base of every error this library raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the type, the message and the public attributes, never a body."""
        state = {name: value for name, value in self.__dict__.items() if name not in _PRIVATE}
        return type(self), self.args, state

    def replica(self) -> Self:
        """Return a fresh error of the same type and data, chained to this one.

        Each caller of a failed batch gets an object of its own: with a shared one, the notes and tracebacks of one caller
        show up at another.
        """
        twin = type(self)(*self.args)
        twin.__dict__.update(self.__dict__)
        if notes := getattr(self, "__notes__", None):
            twin.__notes__ = [*notes]
        twin.__cause__ = self
        return twin


class ConfigError(MicrobatchError, ValueError):
    """A setting or an argument is wrong; nothing was queued or sent.

    A transport raises it for a call that it cannot send; then it ends the requests of that call.

    Attributes:
        attempts: Upstream calls that carried the request before; mostly 0.
    """

    attempts: int = 0


class BatcherClosed(MicrobatchError):
    """The batcher is not open (not yet, no longer), or belongs to another event loop; nothing was queued or sent."""


class Overloaded(MicrobatchError):
    """`max_queued` requests are pending and `when_full` forbids waiting; nothing was queued or sent."""


class IdConflict(MicrobatchError):
    """The spool holds another request under this id; nothing was queued."""


class StorageError(MicrobatchError):
    """A spool or a cache cannot be reached, read or written. What was asked of it has not been acknowledged."""


class RequestFailed(MicrobatchError):
    """Base of all that can end an accepted submit.

    Attributes:
        attempts: Upstream calls that carried this request, 0 if none was made.
        completion: The endpoint's own JSON, where the request went alone and its answer is no usable one; else None. Neither in `str`
            nor in pickles.
    """

    def __init__(self, message: str = "", *, attempts: int = 0) -> None:
        super().__init__(message)
        self.attempts = attempts
        self.completion: dict[str, Any] | None = None


class DeadlineExceeded(RequestFailed, TimeoutError):
    """The submit's `timeout` passed before its answer came. A call that nobody else waits for is cancelled."""


class ShutDown(RequestFailed):
    """The batcher closed before the answer came."""


class TransportError(RequestFailed):
    """The call failed on the way: nothing was answered, or the answer was cut off."""


class ConnectFailed(TransportError):
    """The endpoint could not be reached, or the connection broke."""


class TransportTimeout(TransportError, TimeoutError):
    """The endpoint took longer than the transport's `timeout`, or was silent for `idle_timeout` within its answer."""


class StatusError(TransportError):
    """The endpoint answered with an error.

    Attributes:
        status: HTTP status. Errors inside a 200 carry the status they name, else 200.
        code: The endpoint's own word for it (`insufficient_quota`), or None.
        param: The request field it complains of, or None.
        request_id: The endpoint's id of the call, or None.
        retry_after: Seconds the endpoint asks to wait, or None if it does not say.
        body: The answer's body, at most 2 KB, keys masked. It may quote the prompt, so it is in neither `str` nor pickles.
        again: The transport learned from this refusal and will send the same call differently; sending again at once is
            worthwhile and is not a retry.
        should_retry: What the endpoint itself says about trying again (`x-should-retry`), or None if nothing.
        limits: What the endpoint said of its rate limits: `Limits`, or the answer's headers to read them from; None if nothing.
        token_limits: What it said of tokens where it refused a call for `ChatCall.bound`; None if this is no such refusal.
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
        self.body = mask(body)
        self.again = again
        self.should_retry = should_retry
        self.limits = limits
        self.token_limits = token_limits


class BadRequest(StatusError):
    """The endpoint refuses this request as it is (400, 404, 413, 422, and 429 where it is larger than the limit itself)."""


class ContextTooLong(StatusError):
    """The prompt does not fit the model's context window."""


class Filtered(StatusError):
    """A content filter stopped the prompt or the answer, whatever the status.

    Among them are status 200 for a reply that the filter stopped, and for one without choices that came again without them.
    """


class AuthFailed(StatusError):
    """The key is missing, wrong, or not allowed to do this (401, 403)."""


class QuotaExhausted(StatusError):
    """The account is out of credit or over a spending limit (402, and 429 with a billing code); waiting does not help."""


class RateLimited(StatusError):
    """Too many requests or tokens just now (429); waiting helps."""


class ServerError(StatusError):
    """The endpoint failed (408, 409, 5xx, 529), or its answer of status 200 is none (200, or the status that it names)."""


class ReplyError(RequestFailed):
    """The model answered, but not with a usable answer to this request.

    Attributes:
        raw: What the model said to this request, at most 2 KB, or "" if nothing. Neither in `str` nor in pickles.
    """

    def __init__(self, message: str = "", *, raw: str = "", attempts: int = 0) -> None:
        super().__init__(message, attempts=attempts)
        self.raw = mask(raw)


class MissingAnswer(ReplyError):
    """The reply held no answer to this request."""


class MalformedAnswer(ReplyError):
    """The answer is empty, is not JSON, or does not fit `output_type`."""


class TruncatedReply(ReplyError):
    """The typed answer was cut off by the token limit, so it cannot be decoded."""


class Refused(ReplyError):
    """The model declined to answer."""
