"""Facts about models by their names and parameters: which of them reason, and how many tokens they generate at most.

Names are compared in lower case and without the part before the last slash ("openai/gpt-5-mini" is "gpt-5-mini"). What is missing
or wrong in these tables is learned from the endpoint's replies and refusals.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

REASONING_MODELS: Final = (
    r"o[134](?:-|$)",  # OpenAI
    r"gpt-5(?!.*chat)",
    r"gpt-oss",
    r"codex-mini",
    r"deepseek-(?:reasoner|r\d)",
    r".*\br1\b",  # DeepSeek's distilled models and others trained like them
    r"qwq",
    r"qwen3(?!.*(?:instruct|coder|embedding))",
    r"gemini-(?:2\.5|[3-9])",
    r"grok-(?:3-mini|[4-9])(?!.*non-reasoning)",
    r"kimi-k2-thinking",
    r"glm-(?:4\.[5-9]|z1|[5-9])",
    r"minimax-m\d",
    r"magistral",
    r"seed-oss",
    r"ernie-x\d",
    r"hunyuan-(?:t1|a13b)",
    r"exaone-deep",
    r"nemotron.*(?:ultra|super|nano)",
    r"sonar-(?:reasoning|deep)",
    r".*(?<!non-)(?<!no-)(?:reasoning|reasoner|thinking)",
)
"""Regular expressions that match the beginnings of the names of models that reason unless they are told not to."""

OUTPUT_LIMITS: Final = (
    (r"gpt-3\.5|gpt-4-turbo|gpt-4-\d{4}-(?:preview|vision)|gpt-4-vision|gpt-4o-2024-05-13", 4_096),
    (r"gpt-4(?:-\d{4}|-32k|$)", 8_192),
    (r"gpt-4o|gpt-5.*chat", 16_384),
    (r"gpt-4\.1", 32_768),
    (r"gpt-5", 128_000),
    (r"o1-preview", 32_768),
    (r"o1-mini", 65_536),
    (r"o[134](?:-|$)", 100_000),
    (r"claude-3-(?:opus|sonnet|haiku)", 4_096),
    (r"claude-3[-.]5", 8_192),
    (r"claude-(?:3[-.]7|sonnet|haiku)", 64_000),
    (r"claude-opus", 32_000),
    (r"gemini-(?:1\.5|2\.0)", 8_192),
    (r"gemini-(?:2\.5|[3-9])", 65_536),
    (r"deepseek-chat", 8_192),
    (r"deepseek-reasoner", 64_000),
)
"""Regular expressions that match the beginnings of models' names, and the most tokens that those generate; the first match counts."""

REASONING_ALLOWANCE: Final = 16_000
"""Tokens granted to a reasoning model for its thoughts, unless a parameter names more."""

_reasons = re.compile("|".join(REASONING_MODELS)).match
_limits = [(re.compile(pattern).match, limit) for pattern, limit in OUTPUT_LIMITS]

_OFF: Final = frozenset({None, False, "none", "off", "disabled"})
_SWITCHES: Final = ("reasoning", "reasoning_effort", "enable_thinking", "thinking", "think", "enable_reasoning")
_BUDGETS: Final = ("budget_tokens", "thinking_budget")


def reasons_by_name(model: str | None) -> bool:
    """Return whether *model* is known to reason."""
    return model is not None and _reasons(_bare(model)) is not None


def output_limit(model: str | None) -> int | None:
    """Return the most tokens that *model* is known to generate, or None."""
    return None if model is None else next((limit for match, limit in _limits if match(_bare(model))), None)


def asked_reasoning(params: Mapping[str, Any]) -> bool | None:
    """Return whether request parameters ask for reasoning; None if none is about reasoning."""
    switches = [_is_on(value) for name, value in _with_template(params) if name in _SWITCHES]
    if any(switches) or reasoning_budget(params):
        return True
    return False if switches else None


def reasoning_budget(params: Mapping[str, Any]) -> int:
    """Return the tokens of thought that request parameters ask for by number; 0 if they name none."""
    budgets = [value for name, value in _with_template(params) if name in _BUDGETS]
    for name, value in _with_template(params):
        if name in ("reasoning", "thinking") and isinstance(value, dict):
            budgets += [value.get(name) for name in (*_BUDGETS, "max_tokens")]
    return max((value for value in budgets if type(value) is int), default=0)


def _bare(model: str) -> str:
    return model.rpartition("/")[2].lower()


def _with_template(params: Mapping[str, Any]) -> list[tuple[str, Any]]:
    template = params.get("chat_template_kwargs")
    return [*params.items(), *(template.items() if isinstance(template, dict) else ())]


def _is_on(value: Any) -> bool:
    """Return whether the value of a parameter about reasoning turns it on."""
    if isinstance(value, dict):
        return all(_is_on(value[name]) for name in ("type", "enabled", "effort") if name in value)
    return not isinstance(value, str | bool | int | None) or value not in _OFF
