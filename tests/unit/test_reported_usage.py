"""Token counts are read under every name and from every place that endpoints use, and they stay whole when they are divided."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch import Usage
from microbatch.accounting.stats import divided
from microbatch.transports.reply_fields import read_usage
from microbatch.transports.reply_reader import ReplyReader

SPELLINGS: dict[str, tuple[dict[str, Any], Usage]] = {
    "OpenAI": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "total_tokens": 150,
            "prompt_tokens_details": {"cached_tokens": 64, "cache_write_tokens": 8},
            "completion_tokens_details": {"reasoning_tokens": 40},
        },
        Usage(100, 50, 64, cache_write_tokens=8, reasoning_tokens=40),
    ),
    "the Responses API's names": (
        {"input_tokens": 7, "output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 3}},
        Usage(7, 5, reasoning_tokens=3),
    ),
    "xAI: beside the completion": (
        {
            "prompt_tokens": 10,
            "completion_tokens": 2,
            "total_tokens": 312,
            "completion_tokens_details": {"reasoning_tokens": 300},
        },
        Usage(10, 302, reasoning_tokens=300),
    ),
    "xAI, more than half": (
        {
            "prompt_tokens": 10,
            "completion_tokens": 40,
            "total_tokens": 80,
            "completion_tokens_details": {"reasoning_tokens": 30},
        },
        Usage(10, 70, reasoning_tokens=30),
    ),
    "Perplexity: at top level": (
        {"prompt_tokens": 10, "completion_tokens": 90, "reasoning_tokens": 80},
        Usage(10, 90, reasoning_tokens=80),
    ),
    "Gemini": (
        {"promptTokenCount": 5, "candidatesTokenCount": 9, "thoughtsTokenCount": 20, "totalTokenCount": 34},
        Usage(5, 29, reasoning_tokens=20),
    ),
    "Gemini in snake case": (
        {"prompt_token_count": 5, "candidates_token_count": 9, "thoughts_token_count": 4, "total_token_count": 18},
        Usage(5, 13, reasoning_tokens=4),
    ),
    "Anthropic": (
        {"input_tokens": 5, "output_tokens": 9, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 2},
        Usage(5, 9, 2, cache_write_tokens=3),
    ),
    "DeepSeek": ({"prompt_tokens": 5, "completion_tokens": 9, "prompt_cache_hit_tokens": 4}, Usage(5, 9, 4)),
    "Moonshot": ({"prompt_tokens": 5, "completion_tokens": 9, "cached_tokens": 4}, Usage(5, 9, 4)),
    "counts as text": ({"prompt_tokens": "5", "completion_tokens": "9"}, Usage(5, 9)),
    "nonsense beside sound counts": (
        {
            "prompt_tokens": 5,
            "completion_tokens": None,
            "prompt_tokens_details": [],
            "completion_tokens_details": {"reasoning_tokens": -3},
        },
        Usage(5),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_vendors_spelling_is_read(name: str) -> None:
    """Wherever the vendor puts a count, it arrives under our name for it."""
    reported, usage = SPELLINGS[name]
    assert read_usage(reported) == usage


@pytest.mark.parametrize("nothing", [None, {}, [], "usage", {"prompt_tokens": 0}, {"prompt_tokens": "many"}, 7])
def test_what_counts_nothing_is_no_report(nothing: object) -> None:
    """An object without a count above zero is passed over for the next place."""
    assert read_usage(nothing) is None
    assert read_usage(nothing, {"prompt_tokens": 3}) == Usage(3)


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}},
        {"choices": [{"delta": {}, "usage": {"prompt_tokens": 5, "completion_tokens": 9}}]},
        {"choices": [], "x_groq": {"id": "r", "usage": {"prompt_tokens": 5, "completion_tokens": 9}}},
        {"choices": [{"delta": {"usage": {"prompt_tokens": 5, "completion_tokens": 9}}}]},
        {"choices": [], "token_usage": {"promptTokens": 5, "completionTokens": 9}},
        {"choices": [], "metadata": {"usage": {"inputTokens": 5, "outputTokens": 9}}},
        {"choices": [], "meta": {"billed_units": {"input_tokens": 5, "output_tokens": 9}}},
        {"choices": [{"delta": {}}], "timings": {"prompt_n": 5, "cache_n": 0, "predicted_n": 9}},
        {"choices": [], "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 9}},
    ],
)
def test_every_place_of_a_usage_object_is_looked_at(event: dict[str, Any]) -> None:
    """Groq and Moonshot put it elsewhere than OpenAI."""
    reader = ReplyReader()
    reader.event(msgspec.json.encode(event))
    assert reader.completion(None).usage == Usage(5, 9)


counts = st.integers(0, 10_000)


@given(
    usage=st.builds(Usage, counts, counts, counts, st.booleans(), counts, counts),
    weights=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=20),
)
def test_shares_add_up_to_the_whole(usage: Usage, weights: list[tuple[int, int]]) -> None:
    """No token of any kind is lost or made up when a call's usage is divided among its requests."""
    prompts, completions = zip(*weights, strict=True)
    assert sum(divided(usage, prompts, completions), Usage()) == usage


PARTS: dict[str, tuple[list[tuple[str, dict[str, Any] | None]], Usage]] = {
    "cumulative": ([("a", {"prompt_tokens": 5, "completion_tokens": n}) for n in range(1, 8)], Usage(5, 7)),
    "cumulative, not at each event": (
        [("a", {"prompt_tokens": 5, "completion_tokens": n}) for n in (0, 0, 4, 4, 4, 9)],
        Usage(5, 9),
    ),
    "estimated, and corrected at the end": (
        [*[("a", {"prompt_tokens": 5, "completion_tokens": n}) for n in (2, 4, 6)], ("", {"prompt_tokens": 5, "completion_tokens": 5})],
        Usage(5, 6),
    ),
    "its own part": (
        [*[("a", {"prompt_tokens": 0, "completion_tokens": 1})] * 6, ("", {"prompt_tokens": 5, "completion_tokens": 0})],
        Usage(5, 6),
    ),
    "its own part, of several tokens": ([("a", {"prompt_tokens": 5, "completion_tokens": n}) for n in (1, 3, 2, 3)], Usage(5, 9)),
    "the same at the end": ([("a", None)] * 3 + [("", {"prompt_tokens": 5, "completion_tokens": 9})] * 4, Usage(5, 9)),
    "prompt first": ([("", {"input_tokens": 5, "output_tokens": 1}), ("a", None), ("", {"output_tokens": 9})], Usage(5, 9)),
    "the model's whole answer once": ([("abc", {"prompt_tokens": 5, "completion_tokens": 9})], Usage(5, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_reports_of_parts_and_of_all_so_far_are_told_apart(name: str) -> None:
    """vLLM and xAI report what was used so far, Cloudflare what one event used."""
    events, usage = PARTS[name]
    reader = ReplyReader()
    for text, reported in events:
        data = {"choices": [{"index": 0, "delta": {"content": text}}]}
        reader.event(msgspec.json.encode(data if reported is None else {**data, "usage": reported}))
    assert reader.completion(None).usage == usage


@pytest.mark.parametrize(
    ("fields", "tier"),
    [
        ({"service_tier": "flex"}, "flex"),
        ({"service_tier": "Priority "}, "priority"),
        ({"service_tier": "default"}, None),
        ({"service_tier": "auto"}, None),
        ({"service_tier": "on_demand"}, None),
        ({"service_tier": ""}, None),
        ({"service_tier": None}, None),
        ({"service_tier": 7}, None),
        ({}, None),
        ({"usage": {"prompt_tokens": 1, "completion_tokens": 1, "service_tier": "batch"}}, "batch"),
        ({"usage": {"prompt_tokens": 1, "completion_tokens": 1, "service_tier": "standard"}}, None),
        ({"service_tier": "flex", "usage": {"prompt_tokens": 1, "service_tier": "batch"}}, "flex"),
    ],
)
def test_the_service_tier_is_read_streamed_or_not(fields, tier):
    whole, streamed = ReplyReader(), ReplyReader()
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}
    whole.whole(msgspec.json.encode({"choices": [choice], **fields}))
    assert whole.completion(None).service_tier == tier
    piece = {"index": 0, "delta": {"content": "Hi."}, "finish_reason": None}
    for event in ({"choices": [piece]}, {"choices": [piece], **fields}, {"choices": []}):
        streamed.event(msgspec.json.encode(event))
    assert streamed.completion(None).service_tier == tier
