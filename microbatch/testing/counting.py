"""The endpoint's tokenizer: token counts of prompts, and the pieces in which a reply is streamed."""

from __future__ import annotations

import json
from bisect import bisect_right
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.accounting.tokens import load_encoding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ENCODING = "o200k_base"

# The rule of OpenAI's cookbook ("How to count tokens with tiktoken").
PER_MESSAGE_TOKENS = 3
PER_NAME_TOKENS = 1
PRIMING_TOKENS = 3


def compact(value: Any, indent: int | None = None) -> str:
    """Return *value* as JSON, in the characters themselves rather than in escapes; without an *indent* on one line, without spaces.

    Structs, dataclasses, dates and the like become what msgspec makes of them.
    """
    separators = (",", ":" if indent is None else ": ")
    return json.dumps(value, ensure_ascii=False, separators=separators, indent=indent, default=msgspec.to_builtins)


def encode(text: str) -> list[int]:
    """Return the tokens of *text*; what looks like a special token is text like any other."""
    return load_encoding(ENCODING).encode_ordinary(text)


def content_text(content: Any) -> str:
    """Return a message's content as one text: a string as it is, the text parts of a list, nothing for None."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def prompt_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """Count the tokens of a chat prompt: those of roles, contents and names, and those that frame them."""
    total = PRIMING_TOKENS
    for message in messages:
        said = text_tokens(str(message.get("role", ""))) + text_tokens(content_text(message.get("content")))
        total += PER_MESSAGE_TOKENS + said
        if message.get("name"):
            total += PER_NAME_TOKENS + text_tokens(str(message["name"]))
    return total


# The same system messages, roles and schemas come with every call, so they are counted once.
MAX_REMEMBERED_CHARS = 20_000


def text_tokens(text: str) -> int:
    """Count the tokens of *text*."""
    return _remembered_tokens(text) if len(text) <= MAX_REMEMBERED_CHARS else len(encode(text))


@lru_cache(maxsize=256)
def _remembered_tokens(text: str) -> int:
    return len(encode(text))


class Pieces(msgspec.Struct):
    """A text as a model streams it.

    Attributes:
        texts: The pieces in order. Each is one token, or the few tokens that only together make whole characters.
        ends: How many tokens the text up to and with each piece has.
    """

    texts: list[str]
    ends: list[int]

    @property
    def tokens(self) -> int:
        """Tokens of the whole text."""
        return self.ends[-1] if self.ends else 0

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)

    def head(self, pieces: int) -> Pieces:
        """Return the first *pieces* pieces."""
        return Pieces(self.texts[:pieces], self.ends[:pieces])

    def within(self, max_tokens: int) -> Pieces:
        """Return the pieces that fit in *max_tokens*; a character whose last token does not fit is left out."""
        return self.head(bisect_right(self.ends, max_tokens))


def split(text: str) -> Pieces:
    """Split *text* into the pieces a model would stream."""
    pieces = Pieces([], [])
    held = b""
    for count, token in enumerate(encode(text), start=1):
        piece = _token_text(token)
        if piece is None:
            held += load_encoding(ENCODING).decode_single_token_bytes(token)
            try:
                piece = held.decode()
            except UnicodeDecodeError:
                continue
        held = b""
        pieces.texts.append(piece)
        pieces.ends.append(count)
    return pieces


@lru_cache(maxsize=65_536)
def _token_text(token: int) -> str | None:
    """Return a token's text, or None if it is only part of a character."""
    try:
        return load_encoding(ENCODING).decode_single_token_bytes(token).decode()
    except UnicodeDecodeError:
        return None
