"""What stands where the endpoint would: it says every request back to whoever asked, so a wrong answer shows."""

from __future__ import annotations

import asyncio
import re

import microbatch as mb
from microbatch.demo import instructions

SYSTEM = instructions()
"""What all items share: some 300 tokens, so that to combine pays and nobody is warned that it does not."""

ITEM = re.compile(r"^\[(\d+[a-z]{5})\] (.*)$", re.MULTILINE)
CHARACTERS_PER_TOKEN = 4


class Echo:
    """Answers each request with its own text, *pause* seconds after it was asked; keeps nothing but counts.

    Attributes:
        calls: How often it was called.
        items: How many requests it has answered.
    """

    model = base_url = None

    def __init__(self, pause: float = 0.0) -> None:
        self.calls = self.items = 0
        self._pause = pause

    async def send(self, call, on_text):
        asked = call.messages[-1]["content"]
        items = ITEM.findall(asked)
        self.calls += 1
        self.items += len(items) or 1
        await asyncio.sleep(self._pause)
        # The text of an item is a JSON string already.
        elements = ",".join(f'{{"id":"{name}","answer":{text}}}' for name, text in items)
        said = f'{{"results":[{elements}]}}' if items else asked
        on_text(said)
        characters = sum(len(message["content"]) for message in call.messages)
        return mb.Completion(
            "stop", usage=mb.Usage(characters // CHARACTERS_PER_TOKEN, len(said) // CHARACTERS_PER_TOKEN)
        )

    async def aclose(self) -> None:
        pass


def ask(text: str, system: str = SYSTEM) -> list[dict[str, str]]:
    """Return fresh messages."""
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def check(said: str, asked: str) -> None:
    """Raise AssertionError unless a caller was told what it asked."""
    if said != asked:
        raise AssertionError(f"{asked!r} was answered {said!r}")
