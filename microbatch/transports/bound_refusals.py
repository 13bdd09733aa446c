"""Refusals of the batcher's own bound on a reply (`ChatCall.bound`).

Endpoints check the limit on a reply before they generate: against the model's output limit, its context window less the prompt,
tokens per minute, or credit. Which of these it was, and how many tokens would have been allowed, is usually in the message.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.messages import TokenLimits
from microbatch.transports.lenient import as_object

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.protocols import ChatCall

STATUSES: Final = frozenset({200, 400, 402, 403, 413, 422, 429})

_ABOUT: Final = re.compile(
    r"(?i)max[_ ]?(?:completion_?|output_?|new_?)?tokens|length of .{0,30}\bcompletion\b|maximum (?:output |completion )?tokens|"
    r"\b(?:completion|output|generated) tokens|\btokens?\b.{0,20}\bcompletion\b|"
    r"context.{0,10}(?:length|window|size|limit)|token limit|\bcredits?\b|\bafford"
)
# Of a 429, which is usually about the rate: this request is too large by itself.
_TOO_LARGE: Final = re.compile(r"(?i)\b(?:request|prompt|input)\b.{0,20}\btoo (?:large|long)|must be reduced")

_N: Final = r"[`'\"\[(]?(\d[\d,_]*)"
_PER_MINUTE: Final = re.compile(rf"(?i)tokens? per min.{{0,40}}?limit:? {_N},? (?:used:? \d+,? )?requested:? {_N}")
_AFFORDABLE: Final = re.compile(rf"(?i)afford (?:up to )?{_N}")
_CONTEXT: Final = (
    rf"\d \+ \d[\d,_]* > {_N}",
    rf"context[ _-]?(?:length|limit|window|size)\D{{0,40}}?{_N}",
    rf"{_N}(?: tokens?)? (?:is the )?(?:maximum|max) context",
    rf"max_new_tokens\S? must be <= {_N}",
    rf"(?:model )?token limit:? {_N}",
    rf"current length is \d+ while limit is {_N}",
)
_PROMPT: Final = (
    rf"{_N} \+ \d[\d,_]* > \d",
    rf"{_N}(?: tokens?)? (?:(?:in|from|of) (?:the )?(?:input )?(?:messages|prompt|input|text input)|[`'\"]?inputs?[`'\"]? tokens)",
    rf"(?:messages resulted in|prompt contains)(?: at least)? {_N}",
    rf"\brequest \({_N} tokens",
)
_COMPLETION: Final = (
    rf"at most {_N} (?:completion|output)",
    rf"tokens\S* (?:must|should|can|has to) (?:not exceed|(?:not )?be [a-z <=]{{1,30}}) {_N}",
    r"\brange\b[^\[]{0,40}\[\s*\d+\s*,\s*(\d[\d,_]*)",
    rf"max\w*tokens\S* \d+ > {_N}",
    rf"(?:limit|maximum|max)(?: allowed)?(?: value| number)?(?: of| is|:)? {_N}",
)
_EXCLUSIVE: Final = re.compile(rf"(?i)to {_N} \(exclusive\)")
_NUMBER: Final = re.compile(r"(?<![\w.])\d[\d,_]*(?![\w.]*\w)")

# Fields of an error body that hold the endpoint's words, and not an echo of the request (as `input` in pydantic's errors).
_MESSAGES: Final = re.compile(
    "errors?|message|msg|error_msg|details?|metadata|raw|reason|description|title|fieldViolations"
)
_WORDS: Final = re.compile(f"{_MESSAGES.pattern}|code|type|param|loc|field")
_MAX_NESTED: Final = 8
_MAX_QUOTED: Final = 16_384

_CONTENT_TOO_LARGE: Final = 413
_TOO_MANY: Final = 429
_LEAST: Final = 16  # a smaller number in a message is a version, a position or a count of something else


def read_refusal(message: str, status: int, bound: int) -> TokenLimits | None:
    """Return the token limits in the message of a refusal of *bound*; None if it is not about the length of the reply."""
    if status not in STATUSES:
        return None
    found = _PER_MINUTE.search(message)
    if status == _TOO_MANY and found is None:
        return None
    if found is not None and status in (_CONTENT_TOO_LARGE, _TOO_MANY):
        limit, requested = map(_value, found.groups())
        # A request that is too large never passes; one that came too soon does, and with a lower bound would have passed sooner.
        counted = bound if requested >= bound else 0  # else the endpoint does not count it
        prompt = requested - counted if _TOO_LARGE.search(message) else None
        return TokenLimits(per_minute=limit, prompt=prompt)
    if not _ABOUT.search(message):
        return None
    if found := _AFFORDABLE.search(message):
        return TokenLimits(affordable=_value(found[1]))
    context = _first(_CONTEXT, message)
    if context is not None:
        return TokenLimits(context=context, prompt=_first(_PROMPT, message))
    return TokenLimits(completion=_completion(message, bound))


def words_of(raw: bytes) -> str:
    """Return the words in an error body, nested ones of a gateway included, without what echoes the request."""
    return " ".join(_words(raw.decode("utf-8", "replace"), _WORDS, 0))


def messages_in(value: Any) -> str:
    """Return the sentences in a JSON value of an error, one a line."""
    return "\n".join(dict.fromkeys(filter(None, _words(value, _MESSAGES, 0))))


def _words(value: Any, names: re.Pattern[str], depth: int) -> Iterator[str]:
    if depth > _MAX_NESTED:
        return
    if isinstance(value, str):
        before, inner = _quoted(value)
        yield before
        yield from _words(inner, names, depth + 1)
    place: Any = as_object(value).get("loc")
    if isinstance(place, list | tuple):  # the path of a validation error
        yield ".".join(map(str, place[:_MAX_NESTED]))
    for name, each in as_object(value).items():
        if names.fullmatch(name):
            yield from _words(each, names, depth + 1)
    for each in value[:_MAX_NESTED] if isinstance(value, list | tuple) else ():
        yield from _words(each, names, depth + 1)


def _quoted(text: str) -> tuple[str, Any]:
    """Return the words of *text* before JSON or a Python literal at its end, and the value of that; (text, None) without one."""
    start = min((at for at in (text.find("{"), text.find("[{")) if at >= 0), default=len(text))
    end = max(text.rfind("}"), text.rfind("]")) + 1
    if not 0 < end - start <= _MAX_QUOTED:
        return text, None
    try:
        return text[:start], msgspec.json.decode(text[start:end])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes
            return text[:start], ast.literal_eval(text[start:end])
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text, None


def lower(call: ChatCall, said: TokenLimits) -> bool | None:
    """Lower the bound of *call* to what the endpoint says it allows.

    Returns:
        True if it was lowered, False if lowering is no use (the prompt alone is too large, or the refusal is for the rate and waiting
        helps), None if the endpoint allows as much already, or does not say how much it allows.
    """
    if call.bound is None:
        return None
    if said.per_minute is not None and said.prompt is None:
        return False
    allowed = [limit for limit in (said.completion, said.affordable) if limit is not None]
    window = said.context if said.context is not None else said.per_minute
    if window is not None:
        if said.prompt is None:
            return None
        if said.prompt >= window:
            return False
        allowed.append(window - said.prompt)
        if said.per_minute is not None:
            allowed.append(max(1, said.per_minute // 4))
    if not allowed or not 0 < min(allowed) < call.bound:
        return None
    call.bound = min(allowed)
    return True


def _completion(message: str, bound: int) -> int | None:
    """Return the most tokens of a reply that *message* allows, or None if it names no number below *bound*."""
    if exclusive := _EXCLUSIVE.search(message):
        return _value(exclusive[1]) - 1
    limit = _first(_COMPLETION, message)
    if limit is not None and _LEAST <= limit < bound:
        return limit
    below = [number for number in map(_value, _NUMBER.findall(message)) if _LEAST <= number < bound]
    return max(below, default=None)


def _first(patterns: tuple[str, ...], message: str) -> int | None:
    found = next((found for pattern in patterns if (found := re.search(pattern, message, re.IGNORECASE))), None)
    return None if found is None else _value(found[1])


def _value(digits: str) -> int:
    return int(digits.replace(",", "").replace("_", "") or 0)
