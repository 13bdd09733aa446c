"""The many shapes and words of an endpoint's refusal, read into the error tree.

Known shapes: OpenAI's `{"error": {...}}`; the same in an array (Gemini's compatible endpoint), at top level (older vLLM), with the
status as code, number or string (OpenRouter, llama-server, LiteLLM), inside an answer of status 200 (OpenRouter), FastAPI's
`{"detail": ...}`, Cloudflare's `{"success": false, "errors": [...]}`, MiniMax's `base_resp`, Baidu's `error_msg`, and Gemini's
`promptFeedback` of a blocked prompt.

The words decide before the status, because endpoints say the same thing under many: a prompt stopped by a filter comes as 400
(OpenAI, Azure, DashScope, Zhipu), 403 (xAI, OpenRouter), 424 (Cloudflare's guardrails), 451 (StepFun), 500 (Anthropic through proxies)
and as 200 without an answer (Gemini). Wording counts only where a mistake does no harm: what is taken for the fault of one item is
asked again alone. Messages may quote prompts and keys, so an error's text has them without what they quote (`error_text`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

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
from microbatch.transports.bound_refusals import messages_in, words_of
from microbatch.transports.error_text import prompt_of, shown
from microbatch.transports.lenient import as_object, decode_body, first_of, is_array
from microbatch.transports.response_headers import read_limits, request_id, retry_after, stated_wait

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_SHOULD_RETRY: Final = {"true": True, "false": False}
_WORD: Final = re.compile(r"[A-Za-z_][\w.$\[\]/:-]{0,99}")

# Codes and sentences about credit: OpenAI, one-api, DashScope, Volcengine, Novita, Zhipu 1113, MiniMax 1008, SiliconFlow 30001;
# Anthropic, DeepSeek, Moonshot, xAI, OpenRouter, Fireworks, Hugging Face. OpenAI's answer to too many requests also names billing.
_QUOTA: Final = frozenset({
    *("insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached", "billing_not_active", "1113", "1008", "30001"),
    *("organization_spend_limit_exceeded", "project_spend_limit_exceeded", "organization_usage_limit_exceeded", "arrearage"),
    *("insufficient_user_quota", "pre_consume_token_quota_failed", "accountoverdueerror", "not_enough_balance", "billing_error"),
    *("exceeded_current_quota_error", "insufficient_balance", "insufficient_credits", "allocationquota.freetieronly"),
})  # fmt: skip
_QUOTA_TEXT: Final = re.compile(
    "|".join(map(re.escape, sorted(word for word in _QUOTA if not word.isdigit())))
    + r"|(?i:\bcredit balance\b|\b(?:insufficient|not enough|no(?: more| remaining)?|low|negative|used all \w+|out of|exhausted"
    r"|exceeded|depleted)\b.{0,30}\b(?:credits?|balance|funds?|prepayment)\b"
    r"|\b(?:balance|credits?|funds)\b.{0,30}\b(?:insufficient|not enough|too low|exhausted|depleted|negative|used up|ran out|run out)\b"
    r"|\bin arrears\b|\boverdue\b|\b(?:top up|recharge|purchase (?:more )?credits|payment required)\b"
    r"|\b(?:monthly|hard|billing|spend(?:ing)?)\b.{0,30}\blimit\b.{0,30}\b(?:reached|exceeded)"
    r"|\b(?:reach|exceed)\w*\b.{0,30}\b(?:monthly|hard|billing|spend(?:ing)?|included)\b.{0,20}\b(?:limit|quota|credits?|cap)\b"
    r"|\bcheck your plan and billing)|\u4f59\u989d\u4e0d\u8db3|\u6b20\u8d39"
)
_ABOUT_CREDIT: Final = frozenset({200, 400, 402, 403, 412, 429})
_CONTEXT: Final = frozenset({
    *("context_length_exceeded", "exceed_context_size_error", "model_max_prompt_tokens_exceeded", "tokens_limit_reached", "1261"),
    *("contextwindowexceedederror", "string_above_max_length"),
})  # fmt: skip
# OpenAI and vLLM, Anthropic, Gemini ("input token count ... exceeds the maximum number of tokens allowed"), xAI ("maximum prompt
# length"), Mistral ("Prompt contains ... tokens"), DashScope ("Range of input length should be"), TGI ("`inputs` must have less than"),
# Moonshot ("exceeded model token limit"), Bedrock, Copilot ("prompt token count of"), Cohere, Groq and Cerebras.
_CONTEXT_TEXT: Final = re.compile(
    r"(?i)context.{0,10}(?:length|window|size)|\b(?:prompt|inputs?|request|messages?)\b.{0,20} (?:is|are|was) too (?:long|large)\b"
    r"|\bmaximum (?:prompt|input) (?:length|tokens|size)|\b(?:prompt|input) (?:length|token count|tokens)\b.{0,40}\b(?:exceed"
    r"|should be|must be|longer|greater|larger|more than)"
    r"|\bexceed\w*\b.{0,40}\b(?:model token limit|maximum (?:number of |input |prompt )?tokens"
    r"|(?:input|prompt) (?:length|tokens?|limit))|\bprompt contains \d+ tokens|[`'\"]inputs[`'\"](?: tokens)?.{0,30}\bmust\b"
    r"|\btoo many (?:input |prompt )?tokens\b|\breduce the length of (?:the |your )?(?:messages|prompt|input)|\bprompt \u8d85\u957f"
)

# llama.cpp's server, under a 500, of a text in a list: "input (992 tokens) is too large to process. increase the physical batch size",
# "input prompt is too big compared to KV size".
_TOO_LARGE_TEXT: Final = re.compile(
    r"(?i)\binput\b.{0,40}\b(?:too large to process|too (?:big|large|long) compared to)\b"
)

# Codes of filters, without their underscores: OpenAI, Azure, DashScope (`DataInspectionFailed`), Volcengine
# (`InputTextSensitiveContentDetected`), StepFun, Bedrock, Google (reasons for a block), MiniMax 1026 and 1027, Zhipu 1301,
# Cloudflare's AI Gateway 2016 and 2017.
_FILTER_CODE: Final = re.compile(
    r"contentfilter|contentpolicy|contentmoderation|contentblocked|contentviolation|responsibleaipolicyviolation|invalidprompt"
    r"|datainspectionfailed|sensitivecontent|sensitivewords?|censorship|guardrail|moderation|promptblocked|policyviolation"
    r"|safetycheck|safetyviolation|unsafecontent|harmfulcontent|prohibitedcontent|highrisk|flagged"
    r"|^(?:safety|blocklist|spii|recitation|1026|1027|1301|2016|2017)$"
)
_FILTER_TEXT: Final = re.compile(
    r"ContentPolicyViolation|ResponsibleAIPolicyViolation|"
    # "Content violates usage guidelines", "potentially violating our usage policy"
    r"(?i:\bviolat\w*\b.{0,60}\b(?:polic(?:y|ies)|guidelines?|terms)\b"
    r"|\b(?:polic(?:y|ies)|guidelines?)\b.{0,20}\bviolat"
    # "Your input was flagged", "blocked by content filtering policy", "Prompt blocked due to security configurations"
    r"|\b(?:prompt|inputs?|outputs?|request|response|completion|content|messages?|text|answer|generation)\b.{0,30}"
    r"\b(?:was|were|is|are|been|being|got)?\b ?\b(?:flagged|filtered|censored|moderated)\b"
    r"|\b(?:blocked|stopped|rejected|refused|filtered|flagged|denied|prevented)\b.{0,40}"
    r"\b(?:content|safety|moderation|guardrails?|security configurations?|responsible ai|harm\w*|high risk|sensitive)"
    r"|\b(?:content|safety|moderation)\b.{0,12}\b(?:filter|system|check|policy|management policy|guard)\w*.{0,40}"
    r"\b(?:blocked|stopped|rejected|refused|triggered|flagged)\b"
    r"|\btriggering\b.{0,60}\bcontent (?:management )?(?:policy|filter)"
    # DashScope: "may contain inappropriate content"; Moonshot: "was considered high risk"; Volcengine, Zhipu: "sensitive information"
    r"|\b(?:contain|considered|detected|includ|involv|regarded)\w*\b.{0,40}"
    r"\b(?:inappropriate|sensitive|unsafe|harmful|prohibited|high risk)"
    r"|\b(?:inappropriate|sensitive|unsafe|harmful|prohibited) (?:content|information|words?|text)\b.{0,30}\b(?:detect|found)"
    r"|\bfailed check: safety)|\u654f\u611f|\u8fdd\u89c4|\u4e0d\u5408\u89c4"
)
# Required of a status of 500 and above: "the content filter is overloaded" is a transient failure.
_FILTER_VERDICT: Final = re.compile(
    r"(?i)\bviolat\w*\b.{0,60}\b(?:polic(?:y|ies)|guidelines?)\b"
    r"|\b(?:blocked|filtered|stopped|rejected) by\b.{0,30}\b(?:content|safety|moderation|guardrail)"
)
# The same verbs about the account, not about the content.
_ACCOUNT_TEXT: Final = re.compile(
    r"(?i)\b(?:account|organi[sz]ation|workspace|user|team|key|access)\b.{0,40}\b(?:is|was|been|has|have) (?:\w+ )?"
    r"(?:deactivated|suspended|terminated|disabled|banned|revoked)\b"
)
# Statuses about the account or about transient failures, whatever words come with them.
_NOT_ABOUT_CONTENT: Final = frozenset({401, 402, 408, 409, 429})

# OpenAI and Groq: "Request too large for gpt-4o ... Limit 30000, Requested 45411". Waiting does not help.
_SIZE_TEXT: Final = re.compile(
    r"(?i)\b(?:request|prompt|input|message|payload)s?\b[^.]{0,20} too (?:large|long|big)\b"
    r"|\b(?:reduce|shorten)\b.{0,30}\b(?:(?:message|prompt|input|request)s? (?:length|size)|(?:length|size) of)\b"
    r"|\btokens must be reduced\b|\btoo many (?:input )?tokens in\b"
)
_LIMIT_AND_ASKED: Final = re.compile(
    r"(?i)\blimit:?\s+([\d,]+)\b.{0,80}\brequested:?\s+(?:about\s+|~)?([\d,]+)", re.DOTALL
)

# For errors inside a 200 that name no status, and for limits said as 400 or 403: OpenAI's and Anthropic's types, Google's status
# words, Bedrock, and the codes of Baidu (18, 3365..), MiniMax (1002, 1039) and Zhipu (1302 to 1305).
_BY_WORD: Final[Mapping[type[StatusError], set[str]]] = {
    BadRequest: {"invalid_request_error", "badrequesterror", "invalid_argument", "not_found_error"},
    AuthFailed: {
        *("authentication_error", "invalid_api_key", "permission_error", "permission_denied", "unauthenticated"),
    },
    RateLimited: {
        *(
            "rate_limit_exceeded",
            "rate_limit_error",
            "slow_down",
            "resource_exhausted",
            "ratelimitexceeded",
            "userratelimitexceeded",
        ),
        *("throttlingexception", "throttling", "18", "336501", "336502", "1002", "1039", "1302", "1303", "1305"),
    },
}
# Statuses under which a message about the context window is about this request. (A 429 may speak of a "rate limit for long context",
# and a 404 quotes the model's name.)
_ABOUT_THE_REQUEST: Final = frozenset({200, 400, 413, 422})
# 4xx of gateways and of Groq (498, no capacity at present) for what may pass later, as 408 and 409.
_TRANSIENT: Final = frozenset({408, 409, 424, 425, 498, 499})


class Fault(msgspec.Struct, frozen=True):
    """An error as the endpoint put it.

    Attributes:
        status: The HTTP status, or the one named inside an answer of status 200, or 200 if it names none.
        code: Its most specific word: `code`, else `type`, else `status`; None if it has only numbers.
        param: The request field at fault.
        message: Its messages, those that a gateway passes on included, one a line. They may quote the prompt.
        words: All its codes and types, in lower case.
        raw: The body, or the stream event, that it was read from.
        said: Everything that it says: messages, codes, and paths of fields.
    """

    status: int
    code: str | None = None
    param: str | None = None
    message: str = ""
    words: frozenset[str] = frozenset()
    raw: bytes = b""
    said: str = ""

    @property
    def text(self) -> str:
        """Message, field and everything else that was said."""
        return f"{self.message} {self.param or ''} {self.code or ''} {self.said}"

    def __repr__(self) -> str:  # without the endpoint's words
        return f"Fault(status={self.status}, code={self.code!r}, param={self.param!r})"


def read_fault(raw: bytes, status: int, *, hollow: bool = False) -> Fault | None:
    """Return the error in a body or a stream event, JSON or not; None for a 200 that does not contain one.

    With *hollow*, it is known to hold no answer, so that a message in it is one of an error.
    """
    return read_failure(raw, status) if has_failed(status) else _read(raw, status, failed=hollow)


def read_failure(raw: bytes, status: int) -> Fault:
    """Return the error in the body, JSON or not, of a response whose *status* is no success."""
    words = raw[:4096].decode("utf-8", "replace")
    return _read(raw, status, failed=True) or Fault(status, message=messages_in(words) or words, raw=raw, said=words)


def has_failed(status: int) -> bool:
    """Return whether *status* is none of HTTP's class of success."""
    return not 200 <= status < 300  # noqa: PLR2004


def _read(raw: bytes, status: int, *, failed: bool) -> Fault | None:
    try:
        found = _find(decode_body(raw), failed=failed)
    except ValueError:
        return None
    return _fault(found, status, raw) if any(found.values()) else None


def _find(data: Any, *, failed: bool) -> dict[str, Any]:
    """Return the error object inside *data*, in OpenAI's shape; empty if there is none."""
    top = as_object(first_of(data))
    choice = as_object(first_of(top.get("choices")))  # OpenRouter puts a provider's failure into the choice
    error = top.get("error") or choice.get("error")
    if not choice and not error:
        error = first_of(top.get("errors")) or _from_block(top)
    if isinstance(error, str) and error:
        return {"message": error, **{name: top.get(name) for name in ("code", "type", "param", "status")}}
    if as_object(error):
        return as_object(error)
    if top.get("object") == "error" or (failed and top.get("message")):
        return top
    if failed and isinstance(message := top.get("msg") or top.get("error_msg"), str):
        return {"message": message, **top}
    return _from_detail(top.get("detail")) if failed else {}


def _from_block(top: dict[str, Any]) -> dict[str, Any]:
    """Return Gemini's reason for a block, or MiniMax's status, in OpenAI's shape."""
    feedback = as_object(top.get("promptFeedback") or top.get("prompt_feedback"))
    reason = feedback.get("blockReason") or feedback.get("block_reason")
    if reason:
        return {"message": str(reason), "code": "prompt_blocked"}
    base = as_object(top.get("base_resp"))
    return {"message": base.get("status_msg"), "code": base["status_code"]} if base.get("status_code") else {}


def _from_detail(detail: Any) -> dict[str, Any]:
    """Return FastAPI's validation errors (`[{"type", "loc", "msg"}]`) in OpenAI's shape."""
    first = first_of(detail)
    if isinstance(first, str):
        return {"message": first}
    fields = as_object(first)
    place: Any = fields.get("loc")
    return {
        "message": fields.get("msg") or fields.get("message"),
        "code": fields.get("type"),
        "param": place[-1] if is_array(place) and place else None,
    }


def _fault(error: dict[str, Any], status: int, raw: bytes) -> Fault:
    names = ("code", "type", "status", "statusCode", "status_code", "error_code")
    values: list[Any] = [*map(error.get, names), as_object(error.get("innererror")).get("code")]
    metadata = as_object(error.get("metadata"))
    statuses = [number for number in map(_as_status, values) if number is not None]
    codes = [value for value in values if isinstance(value, str | int) and value and _as_status(value) is None]
    param = error.get("param")
    nested = as_object(
        as_object(_value_of(metadata.get("raw"))).get("error")
    )  # OpenRouter has the provider's error as a text
    return Fault(
        statuses[0] if statuses and not has_failed(status) else status,
        code=next((code for code in codes if isinstance(code, str)), None),
        param=param if isinstance(param, str) and param else None,
        message=messages_in(error),
        # OpenRouter's 403 for flagged input names it only in the metadata; the key is valid, and this one item is the cause.
        words=frozenset(
            {
                *(str(code).lower() for code in [*codes, nested.get("code"), nested.get("type")]),
                *({"flagged_input"} & metadata.keys()),
            }
        ),
        raw=raw,
        said=words_of(raw),
    )


def _value_of(text: Any) -> Any:
    try:
        return decode_body(text.encode()) if isinstance(text, str) else text
    except ValueError:
        return None


def _as_status(value: Any) -> int | None:
    if isinstance(value, str) and len(value) == len("429") and value.isascii() and value.isdigit():
        value = int(value)
    return value if isinstance(value, int) and 400 <= value <= 599 else None  # noqa: PLR2004 (HTTP's own errors)


def classify(fault: Fault, prompt: str = "") -> type[StatusError]:
    """Return the class of the error tree that *fault* belongs to; *prompt* is what its message may quote."""
    status, words, message = fault.status, fault.words, fault.message
    if words & _CONTEXT or (status in _ABOUT_THE_REQUEST and _CONTEXT_TEXT.search(message)):
        return ContextTooLong
    if status == 500 and _TOO_LARGE_TEXT.search(message):  # noqa: PLR2004
        return ContextTooLong
    if _is_about_content(fault):
        return Filtered
    wait = stated_wait(fault.raw) if status == 429 else None  # noqa: PLR2004 Gemini says "check your billing" of minutes, too
    if status == 402 or words & _QUOTA:  # noqa: PLR2004
        return QuotaExhausted
    if (
        wait is None
        and status in _ABOUT_CREDIT
        and any(said[0] not in prompt for said in _QUOTA_TEXT.finditer(message))
    ):
        return QuotaExhausted  # it stops all calls of the account, so words of one item must not cause it
    if status in (400, 403) and words & _BY_WORD[RateLimited]:
        return RateLimited
    if status in (401, 403):
        return AuthFailed
    if status == 429:  # noqa: PLR2004
        return BadRequest if _is_about_size(message) else RateLimited
    if status in _TRANSIENT or status >= 500:  # noqa: PLR2004
        return ServerError
    if status >= 300:  # noqa: PLR2004
        return BadRequest if status >= 400 else StatusError  # noqa: PLR2004
    # An error under a 200 that does not name itself is the endpoint's own trouble ("server_error", "overloaded").
    return next((kind for kind, names in _BY_WORD.items() if words & names), ServerError)


def _is_about_content(fault: Fault) -> bool:
    """Return whether a filter has stopped the prompt or the answer."""
    if any(_FILTER_CODE.search(re.sub(r"[\W_]", "", word)) for word in fault.words):
        return True
    pattern = _FILTER_VERDICT if fault.status >= 500 else _FILTER_TEXT  # noqa: PLR2004
    if fault.status in _NOT_ABOUT_CONTENT or pattern.search(fault.message) is None:
        return False
    return _ACCOUNT_TEXT.search(fault.message) is None


def _is_about_size(message: str) -> bool:
    """Return whether a 429 says that the request exceeds the limit by itself, so that waiting does not help."""
    if _SIZE_TEXT.search(message) is not None:
        return True
    numbers = _LIMIT_AND_ASKED.search(message)
    limit, asked = (0, 0) if numbers is None else (int("0" + count.replace(",", "")) for count in numbers.groups())
    return asked > limit


def to_error(
    fault: Fault,
    *,
    where: str,
    headers: Mapping[str, str],
    secrets: Iterable[str] = (),
    keyless: bool = False,
    asked: Sequence[Any] | None = None,
) -> StatusError:
    """Return the error to raise for *fault* in a response with *headers*, which are looked up in any case.

    *where* is host and port. *secrets* must not appear anywhere, such as the key that was sent; *keyless* if there was none. *asked*
    are the contents of the request's messages, which the error's text must not quote; None leaves the endpoint's words out of it.
    """
    kind = classify(fault, "" if asked is None else prompt_of(asked))
    code, param = _clean(fault.code, secrets), _clean(fault.param, secrets)
    wait = retry_after(headers)
    if wait is None and kind in (RateLimited, ServerError):
        wait = stated_wait(fault.raw)
    text = f"{where} answered with status {fault.status}"
    text += f" ({code})" if code else ""
    text += f", about the field {param}" if param else ""
    words = "" if asked is None else shown(fault.message, secrets, asked)
    # The header comes with every 429, also where trying again is of no use.
    final = kind in (ContextTooLong, Filtered) or (kind is BadRequest and fault.status in (413, 429))
    return kind(
        f"{text}: {_advice(kind, fault.status, wait, keyless=keyless)}" + (f"; it says: {words}" if words else ""),
        status=fault.status,
        code=code,
        param=param,
        request_id=request_id(headers),
        retry_after=wait,
        should_retry=None if final else _SHOULD_RETRY.get(headers.get("x-should-retry", "").lower()),
        limits=read_limits(headers),
        body=_masked(fault.raw, secrets),
    )


def unanswered(
    problem: str, *, blocked: bool, where: str, headers: Mapping[str, str], raw: bytes, secrets: Iterable[str] = ()
) -> StatusError:
    """Return the error to raise for a status 200 without an answer; *blocked* if a filter is the likely cause. See `to_error`."""
    cause = "; endpoints answer so whose content filter stopped the prompt" if blocked else ""
    return (Filtered if blocked else ServerError)(
        f"{where} answered with status 200, but {problem}{cause}",
        status=200,
        request_id=request_id(headers),
        body=_masked(raw, secrets),
        limits=read_limits(headers),
    )


def _masked(raw: bytes, secrets: Iterable[str]) -> str:
    body = raw[:8192].decode("utf-8", "replace")
    for secret in secrets:
        body = body.replace(secret, "***")
    return body


def _clean(word: str | None, secrets: Iterable[str]) -> str | None:
    """Return *word* if it can be shown: an identifier or a path of them, with nothing secret in it."""
    if word is None or not _WORD.fullmatch(word) or mask(word) != word or any(secret in word for secret in secrets):
        return None
    return word


def _advice(kind: type[StatusError], status: int, wait: float | None, *, keyless: bool) -> str:
    if kind is AuthFailed and keyless:
        where = "OPENAI_API_KEY is sent only to OpenAI and to OPENAI_BASE_URL"
        return f"no key was sent; pass api_key=, or the header that the endpoint wants in headers= ({where})"
    if kind is RateLimited and wait is not None:
        return f"{_ADVICE[kind]}, it asks to wait {wait:g} s"
    if kind is BadRequest and status == 404:  # noqa: PLR2004
        return "check model and base_url, which usually ends in /v1"
    if kind is BadRequest and status in (413, 429):
        return "the request is too large; lower max_batch_tokens or max_batch_size"
    return _ADVICE[kind]


_ADVICE: Final[Mapping[type[StatusError], str]] = {
    AuthFailed: "the key was refused; check api_key=, OPENAI_API_KEY or the Authorization header, and what the key may do",
    BadRequest: "the request is refused as it is",
    ContextTooLong: "the prompt does not fit the model's context window; lower max_prompt_tokens, or shorten the item",
    Filtered: "a content filter stopped it",
    QuotaExhausted: "the account is out of credit or over a spending limit; waiting does not help",
    RateLimited: "too many requests or tokens just now",
    ServerError: "the endpoint has trouble of its own",
    StatusError: "redirects are not followed, they could carry the key elsewhere; set base_url to the final address",
}
