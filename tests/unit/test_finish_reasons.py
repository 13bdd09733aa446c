"""Every vendor's word for why a model stopped is read as one of five meanings, and an unknown one as the harmless one."""

from __future__ import annotations

import pytest
from helpers import each
from hypothesis import given
from hypothesis import strategies as st

from microbatch.transports.reply_fields import read_finish

WORDS = {
    "stop": [
        *(
            "stop",
            "STOP",
            "eos",
            "eos_token",
            "EOS_TOKEN",
            "end_turn",
            "stop_sequence",
            "StopSequence",
            "stop-sequence",
            "COMPLETE",
        ),
        *(
            "completed",
            "FINISH_REASON_STOP",
            "FinishReason.STOP",
            "finishReason.stop",
            "eosFound",
            "stopStringFound",
            "normal",
            "endoftext",
        ),
        *("end_of_turn", "done", " stop ", "natural stop"),
    ],
    "length": [
        *(
            "length",
            "LENGTH",
            "max_tokens",
            "MAX_TOKENS",
            "maxTokens",
            "max_output_tokens",
            "model_length",
            "token_limit",
            "limit",
        ),
        *(
            "contextLengthReached",
            "maxPredictedTokensReached",
            "model_context_window_exceeded",
            "ERROR_LIMIT",
            "maximum_tokens",
        ),
        *("FINISH_REASON_MAX_TOKENS", "token_limit_reached", "output_truncated", "too_long_context"),
    ],
    "content_filter": [
        *(
            "content_filter",
            "CONTENT_FILTER",
            "content-filter",
            "safety",
            "SAFETY",
            "IMAGE_SAFETY",
            "sensitive",
            "refusal",
            "RECITATION",
        ),
        *(
            "PROHIBITED_CONTENT",
            "BLOCKLIST",
            "SPII",
            "guardrail_intervened",
            "content_filtered",
            "ERROR_TOXIC",
            "MODEL_ARMOR",
        ),
        *("blocked_by_safety_filter", "policy_violation_detected", "content_filter_error"),
    ],
    "tool_calls": ["tool_calls", "TOOL_CALL", "tool_use", "function_call", "toolCalls", "function-call"],
    "broken": [
        *(
            "error",
            "ERROR",
            "abort",
            "cancelled",
            "canceled",
            "insufficient_system_resource",
            "network_error",
            "timeout",
            "USER_CANCEL",
        ),
        *(
            "OTHER",
            "MALFORMED_FUNCTION_CALL",
            "UNEXPECTED_TOOL_CALL",
            "unload",
            "modelUnloaded",
            "pause_turn",
            "not_finished",
            "time_limit",
        ),
        *(
            "upstream_error",
            "preempted_by_scheduler",
            "request_cancelled_by_server",
            "stopped_by_error",
            "quux",
            "\u505c\u6b62",
            "1",
        ),
    ],
}


@each(("meaning", "word"), [(meaning, word) for meaning, words in WORDS.items() for word in words])
def test_a_word_is_read_in_any_spelling(meaning: str, word: str) -> None:
    """Case, separators and prefixes make no difference."""
    assert read_finish(word) == meaning


@pytest.mark.parametrize(
    "nothing", [None, "", "null", "None", "FINISH_REASON_UNSPECIFIED", "FinishReason.unspecified", {}, {"type": None}]
)
def test_nothing_said_is_nothing_said(nothing: object) -> None:
    """A stream says so with every chunk but the last."""
    assert read_finish(nothing) is None


@pytest.mark.parametrize("value", [1, 2.0, True, [], ["stop"]])
def test_what_is_no_word_counts_as_broken_off(value: object) -> None:
    """It says that something has ended, and not how."""
    assert read_finish(value) == "broken"


def test_an_object_is_read_by_its_type() -> None:
    """SGLang's own API has it so."""
    assert read_finish({"type": "stop", "matched": 2}) == "stop"


@given(st.text())
def test_any_text_has_a_meaning_or_none(word: str) -> None:
    """No word raises."""
    assert read_finish(word) in {None, *WORDS}
