"""The request parameters that may be combined: those that do to each of several answers what they do to one.

A parameter that acts on a reply as a whole (a grammar, a stop sequence, a penalty on repeated words, `n`) would act on all answers of a
combined reply together. There are more of those than anyone can list, so the list is of the others.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

# fmt: off
HARMLESS: Final = frozenset({
    # sampling of each token
    "temperature", "top_p", "top_k", "top_a", "min_p", "typical_p",
    # how much a model thinks: OpenAI; OpenRouter; Groq; Anthropic, DeepSeek, Z.ai; DashScope; vLLM, SGLang; Ollama; Gemini
    "reasoning_effort", "verbosity", "reasoning", "include_reasoning", "reasoning_format", "thinking", "enable_thinking",
    "thinking_budget", "chat_template_kwargs", "separate_reasoning", "think", "thinking_config",
    # who answers, and at what price
    "provider", "models", "fallbacks", "route", "service_tier", "priority", "keep_alive", "lora_path", "id_slot",
    # prefix caches
    "prompt_cache_key", "prompt_cache_retention", "cached_content", "cache_prompt", "cache_salt",
    # what is recorded
    "store", "user", "metadata", "tags", "session_id", "usage",
    # for safety, of OpenAI, Gemini and Mistral
    "safety_identifier", "safety_settings", "safe_prompt",
})  # fmt: skip
"""Parameters of the vendors named that may be combined."""
# fmt: on

DEFAULTS: Final[Mapping[str, tuple[object, ...]]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "early_stopping": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logprobs": (False,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (False,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
}
"""Values of other parameters that only spell out what holds without them."""

NESTED: Final = frozenset({"extra_body", "google"})
"""Objects that hold parameters, as Gemini's compatible endpoint has them: https://ai.google.dev/gemini-api/docs/openai."""

_EMPTY: Final[tuple[object, ...]] = (None, [], {}, (), "")
_NAME: Final = re.compile(r"[\w.:-]{1,64}")
ODD_NAME: Final = "another field"


def kept_alone(fields: Mapping[str, Any], harmless: Collection[str]) -> tuple[str, ...]:
    """Return the names of the *fields* that keep a request out of a combined prompt, where only *harmless* ones are combined."""
    found = dict.fromkeys(_harmful(fields, harmless))
    return tuple(found)


def _harmful(fields: Mapping[str, Any], harmless: Collection[str]) -> Iterator[str]:
    for name, value in fields.items():
        if name in harmless or is_default(name, value):
            continue
        if name in NESTED and isinstance(value, dict):
            yield from _harmful(value, harmless)
        else:
            yield shown_name(name)


def shown_name(name: str) -> str:
    """Return the *name* of a field as figures show it: callers may make up any."""
    return name if _NAME.fullmatch(name) else ODD_NAME


def is_default(name: str, value: Any) -> bool:
    """Return whether *value* says no more than leaving out the field *name*, which is no harmless one."""
    return value in _EMPTY or value in DEFAULTS.get(name, ())


def without_defaults(fields: Mapping[str, Any], harmless: Collection[str]) -> dict[str, Any]:
    """Return the *fields* of a request that may be combined, less those that say nothing: a null, an empty list of tools."""
    return {
        name: value
        for name, value in fields.items()
        if value is not None and (name in harmless or name in NESTED or not is_default(name, value))
    }
