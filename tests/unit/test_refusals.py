"""A refusal is taken for what its words say, whatever its status: a filter's verdict, a size, or neither."""

# ruff: noqa: E501 the sentences are quoted whole

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from helpers import each

from microbatch import errors
from microbatch.transports.error_parsing import classify, read_fault, to_error

FILTERED: dict[str, tuple[int, Any]] = {
    "xAI": (
        403,
        {
            "code": "The caller does not have permission to execute the specified operation",
            "error": "Content violates usage guidelines. Team: x, API key ID: y, Failed check: SAFETY_CHECK_TYPE_BIO",
        },
    ),
    "OpenAI, reasoning models": (
        400,
        {
            "error": {
                "message": "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
                "type": "invalid_request_error",
                "code": "invalid_prompt",
            }
        },
    ),
    "OpenAI, images": (
        400,
        {
            "error": {
                "message": "Your request was rejected as a result of our safety system.",
                "code": "moderation_blocked",
            }
        },
    ),
    "Azure": (
        400,
        {
            "error": {
                "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
                "code": "content_filter",
                "innererror": {"code": "ResponsibleAIPolicyViolation"},
            }
        },
    ),
    "Azure, in words": (
        400,
        {
            "error": {
                "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."
            }
        },
    ),
    "Anthropic": (
        400,
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "Output blocked by content filtering policy"},
        },
    ),
    "Anthropic behind a proxy": (500, {"error": {"message": "Output blocked by content filtering policy"}}),
    "OpenRouter": (
        403,
        {
            "error": {
                "code": 403,
                "message": 'x requires moderation on Y. Your input was flagged for "violence".',
                "metadata": {"reasons": ["violence"], "flagged_input": "..."},
            }
        },
    ),
    "OpenRouter, the provider's words": (
        400,
        {
            "error": {
                "code": 400,
                "message": "Provider returned error",
                "metadata": {"raw": '{"error":{"message":"Content violates usage guidelines."}}'},
            }
        },
    ),
    "Cloudflare's gateway": (
        424,
        {"success": False, "errors": [{"code": 2016, "message": "Prompt blocked due to security configurations"}]},
    ),
    "DashScope": (
        400,
        {
            "error": {
                "code": "data_inspection_failed",
                "message": "Input data may contain inappropriate content.",
                "type": "data_inspection_failed",
            }
        },
    ),
    "DashScope's own API": (
        400,
        {"code": "DataInspectionFailed", "message": "Output data may contain inappropriate content."},
    ),
    "Zhipu": (
        400,
        {
            "error": {
                "code": "1301",
                "message": "\u7cfb\u7edf\u68c0\u6d4b\u5230\u8f93\u5165\u6216\u751f\u6210\u5185\u5bb9\u53ef\u80fd\u5305\u542b\u4e0d\u5b89\u5168\u6216\u654f\u611f\u5185\u5bb9",
            }
        },
    ),
    "Moonshot": (
        400,
        {
            "error": {
                "message": "The request was rejected because it was considered high risk",
                "type": "content_filter",
            }
        },
    ),
    "Moonshot, in words": (
        400,
        {
            "error": {
                "message": "The request was rejected because it was considered high risk",
                "type": "invalid_request_error",
            }
        },
    ),
    "MiniMax": (200, {"choices": None, "base_resp": {"status_code": 1026, "status_msg": "input new_sensitive"}}),
    "Volcengine": (
        400,
        {
            "error": {
                "code": "InputTextSensitiveContentDetected",
                "message": "The request failed because the input text may contain sensitive information.",
            }
        },
    ),
    "StepFun": (
        451,
        {
            "error": {
                "message": "The content you provided or machine outputted is blocked.",
                "type": "censorship_blocked",
            }
        },
    ),
    "Bedrock": (400, {"message": "x", "code": "guardrail_intervened"}),
    "Gemini": (200, {"choices": [], "promptFeedback": {"blockReason": "SAFETY"}}),
    "Gemini in snake case": (200, {"choices": None, "prompt_feedback": {"block_reason": "PROHIBITED_CONTENT"}}),
    "LiteLLM": (400, {"error": {"message": "litellm.ContentPolicyViolationError: x", "code": "400"}}),
    "in plain words": (422, {"detail": "The prompt contains unsafe content"}),
    "as text": (403, b"Request blocked by content moderation"),
    "with a warning about the account": (
        400,
        {
            "error": {
                "message": "Your prompt was flagged as violating our policy. Repeated violations may get your account suspended."
            }
        },
    ),
}

OTHERWISE: dict[str, tuple[int, Any, type[errors.StatusError]]] = {
    "a plain 403": (403, {"error": "forbidden"}, errors.AuthFailed),
    "a model that the key may not use": (
        403,
        {"error": {"message": "Project does not have access to model x", "code": "model_not_found"}},
        errors.AuthFailed,
    ),
    "a closed account": (
        403,
        {"error": {"message": "Your account has been suspended for violating our usage policies."}},
        errors.AuthFailed,
    ),
    "a closed account, as 401": (
        401,
        {"error": {"message": "This organization was disabled: content policy violations."}},
        errors.AuthFailed,
    ),
    "a filter that is down": (
        503,
        {"error": {"message": "The content filter is overloaded, the request was rejected"}},
        errors.ServerError,
    ),
    "too many requests": (
        429,
        {"error": {"message": "Please reduce your request rate. The filter was triggered."}},
        errors.RateLimited,
    ),
    "a filter that passed": (400, {"error": {"message": "Unknown parameter: 'safety_settings'"}}, errors.BadRequest),
    "another refusal": (400, {"error": {"message": "Invalid value: 'content' must be a string"}}, errors.BadRequest),
    "a region": (403, {"error": {"message": "Country, region, or territory not supported"}}, errors.AuthFailed),
}

TOO_LARGE = {
    "OpenAI": "Request too large for gpt-4o in organization org-x on tokens per min (TPM): Limit 30000, Requested 45411. The input or output tokens must be reduced in order to run successfully.",
    "in other words": "Rate limit reached for x on tokens per min (TPM): Limit 6000, Used 0, Requested 12328.",
    "with separators": "TPM: Limit 30,000, Requested 45,411",
    "in words": "The prompt is too large for your tier; please reduce the length of the messages.",
}
TOO_SOON = {
    "OpenAI": "Rate limit reached for gpt-4o in organization org-x on tokens per min (TPM): Limit 30000, Used 29000, Requested 4541. Please try again in 7.082s.",
    "requests": "Rate limit reached for requests: Limit 3, Used 3, Requested 1.",
    "in words": "Too many requests, please slow down and reduce the frequency of your requests",
    "long context": "rate limit for long context length",
}


def kind_of(status: int, body: Any) -> type[errors.StatusError]:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    fault = read_fault(raw, status)
    assert fault is not None
    return classify(fault)


@each("name", FILTERED)
def test_a_filters_verdict_is_known_under_any_status(name: str) -> None:
    """It concerns one item, so it must not look like a refusal of the key or of the whole call."""
    assert kind_of(*FILTERED[name]) is errors.Filtered


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_no_verdict_is_not_taken_for_one(name: str) -> None:
    """A refused key, an overloaded filter and other refusals stay what they are."""
    status, body, kind = OTHERWISE[name]
    assert kind_of(status, body) is kind


@pytest.mark.parametrize("message", TOO_LARGE.values())
def test_a_429_about_the_size_of_the_request_is_no_limit_to_wait_for(message: str) -> None:
    """However long one waits, it will not fit; whatever the endpoint's headers say of trying again."""
    fault = read_fault(msgspec.json.encode({"error": {"message": message, "code": "rate_limit_exceeded"}}), 429)
    assert fault is not None
    error = to_error(fault, where="h:1", headers={"x-should-retry": "true"})
    assert (type(error), error.status, error.should_retry) == (errors.BadRequest, 429, None)
    assert "max_batch_tokens" in str(error)


@pytest.mark.parametrize("message", TOO_SOON.values())
def test_a_429_about_the_rate_is_one_to_wait_for(message: str) -> None:
    """Though it names the same figures."""
    assert kind_of(429, {"error": {"message": message}}) is errors.RateLimited


NO_CREDIT: dict[str, tuple[int, Any]] = {
    "Anthropic": (400, {"error": {"message": "Your credit balance is too low to access the Anthropic API.", "type": "invalid_request_error"}}),
    "SiliconFlow": (403, {"code": 30001, "message": "Sorry, your account balance is insufficient"}),
    "DashScope": (400, {"error": {"code": "Arrearage", "message": "Access denied, your account must be in good standing."}}),
    "Zhipu": (429, {"error": {"code": "1113", "message": "\u4f59\u989d\u4e0d\u8db3"}}),
    "xAI": (403, {"error": "Your team has either used all available credits or reached its monthly spending limit."}),
    "one-api": (403, {"error": {"message": "user quota is not enough", "code": "insufficient_user_quota"}}),
    "Moonshot": (429, {"error": {"message": "Your account is suspended due to insufficient balance", "type": "exceeded_current_quota_error"}}),
    "Fireworks": (412, {"error": {"message": "Account x is suspended, possibly due to reaching the monthly spending limit"}}),
    "MiniMax": (200, {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
    "Hugging Face": (402, {"error": "You have exceeded your monthly included credits for Inference Providers."}),
    "Gemini, for good": (429, [{"error": {"code": 429, "message": "You exceeded your current quota, please check your plan and billing details."}}]),
}  # fmt: skip
TOO_LONG: dict[str, tuple[int, Any]] = {
    "Anthropic": (400, {"error": {"message": "prompt is too long: 210000 tokens > 200000 maximum"}}),
    "Gemini": (400, [{"error": {"code": 400, "message": "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."}}]),
    "xAI": (400, {"error": "This model's maximum prompt length is 131072 but the request contains 537812 tokens."}),
    "Mistral": (400, {"object": "error", "message": "Prompt contains 50000 tokens, too large for model with 32768 tokens", "code": 3051}),
    "DashScope": (400, {"error": {"code": "invalid_parameter_error", "message": "Range of input length should be [1, 30720]"}}),
    "TGI": (422, {"error": "Input validation error: `inputs` must have less than 1024 tokens. Given: 1234", "error_type": "validation"}),
    "Moonshot": (400, {"error": {"message": "Invalid request: Your request exceeded model token limit: 8192"}}),
    "Bedrock": (400, {"message": "Input is too long for requested model."}),
    "Copilot": (400, {"error": {"message": "prompt token count of 130000 exceeds the limit of 128000", "code": "x"}}),
    "Groq": (400, {"error": {"message": "Please reduce the length of the messages or completion."}}),
    "OpenRouter": (400, {"error": {"message": "Provider returned error", "metadata": {"raw": '{"error":{"message":"input is too long"}}'}}}),
}  # fmt: skip
TRANSIENT: dict[str, tuple[int, Any, type[errors.StatusError]]] = {
    **{f"status {status}": (status, {"error": "later"}, errors.ServerError) for status in (408, 409, 424, 425, 498, 499, 529)},
    "OpenAI, which names billing": (429, {"error": {"message": "Rate limit reached for m. Please try again in 6s. Visit https://x/account/billing to add a payment method."}}, errors.RateLimited),
    "Gemini, for a minute": (429, [{"error": {"message": "You exceeded your current quota, please check your plan and billing details.", "details": [{"retryDelay": "31s"}]}}], errors.RateLimited),
    "Google, as 403": (403, {"error": {"code": 403, "message": "User Rate Limit Exceeded", "status": "rateLimitExceeded"}}, errors.RateLimited),
    "Bedrock, as 400": (400, {"message": "slow", "code": "ThrottlingException"}, errors.RateLimited),
    "MiniMax, as 200": (200, {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "later"}}, errors.RateLimited),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CREDIT)
def test_an_account_without_credit_is_told_whatever_the_status(name: str) -> None:
    """Or a batch would be halved, and the calls of all callers go on."""
    assert kind_of(*NO_CREDIT[name]) is errors.QuotaExhausted


def test_what_an_item_says_about_credit_stops_nobody() -> None:
    """An endpoint that echoes a text must not open the breaker for all callers."""
    said = msgspec.json.encode({"error": {"message": "Unreadable: my credit balance is too low"}})
    fault = read_fault(said, 400)
    assert fault is not None
    assert (
        type(to_error(fault, where="h", headers={}, asked=["Help, my credit balance is too low"])) is errors.BadRequest
    )
    assert type(to_error(fault, where="h", headers={}, asked=["Help"])) is errors.QuotaExhausted


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_prompt_that_is_too_long_is_told_in_every_vendors_words(name: str) -> None:
    assert kind_of(*TOO_LONG[name]) is errors.ContextTooLong


@pytest.mark.parametrize("name", TRANSIENT)
def test_what_may_pass_later_is_transient(name: str) -> None:
    status, body, kind = TRANSIENT[name]
    assert kind_of(status, body) is kind
