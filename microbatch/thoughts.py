r"""Thoughts: text in which a model reasons before it answers, told apart from the answer.

Models that reason put their thoughts between two marks, and servers without a parser for them leave both in the text, or only the
second: the first one is then the end of the prompt (deepseek-ai/DeepSeek-R1#352, ggml-org/llama.cpp#11861). Thoughts hold drafts of
answers, under the right ids and in the right form, so everything before the end of the last thought is no answer.

The marks, and who uses them: `<think>` DeepSeek, Qwen, GLM, Nemotron and most; `<thinking>` and `<reflection>` Claude's prompts and
Reflection 70B; `<thought>` EXAONE and Gemini; `<reasoning>` Reka; `<scratchpad>` prompts after Anthropic's guide; `<seed:think>`
Seed-OSS; `[THINK]` Magistral; `\u25c1think\u25b7` Kimi; `<|begin_of_thought|>` OpenThinker and Sky-T1; `<|START_THINKING|>` Command A;
`<|inner_prefix|>` Apertus; `<unused94>` MedGemma; `<|channel|>analysis` and `<|channel|>final<|message|>` gpt-oss, which is
`analysis` and `assistantfinal` where a server has dropped the special tokens; "Here is my thought process:" and "Here is my response:"
Granite 3.2.

A mark inside a JSON string is a part of an answer, and never counts.
"""

from __future__ import annotations

import json
import re
from typing import Final

_TAGS: Final = r"(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|seed:think|antml:thinking)"
_BEGINS: Final = (
    rf"<{_TAGS}>|\[THINK\]|\u25c1think\u25b7|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|inner_prefix\|>|<unused94>"
    r"|<\|channel\|>(?:analysis|commentary)\b|Here(?:'s| is) my thought process:"
)
_FINAL: Final = r"<\|channel\|>final ?(?:<\|constrain\|> ?json ?)?<\|message\|>|\bassistantfinal"
_ENDS: Final = (
    rf"</{_TAGS}>|\[/THINK\]|\u25c1/think\u25b7|<\|end_of_thought\|>|<\|END_THINKING\|>|<\|inner_suffix\|>|<unused95>"
    rf"|{_FINAL}|Here(?:'s| is) my response:"
)
MARK: Final = re.compile(f"(?i:({_BEGINS})|{_ENDS})")
"""A mark; its first group is there if it begins a thought."""

MARK_CHARS: Final = 64
"""No mark is longer."""

_LEADING: Final = re.compile(rf"\s*(?:(?i:(?P<mark>{_BEGINS}))|analysis(?=\W|[A-Z]))")
_END: Final = re.compile(f"(?i:{_ENDS})")
_END_OF_ANALYSIS: Final = re.compile(_FINAL)
# Code is skipped: an answer may show a mark in it.
_CODE_OR_MARK: Final = re.compile(rf"(?is:```.*?```|`[^`\n]*`|(?P<begin>{_BEGINS})|(?P<end>{_ENDS}))")
_BRACKET_OR_MARK: Final = re.compile(rf"(?i:(?P<begin>{_BEGINS})|{_ENDS}|(?P<bracket>[{{\[]))")
_VALUE_AT_ONCE: Final = re.compile(r'\s*(?:```\w*\s*)?(?=")')
_NO_VALUE: Final = " \t\r\n`"
_scan: Final = json.JSONDecoder().raw_decode

# Brackets in prose that turn out to begin no JSON; each may have been read to the end of the text.
_MAX_TRIES: Final = 256


def after_leading_thought(text: str) -> str:
    """Return a plain text less the thought before it.

    Only what is sure to be one is taken away: the text begins with a mark that begins a thought, or its first mark is one that ends
    a thought and stands alone on its line. Marks in code are a part of the text.
    """
    rest = text
    while (begin := _LEADING.match(rest)) is not None and (end := _end_of(begin, rest)) is not None:
        rest = rest[end.end() :]
    if rest is not text:
        return rest.lstrip()
    for found in _CODE_OR_MARK.finditer(text):
        if found["begin"]:
            break
        if found["end"]:
            before, after = text[: found.start()].rpartition("\n")[2], text[found.end() :].partition("\n")[0]
            return text[found.end() :].lstrip() if not before.strip() and not after.strip() else text
    return text


def is_unfinished_thought(text: str) -> bool:
    """Return whether a plain text is a thought that has begun and not ended."""
    begin = _LEADING.match(text)
    return begin is not None and begin["mark"] is not None and _end_of(begin, text) is None


def after_thoughts(text: str) -> str:
    """Return the part of a text that its JSON value is to be looked for in: what follows the last thought before it."""
    if MARK.search(text) is None:
        return text
    start = 0
    kept: str | None = None  # what stands before a thought that has begun and not ended
    pos = _past_string(text, 0)
    tries = 0
    while (found := _BRACKET_OR_MARK.search(text, pos)) is not None:
        pos = found.end()
        if found["bracket"]:
            try:
                _, pos = _scan(text, found.start()) if tries < _MAX_TRIES else (None, pos)
            except (ValueError, RecursionError):
                tries += 1
        elif found["begin"]:
            if kept is None:
                kept = text[start : found.start()]
        else:
            before = text[start : found.start()] if kept is None else kept
            start, kept = pos, None
            if not text[pos:].strip(_NO_VALUE):
                return before
            pos = _past_string(text, pos)
    return kept if kept is not None and kept.strip(_NO_VALUE) else text[start:]


def _end_of(begin: re.Match[str], text: str) -> re.Match[str] | None:
    """Return the mark that ends the thought which *begin* begins: its own, or else the first one."""
    mark = begin["mark"]
    if mark is None:
        return _END_OF_ANALYSIS.search(text, begin.end())
    own = re.compile(re.escape(f"</{mark[1:]}"), re.IGNORECASE) if mark.startswith("<") and mark.endswith(">") else _END
    return own.search(text, begin.end()) or _END.search(text, begin.end())


def _past_string(text: str, pos: int) -> int:
    """Return the place behind a JSON string that is the value at *pos*, or *pos*."""
    at = _VALUE_AT_ONCE.match(text, pos)
    if at is None:
        return pos
    try:
        return _scan(text, at.end())[1]
    except ValueError:
        return pos
