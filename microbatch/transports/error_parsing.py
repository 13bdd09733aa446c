"""The many shapes in which endpoints say no, read into the error tree.

Known shapes: OpenAI's `{"error": {...}}`; the same in an array (Gemini's compatible endpoint), at top level (older vLLM), with
the status as code, number or string (OpenRouter, llama-server, LiteLLM), inside an answer of status 200 (OpenRouter), FastAPI's
`{"detail": ...}`, Cloudflare's `{"success": false, "errors": [...]}`, MiniMax's `base_resp`, Baidu's `error_msg`, and Gemini's
`promptFeedback` of a prompt that was blocked. Messages may quote prompts and keys, so they go to `StatusError.body` and nowhere else.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, TypeGuard, cast

import msgspec

from microbatch.errors import (
    AuthFailed,
    BadRequest,
    ContextTooLong,
    Filtered,
    QuotaExhausted,
    RateLimited,
    ServerError,
    StatusError,
    mask,
)
from microbatch.transports.lenient import decode_body
from microbatch.transports.refusals import classify
from microbatch.transports.response_headers import read_limits, retry_after

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_VERDICTS: Final = {"true": True, "false": False}

_WORD: Final = re.compile(r"[A-Za-z_][\w.$\[\]/:-]{0,99}")


class Fault(msgspec.Struct, frozen=True):
    """An error as the endpoint put it.

    Attributes:
        status: The HTTP status, or the one named inside an answer of status 200, or 200 if it names none.
        code: The most telling word it has for it: `code`, else `type`, else `status`; None if it has only numbers.
        param: The request field it complains of, or None.
        message: Its words. They may quote the prompt.
        words: All its codes and types, in lower case.
        flagged: It says that a moderation flagged the input.
    """

    status: int
    code: str | None = None
    param: str | None = None
    message: str = ""
    words: frozenset[str] = frozenset()
    flagged: bool = False

    def __repr__(self) -> str:
        """Tell the status and code, without the endpoint's words."""
        return f"Fault(status={self.status}, code={self.code!r}, param={self.param!r})"


def read_fault(raw: bytes, status: int, *, hollow: bool = False) -> Fault | None:
    """Return the error that a body or a stream event holds.

    Args:
        raw: The bytes, JSON or not.
        status: The HTTP status. From 400 on (and for redirects) there is always a fault; in a 200 only if the body says so.
        hollow: Whether it is known to hold no answer, so that a message in it is one of an error.
    """
    try:
        data = decode_body(raw)
    except ValueError:
        data = None
    failed = not 200 <= status < 300  # noqa: PLR2004 (the class of success)
    found = _find(data, failed=failed or hollow)
    if any(found.values()):
        return _fault(found, status, failed=failed)
    return Fault(status, message=raw[:4096].decode("utf-8", "replace")) if failed else None


def unanswered(
    said: str, *, blocked: bool, where: str, headers: Mapping[str, str], raw: bytes, secrets: Iterable[str] = ()
) -> StatusError:
    """Return the error to raise for a status 200 without an answer.

    Args:
        said: What came instead, for the message.
        blocked: Whether a filter is the likely cause, and not trouble that passes.
        where: Host and port, for the message.
        headers: The answer's headers.
        raw: The answer's body; it is masked and goes to `body`.
        secrets: What must not appear anywhere.
    """
    cause = "; endpoints answer so whose content filter stopped the prompt" if blocked else ""
    return (Filtered if blocked else ServerError)(
        f"{where} answered with status 200, but {said}{cause}",
        status=200,
        request_id=headers.get("x-request-id"),
        body=_masked(raw, secrets),
        limits=read_limits(headers),
    )


def to_error(
    fault: Fault,
    *,
    where: str,
    headers: Mapping[str, str],
    raw: bytes,
    secrets: Iterable[str] = (),
    keyless: bool = False,
) -> StatusError:
    """Return the error to raise for *fault*.

    Args:
        fault: What the endpoint said.
        where: Host and port, for the message.
        headers: The answer's headers, looked up in any case.
        raw: The answer's body; it is masked and goes to `body`.
        secrets: What must not appear anywhere, such as the key that was sent.
        keyless: No credentials were sent, which is worth saying when they are asked for.
    """
    kind = classify(fault)
    code, param = _clean(fault.code, secrets), _clean(fault.param, secrets)
    wait = retry_after(headers)
    text = f"{where} answered with status {fault.status}"
    if code is not None:
        text += f" ({code})"
    if param is not None:
        text += f", about the field {param}"
    advice = _advice(kind, fault.status, wait, keyless=keyless)
    return kind(
        f"{text}: {advice}",
        status=fault.status,
        code=code,
        param=param,
        request_id=headers.get("x-request-id"),
        retry_after=wait,
        should_retry=None
        if _is_final(kind, fault.status)
        else _VERDICTS.get(headers.get("x-should-retry", "").lower()),
        limits=read_limits(headers),
        body=_masked(raw, secrets),
    )


def _is_final(kind: type[StatusError], status: int) -> bool:
    """Whether trying again is no use, whatever the endpoint's headers say; they come with every 429."""
    return kind in (ContextTooLong, Filtered) or (kind is BadRequest and status in (413, 429))


def _masked(raw: bytes, secrets: Iterable[str]) -> str:
    body = raw[:8192].decode("utf-8", "replace")
    for secret in secrets:
        body = body.replace(secret, "***")
    return body


def as_object(value: Any) -> dict[str, Any]:
    """Return a JSON value if it is an object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def is_array(value: Any) -> TypeGuard[list[Any]]:
    """Return whether a JSON value is an array."""
    return isinstance(value, list)


def _first(value: Any) -> Any:
    """Return the first element of a JSON array, or None; anything else as it is."""
    if not is_array(value):
        return value
    return value[0] if value else None


def _find(data: Any, *, failed: bool) -> dict[str, Any]:
    """Return the error object inside *data*, put into OpenAI's shape; empty if there is none."""
    top = as_object(_first(data))
    # OpenRouter puts a provider's failure into the choice.
    choice = as_object(_first(top.get("choices")))
    error = top.get("error") or choice.get("error")
    if not choice and not error:
        error = as_object(_first(top.get("errors"))) or _from_verdict(top)
    if isinstance(error, str) and error:
        return {"message": error, **{name: top.get(name) for name in ("code", "type", "param", "status")}}
    if as_object(error):
        return as_object(error)
    if top.get("object") == "error" or (failed and isinstance(top.get("message"), str)):
        return top
    if failed and isinstance(said := top.get("msg") or top.get("error_msg"), str):
        return {"message": said, **top}
    return _from_detail(top.get("detail")) if failed else {}


def _from_verdict(top: dict[str, Any]) -> dict[str, Any]:
    """Put what stands where an answer should be into OpenAI's shape: Gemini's reason for a block, MiniMax's status."""
    feedback = as_object(top.get("promptFeedback") or top.get("prompt_feedback"))
    reason = feedback.get("blockReason") or feedback.get("block_reason")
    if reason:
        return {"message": str(reason), "code": "prompt_blocked"}
    verdict = as_object(top.get("base_resp"))
    if verdict.get("status_code"):
        return {"message": verdict.get("status_msg"), "code": verdict["status_code"]}
    return {}


def _from_detail(detail: Any) -> dict[str, Any]:
    """Put FastAPI's validation errors (`[{"type", "loc", "msg"}]`) into OpenAI's shape."""
    first = _first(detail)
    if isinstance(first, str):
        return {"message": first}
    fields = as_object(first)
    place: Any = fields.get("loc")
    return {
        "message": fields.get("msg") or fields.get("message"),
        "code": fields.get("type"),
        "param": place[-1] if is_array(place) and place else None,
    }


def _fault(error: dict[str, Any], status: int, *, failed: bool) -> Fault:
    values: list[Any] = [
        error.get(name) for name in ("code", "type", "status", "statusCode", "status_code", "error_code")
    ]
    values.append(as_object(error.get("innererror")).get("code"))
    metadata = as_object(error.get("metadata"))
    named = next((number for number in map(_as_status, values) if number is not None), None)
    words = [value for value in values if isinstance(value, str) and _as_status(value) is None and value]
    numbers = {str(value) for value in values if isinstance(value, int) and _as_status(value) is None}
    param, message = error.get("param"), error.get("message")
    # OpenRouter has a sentence of its own, and that of the provider beside it.
    said = [part for part in (message, metadata.get("raw")) if isinstance(part, str) and part]
    return Fault(
        status if failed or named is None else named,
        code=words[0] if words else None,
        param=param if isinstance(param, str) and param else None,
        message="\n".join(said),
        words=frozenset(word.lower() for word in words) | numbers,
        # OpenRouter's 403 for flagged input; the key is fine, and this one item is the cause.
        flagged="flagged_input" in metadata,
    )


def _as_status(value: Any) -> int | None:
    if isinstance(value, str) and len(value) == len("429") and value.isascii() and value.isdigit():
        value = int(value)
    return value if isinstance(value, int) and 400 <= value <= 599 else None  # noqa: PLR2004 (HTTP's own errors)


def _clean(word: str | None, secrets: Iterable[str]) -> str | None:
    """Return *word* if it can be shown: an identifier or a path of them, with nothing secret in it."""
    if word is None or not _WORD.fullmatch(word) or mask(word) != word or any(secret in word for secret in secrets):
        return None
    return word


def _advice(kind: type[StatusError], status: int, wait: float | None, *, keyless: bool) -> str:
    if kind is AuthFailed:
        if keyless:
            return "no key was sent; set api_key= or OPENAI_API_KEY, or the header that the endpoint wants in headers="
        return (
            "the key was refused; check api_key=, OPENAI_API_KEY or the Authorization header, and what the key may do"
        )
    if kind is RateLimited:
        asked = "" if wait is None else f" It asks to wait {wait:g} s."
        return f"too many requests or tokens just now.{asked}"
    if kind is StatusError:
        return "redirects are not followed, they could carry the key elsewhere; set base_url to the final address"
    if kind is BadRequest and status == 404:  # noqa: PLR2004
        return "check model and base_url, which usually ends in /v1"
    if kind is BadRequest and status in (413, 429):
        return "the request is too large; lower max_batch_tokens or max_batch_size"
    return _ADVICE[kind]


_ADVICE: Final[Mapping[type[StatusError], str]] = {
    BadRequest: "the request is refused as it is; the endpoint's own words are in .body",
    ContextTooLong: "the prompt does not fit the model's context window; lower max_prompt_tokens, or shorten the item",
    Filtered: "a content filter stopped it",
    QuotaExhausted: "the account is out of credit or over a spending limit; waiting does not help",
    ServerError: "the endpoint has trouble of its own; its words are in .body",
}
