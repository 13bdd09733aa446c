"""Normalisation of what a reply says beside its text: why the model stopped, the tokens that it used, and their service tier.

Finish reasons have one of five meanings. Words are compared in lower case, with underscores between their parts, whatever they came
with (`STOP`, `MAX_TOKENS`, `FinishReason.SAFETY`, `maxPredictedTokensReached`, `content-filter`). Sources: the API references of OpenAI
(chat completions and Responses), Anthropic, Google, Amazon Bedrock, Azure, Mistral, Cohere, DeepSeek, Zhipu, Baidu, Tencent, IBM
watsonx, Aleph Alpha, AI21 and Together, and the code of vLLM, SGLang, TensorRT-LLM, TGI, llama.cpp, Ollama and LM Studio. Most words
are read by their parts ("token_limit_reached" means the limit). If no part is known, the reply counts as broken off: asking again costs
a call, but returning a text that was cut as if it were complete costs more.

Sources of the names of token counts, beside OpenAI's chat completions: the Responses API and Anthropic (`input_tokens`,
`output_tokens`, `output_tokens_details`, `cache_creation_input_tokens`), Perplexity (`reasoning_tokens` beside the sums), DeepSeek
(`prompt_cache_hit_tokens`), Moonshot (`cached_tokens`, and the whole object inside the choice), Groq (`x_groq.usage` at the end of a
stream), Gemini (`thoughts_token_count`, and the names of `usageMetadata`), Bedrock (`inputTokens`, `inputTokenCount`), the AI SDK
(`promptTokens`), llama.cpp (`timings.prompt_n` without those that were cached in `cache_n`), Cohere
(`meta.billed_units`).
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Literal

from microbatch.messages import Usage
from microbatch.transports.lenient import as_object

if TYPE_CHECKING:
    from collections.abc import Sequence

Finish = Literal["stop", "length", "content_filter", "tool_calls", "broken"]
"""The meanings. "broken": the reply was broken off for a reason that may be transient."""

# OpenAI's own words, and those of others that their parts do not tell.
_WORDS: Final[dict[Finish, str]] = {
    "stop": "stop stop_limit eog eog_token eom end end_id endoftext succeeded normal word ok",
    "length": "length error_limit incomplete",
    "content_filter": "content_filter recitation image_recitation language spii model_armor risk high_risk copyright",
    "tool_calls": "tool_calls function_call action",
    "broken": "user_stopped time_limit incomplete_stream too_many_tool_calls",
}
_MEANING: Final[dict[str, Finish]] = {word: finish for finish, words in _WORDS.items() for word in words.split()}

# For other words, the first pattern that matches: an error about a limit is an error, a filter that stopped something a filter.
_PARTS: Final[dict[Finish, str]] = {
    "content_filter": "filter|safe|sensitiv|polic|prohibit|blocklist|blocked|moderat|guardrail|refus|toxic|flagged|violat|censor",
    "broken": "err|fail|abort|cancel|interrupt|preempt|time_?out|malform|unexpected|overload|unavail|disconn|resource|unload|not_",
    "length": "length|max|token_limit|limit|context|trunc|budget",
    "tool_calls": "tool|function",
    "stop": "stop|eos|eot|end_of|end_turn|complet|finish|done|success",
}
_NOTHING: Final = frozenset({"null", "none", "unspecified"})
_PREFIX: Final = re.compile(r"^(?:finish_?reason|stop_?reason)[._]+(?=.)")
_CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_BETWEEN: Final = re.compile(r"[^a-z0-9]+")


def read_finish(value: Any) -> Finish | None:
    """Return the meaning of *value*, the JSON value of `finish_reason`, or None if the endpoint gives none.

    An object, as in SGLang's own API, is read by its `type`.
    """
    if isinstance(value, dict):
        value = as_object(value).get("type")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        return "broken"
    word = _CAMEL.sub("_", value) if not value.isupper() else value
    word = _PREFIX.sub("", _BETWEEN.sub("_", word.lower()).strip("_"))
    if word in _NOTHING:
        return None
    if word in _MEANING:
        return _MEANING[word]
    for finish, pattern in _PARTS.items():
        if re.search(pattern, word):
            return finish
    return "broken"


_COUNTS: Final = {
    "prompt": (
        "prompt_tokens input_tokens prompt_token_count promptTokenCount promptTokens inputTokens inputTokenCount"
    ),
    "completion": (
        "completion_tokens output_tokens candidates_token_count candidatesTokenCount completionTokens outputTokens outputTokenCount "
        "predicted_n generated_tokens"
    ),
    "cached": (
        "cached_tokens cache_read_input_tokens prompt_cache_hit_tokens cached_content_token_count cachedContentTokenCount "
        "cacheReadInputTokens cachedInputTokens cache_n"
    ),
    "cache_write": "cache_write_tokens cache_creation_input_tokens cache_creation_tokens cacheWriteInputTokens",
    "reasoning": "reasoning_tokens thinking_tokens thoughts_token_count thoughtsTokenCount reasoningTokens",
    "total": "total_tokens total_token_count totalTokenCount totalTokens",
    "prompt_details": "prompt_tokens_details input_tokens_details",
    "completion_details": "completion_tokens_details output_tokens_details",
}
_FEW: Final = 3  # reports that are enough to tell a count that does not change
_NAMES: Final = {count: names.split() for count, names in _COUNTS.items()}


def read_usage(*reported: Any) -> Usage | None:
    """Return the first of *reported* (JSON values from the places of usage objects) that counts any tokens, or None."""
    for each in reported:
        fields = as_object(each)
        if not fields:
            continue
        fields = as_object(fields.get("billed_units")) or fields
        prompt, completion = _first("prompt", fields), _first("completion", fields)
        prompt = prompt or _count(fields.get("prompt_n")) + _count(fields.get("cache_n"))
        reasoning = _first("reasoning", fields, *_objects("completion_details", fields))
        if not (prompt or completion or reasoning):
            continue
        details = _objects("prompt_details", fields)
        # xAI and Gemini count reasoning beside the completion, OpenAI and most others within it.
        if reasoning and (reasoning > completion or _first("total", fields) == prompt + completion + reasoning):
            completion += reasoning
        return Usage(
            prompt,
            completion,
            _first("cached", *details, fields),
            cache_write_tokens=_first("cache_write", *details, fields),
            reasoning_tokens=reasoning,
        )
    return None


def read_prompt_usage(*reported: Any) -> Usage | None:
    """Return what `read_usage` does for a call that generates nothing, whose sum alone may be reported (Voyage, DashScope)."""
    usage = read_usage(*reported)
    if usage is None or not usage.prompt_tokens:
        total = next((total for each in reported if (total := _first("total", as_object(each)))), 0)
        return Usage(total) if total else usage
    return usage


def total_usage(reports: Sequence[tuple[Usage, bool]]) -> Usage | None:
    """Return the usage of a reply from what its parts report, in order, each with whether text came with it; None for no report.

    Reports are cumulative (vLLM's `continuous_usage_stats`, xAI), or each counts its own part only (cloudflare/ai#651). The latter is
    known by a count that falls from one part of the text to the next, or that never changes.
    """
    if not reports:
        return None
    counts = [usage.completion_tokens for usage, with_text in reports if with_text]
    falls = any(later < earlier for earlier, later in pairwise(counts))
    still = len(counts) >= _FEW and len(set(counts)) == 1
    over = sum if falls or still else max
    usages = [usage for usage, _ in reports]
    return Usage(
        max(usage.prompt_tokens for usage in usages),
        over(usage.completion_tokens for usage in usages),
        max(usage.cached_tokens for usage in usages),
        cache_write_tokens=max(usage.cache_write_tokens for usage in usages),
        reasoning_tokens=over(usage.reasoning_tokens for usage in usages),
    )


_USUAL_TIERS: Final = frozenset({"", "auto", "default", "on_demand", "standard", "standard_only"})
"""Names of the usual tier: of OpenAI, Groq and Anthropic."""


def read_tier(tier: Any, usage: Any) -> str | None:
    """Return the service tier of a reply in lower case; None if it is the usual one, or none is reported.

    *tier* is the JSON value of `service_tier`, and *usage* the usage object, where Anthropic reports it.
    """
    if tier is None and usage is not None:
        tier = as_object(usage).get("service_tier")
    word = tier.strip().lower() if isinstance(tier, str) else ""
    return None if word in _USUAL_TIERS else word


def _objects(name: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [as_object(fields.get(each)) for each in _NAMES[name]]


def _first(name: str, *objects: dict[str, Any]) -> int:
    """Return the first count above zero under one of the names of *name* in one of *objects*, or 0."""
    return next((count for each in objects for key in _NAMES[name] if (count := _count(each.get(key)))), 0)


def _count(value: Any) -> int:
    try:
        count = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0
    return int(count) if 0 < count < 2**53 else 0
