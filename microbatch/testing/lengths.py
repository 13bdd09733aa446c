"""Limits on the length of a simulated reply, reasoning tokens included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from microbatch.messages import Usage
from microbatch.testing.reading import EndpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.testing.counting import Pieces
    from microbatch.testing.reading import Prompt

RAMBLING_TOKENS: Final = 8_192
"""The length of a reply that does not end by itself where no other limit applies."""


def asked_max_tokens(body: Mapping[str, Any]) -> int | None:
    """Return the limit that a request sets on its reply, under either name, or None.

    Raises:
        EndpointError: It is no positive whole number.
    """
    limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    for limit in limits:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise EndpointError(
                400, f"Invalid max_tokens: expected an integer >= 1, but got {limit!r}.", param="max_tokens"
            )
    return min(limits, default=None)


def check_length(tokens: int, max_tokens: int | None, *, context: int | None, output: int | None) -> None:
    """Check a prompt of *tokens* and the limit that it sets on its reply.

    Args:
        tokens: Tokens of the prompt.
        max_tokens: The limit on the reply, or None.
        context: Most tokens of both together, None for any number.
        output: Most tokens of the reply, None for any number.

    Raises:
        EndpointError: They are too many.
    """
    if output is not None and max_tokens is not None and max_tokens > output:
        message = (
            f"max_tokens is too large: {max_tokens}. This model supports at most {output} completion tokens, whereas you "
            f"provided {max_tokens}."
        )
        raise EndpointError(400, message, param="max_tokens", code="invalid_value")
    if context is None or tokens + (max_tokens or 0) <= context:
        return
    asked = (
        f"your messages resulted in {tokens} tokens"
        if max_tokens is None
        else f"you requested {tokens + max_tokens} tokens ({tokens} in the messages, {max_tokens} in the completion)"
    )
    message = (
        f"This model's maximum context length is {context} tokens. However, {asked}. "
        "Please reduce the length of the messages or completion."
    )
    raise EndpointError(400, message, param="messages", code="context_length_exceeded")


def reply_limit(prompt: Prompt, *, context: int | None, output: int | None) -> int | None:
    """Return the most tokens that the reply to *prompt* may have, or None for any number."""
    window = None if context is None else context - prompt.tokens
    return min((limit for limit in (prompt.max_tokens, window, output) if limit is not None), default=None)


def within(pieces: Pieces, hidden: int, most: int | None) -> tuple[Pieces, int, bool]:
    """Cut what a model has thought and then written to *most* tokens.

    Args:
        pieces: What it wrote.
        hidden: Tokens of its thoughts.
        most: Most tokens of both; None for any number.

    Returns:
        What is left of both, and whether something was cut off.
    """
    if most is None or hidden + pieces.tokens <= most:
        return pieces, hidden, False
    return pieces.within(max(0, most - hidden)), min(hidden, most), True


def usage_of(prompt: Prompt, pieces: Pieces, hidden: int) -> Usage:
    """Return the usage of a reply: thoughts are completion tokens as well."""
    return Usage(prompt.tokens, hidden + pieces.tokens, reasoning_tokens=hidden)
