"""The forms that requests come in: what is text or a number under another form, and why the rest cannot share a prompt.

Frameworks and data sets write a text in many ways: as a list of text parts, as a `str` of their own class, in an object of an SDK, with
fields that are null. All of these are taken for what they are.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from microbatch.messages import Messages

NOT_THE_USERS: Final = "last message is not the user's"
COMBINED: Final = "messages: a combined prompt"

_EMPTY: Final[tuple[object, ...]] = (None, [], {})
_PARTS: Final = {
    "file": "file",
    "image_url": "image",
    "input_audio": "audio",
    "refusal": "refusal",
    "video_url": "video",
}
"""Types of content parts that are no text, and their names in reasons."""

_FIELDS: Final = frozenset(
    {"audio", "function_call", "name", "prefix", "reasoning_content", "refusal", "tool_call_id", "tool_calls"}
)
"""Fields of messages that reasons name; others may be made up by callers."""

_SAY_NOTHING: Final = frozenset({"cache_control", "parsed"})
"""Fields that add nothing to the text: a mark for the provider's cache, and what OpenAI's SDK keeps on its own objects."""

# --- values


def known(value: Any) -> Any:
    """Return *value*, of a type that msgspec does not know, as one that it does: its `enc_hook`.

    Raises:
        TypeError: JSON has nothing of the kind.
    """
    if isinstance(value, str):
        return str.__str__(value)  # the text itself, whatever its class makes of it
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    if isinstance(value, msgspec.Raw):
        return msgspec.json.decode(value)
    if not isinstance(value, type):
        if hasattr(value, "model_dump"):
            # As OpenAI's SDK sends the models of pydantic that it has made itself.
            excluded = getattr(value, "__api_exclude__", None)
            return value.model_dump(mode="json", exclude_unset=True, **({"exclude": excluded} if excluded else {}))
        if hasattr(value, "tolist"):  # of numpy
            return value.tolist()
    raise TypeError(f"{type(value).__name__} is none of JSON's types")


_plain: Final = partial(msgspec.to_builtins, enc_hook=known)
_encode = msgspec.json.Encoder(enc_hook=known).encode
_encode_sorted = msgspec.json.Encoder(order="sorted", enc_hook=known).encode


def plainly(value: Any, name: str) -> Any:
    """Return *value*, called *name* in errors, as JSON's own types, a copy; raise `ConfigError` if JSON cannot carry it."""
    try:
        return _plain(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} must be JSON values: {error}") from error


def encoded(value: Any, name: str, *, ordered: bool = False) -> bytes:
    """Return *value*, called *name* in errors, as JSON, with sorted keys if *ordered*: equal for equal values only; 1 and 1.0 differ.

    Raises:
        ConfigError: It holds something that JSON cannot carry, a NaN for instance.
    """
    try:
        raw = _encode_sorted(value) if ordered else _encode(value)
        # msgspec writes null for NaN and infinity.
        odd = _not_finite(_plain(value)) if b"null" in raw else None
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise ConfigError(f"{name} must be JSON values: {error}") from error
    if odd is not None:
        raise ConfigError(f"{name} must be JSON values, which {odd} is not")
    return raw


def _not_finite(value: Any) -> float | None:
    """Return a number in *value* that is NaN or infinite; None if there is none."""
    if isinstance(value, float):
        return None if abs(value) < float("inf") else value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((odd for part in parts if (odd := _not_finite(part)) is not None), None)


# --- messages


def copy_of(messages: Messages) -> list[dict[str, Any]]:
    """Return *messages* as plain dicts of their own, keys in the order given.

    Raises:
        ConfigError: They hold something that JSON cannot carry.
    """
    copies: list[dict[str, Any]] = msgspec.json.decode(encoded(messages, "messages"))
    return copies


def as_texts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | str:
    """Return *messages*, from `copy_of`, as a text each; or, if they are more than that, what keeps the request alone.

    Parts that carry a mark for the provider's cache stay parts, except in the last message.
    """
    if messages[-1].get("role") != "user":
        return NOT_THE_USERS
    texts: list[dict[str, Any]] = []
    for position, message in enumerate(messages, 1):
        text = _as_text(message, last=position == len(messages))
        if isinstance(text, str):
            return text
        texts.append(text)
    return texts


def _as_text(message: dict[str, Any], *, last: bool) -> dict[str, Any] | str:
    text: dict[str, Any] = {}
    for name, value in message.items():
        if name in ("role", "content") or (not last and name in ("name", "cache_control") and value is not None):
            text[name] = value
        elif value not in _EMPTY and name not in _SAY_NOTHING:
            return f"messages: {name if name in _FIELDS else 'another field'}"
    content = text.get("content")
    if isinstance(content, list):
        for part in content:
            if not _is_text(part):
                kind = part.get("type") if isinstance(part, dict) else None
                return f"messages: {_PARTS.get(kind, 'another') if isinstance(kind, str) else 'another'} part"
        if last or not any(part.get("cache_control") for part in content):
            # As vLLM, SGLang and llama.cpp join them for models that take a text.
            text["content"] = "\n".join(part["text"] for part in content)
    elif not isinstance(content, str):
        return "messages: content is no text"
    return text


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
        and all(value in _EMPTY for name, value in part.items() if name not in ("type", "text", "cache_control"))
    )
