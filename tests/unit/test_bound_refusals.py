"""What endpoints say when a limit on the reply is too high, in the words of many of them, and what is made of it."""

from __future__ import annotations

import json

import pytest
from helpers import each

from microbatch.messages import TokenLimits
from microbatch.protocols import ChatCall
from microbatch.transports.bound_refusals import lower, read_refusal, words_of
from microbatch.transports.capabilities import Capabilities

BOUND = 20_000

# The bound that is sent again, after each refusal of BOUND.
SAID = [
    (16_384, 400, "max_tokens is too large: 20000. This model supports at most 16384 completion tokens, whereas you provided 20000."),
    (16_384, 400, "Invalid 'max_output_tokens': integer above maximum value. Expected a value <= 16384, but got 20000 instead."),
    (8_192, 400, ("`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is less than the "
     "`context_window` for this model")),
    (8_192, 400, "max_tokens: 20000 > 8192, which is the maximum allowed number of output tokens for claude-3-5-sonnet-20241022"),
    (8_192, 400, "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]"),
    (2_000, 400, "<400> InternalError.Algo.InvalidParameter: Range of max_tokens should be [1, 2000]"),
    (8_192, 400, ("Unable to submit request because it has a maxOutputTokens value of 20000 but the supported range is from 1 "
     "(inclusive) to 8193 (exclusive). Update the value and try again.")),
    (4_096, 400, ("The maximum tokens you requested exceeds the model limit of 4096. Try again with a maximum tokens value that is "
     "lower than 4096.")),
    (4_096, 400, "too many tokens: max tokens must be less than or equal to 4096, the maximum output for this model - received 20000."),
    (4_096, 422, "max_tokens cannot exceed 4,096 for model llama-3.1-8b-instruct v1.2"),
    (6_692, 400, ("This model's maximum context length is 8192 tokens. However, you requested 21500 tokens (1500 in the messages, "
     "20000 in the completion). Please reduce the length of the messages or completion.")),
    (6_692, 400, ("'max_tokens' or 'max_completion_tokens' is too large: 20000. This model's maximum context length is 8192 tokens and "
     "your request has 1500 input tokens (20000 > 8192 - 1500).")),
    (6_692, 400, ("This model's maximum context length is 8192 tokens. However, you requested 20000 output tokens and your prompt "
     "contains at least 1500 input tokens, for a total of at least 21500 tokens.")),
    (6_692, 400, ("Requested token count exceeds the model's maximum context length of 8192 tokens. You requested a total of 21500 "
     "tokens: 1500 tokens from the input messages and 20000 tokens for the completion.")),
    (12_768, 400, ("This endpoint's maximum context length is 32768 tokens. However, you requested about 40000 tokens (20000 of text "
     "input, 20000 in the output). Please reduce the length of either one.")),
    (10_000, 400, "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000, decrease input length or `max_tokens`"),
    (2_768, 400, "Prompt contains 30000 tokens and 20000 draft tokens, too large for model with 32768 maximum context length"),
    (2_596, 422, ("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 1500 `inputs` tokens and 20000 "
     "`max_new_tokens`")),
    (5_000, 402, "This request requires more credits, or fewer max_tokens. You asked for 20000, but can only afford 5000."),
    (7_500, 429, ("Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 30411. The input or output tokens must "
     "be reduced in order to run successfully.")),
]  # fmt: skip


@each(("sent", "status", "message"), SAID)
def test_the_bound_is_lowered_to_what_the_endpoint_says_it_allows(sent, status, message):
    call = ChatCall(messages=(), bound=BOUND)
    said = read_refusal(message, status, BOUND)
    assert said is not None
    assert lower(call, said) is True
    assert call.bound == sent


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "max_tokens: out of range"),
        (400, "max_tokens\u53c2\u6570\u975e\u6cd5"),
        (400, "Your credit balance is too low to access the API."),
        (400, "Please reduce the length of the messages or completion."),
        (413, "context_length_exceeded"),
        (400, "Your request exceeded model token limit: 8192"),  # says the window, but not how long the prompt is
    ],
)
def test_without_a_number_to_go_by_nothing_is_lowered(status, message):
    call = ChatCall(messages=(), bound=BOUND)
    said = read_refusal(message, status, BOUND)
    assert said is not None
    assert lower(call, said) is None
    assert call.bound == BOUND


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens."),
        (400, "request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it"),
        (429, ("Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 60000. The input or output tokens must "
         "be reduced.")),
    ],
)  # fmt: skip
def test_a_prompt_that_is_too_large_by_itself_is_not_sent_again_with_a_lower_bound(status, message):
    call = ChatCall(messages=(), bound=BOUND)
    said = read_refusal(message, status, BOUND)
    assert said is not None
    assert lower(call, said) is False


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "prompt is too long: 210000 tokens > 200000 maximum"),
        (400, "Invalid prompt: your prompt was flagged as potentially violating our usage policy."),
        (400, "Invalid schema for response_format 'answers'"),
        (500, "max_tokens is too large: 20000"),
        (404, "The model `context-length-8k` does not exist"),
        (429, "Rate limit reached for requests per min (RPM): Limit 3, Used 3, Requested 1."),
        (429, "Too many requests for long context models"),
    ],
)
def test_other_refusals_are_not_about_the_bound(status, message):
    assert read_refusal(message, status, BOUND) is None


def test_a_refusal_for_the_pace_tells_the_limit_and_is_waited_out():
    said = read_refusal(
        "Rate limit reached for m on tokens per min (TPM): Limit 30000, Used 29000, Requested 21000. Please try again in 40s.",
        429,
        BOUND,
    )
    assert said == TokenLimits(per_minute=30_000)
    assert lower(ChatCall(messages=(), bound=BOUND), said) is False


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "Provider returned error", "metadata": {"raw": json.dumps({"error": {"message": "max_tokens > 9"}})}}},
        {"error": json.dumps({"error": {"message": "max_tokens > 9"}})},
        {"detail": [{"type": "x", "loc": ["body", "max_tokens"], "msg": "too large, at most 9", "input": "never this"}]},
        [{"error": {"details": [{"reason": "max_tokens > 9"}]}}],
    ],
)  # fmt: skip
def test_nested_words_are_found_and_echoes_of_the_request_are_not(body):
    words = words_of(json.dumps(body).encode())
    assert "max_tokens" in words
    assert "never this" not in words


# --- what the ladder remembers


def plan(ladder, call):
    return ladder.plan(call, ("http://x", "m", b""), 0.0, stream=False)


def test_a_caller_s_limit_goes_out_under_the_same_name_and_the_bound_stays_at_home():
    ladder = Capabilities()
    assert plan(ladder, ChatCall(messages=(), max_tokens=5, bound=BOUND)).bound is None
    assert plan(ladder, ChatCall(messages=(), bound=BOUND)).bound == BOUND
    assert "max_tokens" in plan(ladder, ChatCall(messages=(), bound=BOUND)).sent
    assert "max_tokens" not in plan(ladder, ChatCall(messages=())).sent


def test_a_bound_that_is_refused_without_a_number_is_dropped_for_that_call():
    ladder, call = Capabilities(), ChatCall(messages=(), bound=BOUND)
    assert ladder.bound_refused(plan(ladder, call), TokenLimits())
    assert call.bound is None


def test_a_bound_that_is_refused_again_and_again_is_dropped():
    ladder, call = Capabilities(), ChatCall(messages=(), bound=BOUND)
    for limit, left in ((9_000, 9_000), (8_000, 8_000), (7_000, None)):
        assert ladder.bound_refused(plan(ladder, call), TokenLimits(completion=limit))
        assert call.bound == left


def test_where_it_was_not_the_bound_it_is_not_blamed_again():
    ladder, call = Capabilities(), ChatCall(messages=(), bound=BOUND)
    ladder.bound_refused(plan(ladder, call), TokenLimits())
    assert not ladder.bound_refused(plan(ladder, call), TokenLimits()), "refused in the same words without it"
    other = ChatCall(messages=(), bound=BOUND)
    assert not ladder.bound_refused(plan(ladder, other), TokenLimits())
    assert other.bound == BOUND
    assert ladder.bound_refused(plan(ladder, other), TokenLimits(completion=16_384)), (
        "a number is worth a try all the same"
    )
