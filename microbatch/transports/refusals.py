"""What a refusal means: the branch of the error tree that an endpoint's words and status belong to.

The words decide before the status, because endpoints say the same thing under many: a prompt that a filter has stopped comes as 400
(OpenAI, Azure, DashScope, Zhipu), 403 (xAI, OpenRouter), 424 (Cloudflare's guardrails), 451 (StepFun), 500 (Anthropic through proxies)
and as 200 without an answer (Gemini). Messages may quote the prompt, so wording counts only where a sentence of the endpoint's says it,
and where a mistake does no harm: what is taken for one item's fault is asked for again alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from microbatch.errors import (
    AuthFailed,
    BadRequest,
    ContextTooLong,
    Filtered,
    QuotaExhausted,
    RateLimited,
    ServerError,
    StatusError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.transports.error_parsing import Fault

_QUOTA: Final = frozenset(
    {
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "billing_hard_limit_reached",
        "billing_not_active",
    }
)
_CONTEXT: Final = frozenset({"context_length_exceeded", "exceed_context_size_error"})
_CONTEXT_TEXT: Final = re.compile(
    r"(?i)context.{0,10}(?:length|window|size)|ContextWindowExceeded|exceed_context_size|context_length_exceeded"
    r"|\b(?:prompt|input) is too long\b"
)
_QUOTA_TEXT: Final = re.compile("|".join(sorted(_QUOTA)))

# Codes that name a filter, without their underscores: OpenAI, Azure, DashScope (`DataInspectionFailed`), Volcengine
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
    r"|\bfailed check: safety)|\u4e0d\u5b89\u5168\u6216\u654f\u611f|\u654f\u611f\u5185\u5bb9"
)
# What a status of 500 and above needs to say: "the content filter is overloaded" is trouble that passes.
_FILTER_VERDICT: Final = re.compile(
    r"(?i)\bviolat\w*\b.{0,60}\b(?:polic(?:y|ies)|guidelines?)\b"
    r"|\b(?:blocked|filtered|stopped|rejected) by\b.{0,30}\b(?:content|safety|moderation|guardrail)"
)
# The same verbs, said of who asks and not of what is asked.
_WHO_TEXT: Final = re.compile(
    r"(?i)\b(?:account|organi[sz]ation|workspace|user|team|key|access)\b.{0,40}\b(?:is|was|been|has|have) (?:\w+ )?"
    r"(?:deactivated|suspended|terminated|disabled|banned|revoked)\b"
)
# Statuses that speak of the account whatever words come with them, or of trouble that passes.
_NOT_ABOUT_CONTENT: Final = frozenset({401, 402, 408, 409, 429})

# OpenAI and Groq: "Request too large for gpt-4o ... Limit 30000, Requested 45411". It will never fit, however long one waits.
_SIZE_TEXT: Final = re.compile(
    r"(?i)\b(?:request|prompt|input|message|payload)s?\b[^.]{0,20} too (?:large|long|big)\b"
    r"|\b(?:reduce|shorten)\b.{0,30}\b(?:(?:message|prompt|input|request)s? (?:length|size)|(?:length|size) of)\b"
    r"|\btokens must be reduced\b|\btoo many (?:input )?tokens in\b"
)
_LIMIT_AND_ASKED: Final = re.compile(
    r"(?i)\blimit:?\s+([\d,]+)\b.{0,80}\brequested:?\s+(?:about\s+|~)?([\d,]+)", re.DOTALL
)

# For errors inside a 200 that name no status: OpenAI's and Anthropic's types, Google's status words.
_BY_WORD: Final[Mapping[str, type[StatusError]]] = {
    "invalid_request_error": BadRequest,
    "badrequesterror": BadRequest,
    "invalid_argument": BadRequest,
    "not_found_error": BadRequest,
    "authentication_error": AuthFailed,
    "invalid_api_key": AuthFailed,
    "permission_error": AuthFailed,
    "permission_denied": AuthFailed,
    "unauthenticated": AuthFailed,
    "rate_limit_exceeded": RateLimited,
    "rate_limit_error": RateLimited,
    "slow_down": RateLimited,
    "resource_exhausted": RateLimited,
}
# The statuses under which a message about the context window means the request at hand. (A 429 may speak of a "rate limit for long
# context" and a 404 quotes the model's name.)
_ABOUT_THE_REQUEST: Final = frozenset({200, 400, 413, 422})


def classify(fault: Fault) -> type[StatusError]:
    """Return the branch of the error tree that *fault* belongs to: what to do about it decides, not the number alone."""
    status, words, message = fault.status, fault.words, fault.message
    if words & _CONTEXT or (status in _ABOUT_THE_REQUEST and _CONTEXT_TEXT.search(message)):
        return ContextTooLong
    if _is_about_content(fault):
        return Filtered
    if status == 402 or words & _QUOTA or (status == 429 and _QUOTA_TEXT.search(message)):  # noqa: PLR2004
        return QuotaExhausted
    if status in (401, 403):
        return AuthFailed
    if status == 429:  # noqa: PLR2004
        return BadRequest if _is_about_size(message) else RateLimited
    if status in (408, 409) or status >= 500:  # noqa: PLR2004
        return ServerError
    if status >= 300:  # noqa: PLR2004
        return BadRequest if status >= 400 else StatusError  # noqa: PLR2004
    named = [kind for word, kind in _BY_WORD.items() if word in words]
    # An error that arrives under a 200 without naming itself is the endpoint's own trouble ("server_error", "overloaded").
    return named[0] if named else ServerError


def _is_about_content(fault: Fault) -> bool:
    """Whether a filter has stopped the prompt or the answer."""
    if fault.flagged or any(_FILTER_CODE.search(re.sub(r"[\W_]", "", word)) for word in fault.words):
        return True
    said = _FILTER_VERDICT if fault.status >= 500 else _FILTER_TEXT  # noqa: PLR2004
    if fault.status in _NOT_ABOUT_CONTENT or said.search(fault.message) is None:
        return False
    return _WHO_TEXT.search(fault.message) is None


def _is_about_size(message: str) -> bool:
    """Whether a 429 says that the request is larger than the limit itself, so that waiting does not help."""
    asked = _LIMIT_AND_ASKED.search(message)
    if _SIZE_TEXT.search(message) is not None:
        return True
    limit, wanted = (0, 0) if asked is None else (int("0" + count.replace(",", "")) for count in asked.groups())
    return wanted > limit
