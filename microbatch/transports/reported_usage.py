"""Normalisation of the tokens that endpoints report under different names.

Sources, beside OpenAI's chat completions: the Responses API and Anthropic (`input_tokens`, `output_tokens`, `output_tokens_details`,
`cache_creation_input_tokens`), Perplexity (`reasoning_tokens` beside the sums), DeepSeek (`prompt_cache_hit_tokens`), Moonshot
(`cached_tokens`, and the whole object inside the choice), Groq (`x_groq.usage` at the end of a stream), Gemini
(`thoughts_token_count`, and the names of `usageMetadata`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from microbatch.messages import Usage
from microbatch.transports.lenient import as_object

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROMPT: Final = ("prompt_tokens", "input_tokens", "prompt_token_count", "promptTokenCount")
_COMPLETION: Final = ("completion_tokens", "output_tokens", "candidates_token_count", "candidatesTokenCount")
_CACHED: Final = (
    *("cached_tokens", "cache_read_input_tokens", "prompt_cache_hit_tokens"),
    *("cached_content_token_count", "cachedContentTokenCount"),
)
_CACHE_WRITE: Final = ("cache_write_tokens", "cache_creation_input_tokens", "cache_creation_tokens")
_REASONING: Final = ("reasoning_tokens", "thinking_tokens", "thoughts_token_count", "thoughtsTokenCount")
_TOTAL: Final = ("total_tokens", "total_token_count", "totalTokenCount")
_PROMPT_DETAILS: Final = ("prompt_tokens_details", "input_tokens_details")
_COMPLETION_DETAILS: Final = ("completion_tokens_details", "output_tokens_details")


def read_usage(*reported: Any) -> Usage | None:
    """Return the first of *reported* (JSON values from the places of usage objects) that counts any tokens, or None."""
    for each in reported:
        fields = as_object(each)
        prompt, completion = _first(_PROMPT, fields), _first(_COMPLETION, fields)
        reasoning = _first(_REASONING, fields, *(as_object(fields.get(name)) for name in _COMPLETION_DETAILS))
        if not (prompt or completion or reasoning):
            continue
        details = [as_object(fields.get(name)) for name in _PROMPT_DETAILS]
        # xAI and Gemini count reasoning beside the completion, OpenAI and most others within it.
        if reasoning and (reasoning > completion or _first(_TOTAL, fields) == prompt + completion + reasoning):
            completion += reasoning
        return Usage(
            prompt,
            completion,
            _first(_CACHED, *details, fields),
            cache_write_tokens=_first(_CACHE_WRITE, *details, fields),
            reasoning_tokens=reasoning,
        )
    return None


def _first(names: Sequence[str], *objects: dict[str, Any]) -> int:
    """Return the first count above zero under one of *names* in one of *objects*, or 0."""
    return next((count for each in objects for name in names if (count := _count(each.get(name)))), 0)


def _count(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:  # noqa: PLR2004 (below 2**53)
        value = int(value)
    return int(value) if isinstance(value, int | float) and 0 < value < 2**53 else 0
