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
