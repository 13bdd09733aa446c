"""A transport that keeps what each call said, and checks of what the batcher made of it, which share no code with the batcher."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from microbatch.testing.reading import read_combined

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import microbatch as mb
    from microbatch.protocols import ChatCall, Completion, Transport

_ELEMENT = re.compile(r'"id"\s*:\s*"([^"]*)"\s*,\s*"answer"\s*:\s*("(?:[^"\\]|\\.)*")')


class Heard(NamedTuple):
    """A call: its items as id and text (one without an id for a call about one item), and the text of the reply."""

    items: list[tuple[str, str]]
    reply: str


class Witness:
    """Passes calls on to *transport*.

    Attributes:
        calls: The calls that sent any text, in the order in which they ended.
        tokens: Prompt and completion tokens that the endpoint has reported.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.calls: list[Heard] = []
        self.tokens = [0, 0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        parts: list[str] = []

        def hear(text: str) -> None:
            parts.append(text)
            on_text(text)

        text = call.messages[-1]["content"]
        try:
            completion = await self._transport.send(call, hear)
        finally:  # a reply may be cut off once it is past the last item
            self.calls.append(Heard(read_combined(text)[1] or [("", text)], "".join(parts)))
        if completion.usage is not None:
            self.tokens[0] += completion.usage.prompt_tokens
            self.tokens[1] += completion.usage.completion_tokens
        return completion

    def places(self) -> dict[str, tuple[int, int]]:
        """Return the place and the number of items of the first combined call that carried each text."""
        found: dict[str, tuple[int, int]] = {}
        for call in self.calls:
            if len(call.items) > 1:
                for place, (_, text) in enumerate(call.items):
                    found.setdefault(text, (place, len(call.items)))
        return found

    def id_errors(self) -> dict[str, int]:
        """Return how many ids of combined replies were not asked for, and how many asked ones were missing."""
        unknown = missing = 0
        for call in self.calls:
            if len(call.items) > 1:
                asked, given = {name for name, _ in call.items}, {name for name, _ in _ELEMENT.findall(call.reply)}
                unknown, missing = unknown + len(given - asked), missing + len(asked - given)
        return {"unknown_ids": unknown, "missing": missing}

    def violations(self, texts: Sequence[str], results: Sequence[mb.Result[str]], stats: mb.Stats) -> list[str]:
        """Return in words what must never happen: an answer from under another id, or tokens that nobody reported."""
        given: dict[str, set[str]] = {}
        for call in self.calls:
            for name, text in call.items:
                answers = given.setdefault(text, set())
                if name:
                    answers.update(
                        json.loads(answer) for found, answer in _ELEMENT.findall(call.reply) if found == name
                    )
                else:
                    answers.update(re.findall(r'"([^"]*)"', call.reply) or [call.reply.strip()])
        found = [
            f"{result.reply.output!r} was not given to {text!r}"
            for text, result in zip(texts, results, strict=True)
            if result.reply is not None and result.reply.output not in given.get(text, ())
        ]
        booked = [stats.prompt_tokens, stats.completion_tokens]
        if booked != self.tokens:
            found.append(f"{booked} tokens are counted, {self.tokens} were reported")
        usages = [result.reply.usage for result in results if result.reply is not None]
        if not any(usage.estimated for usage in usages):
            shares = sum(usages, stats.unclaimed)
            if [shares.prompt_tokens, shares.completion_tokens] != self.tokens:
                found.append(f"the shares are {shares}, {self.tokens} were reported")
        return found
