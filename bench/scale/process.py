"""The stand-in for an endpoint within the process, and the memory of the process, in MiB, as Linux reports it."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import microbatch as mb
from microbatch.demo import instructions

SYSTEM = instructions()
"""Some 300 tokens that all items share, so that combining pays and no warning says that it does not."""

ITEM = re.compile(r"^\[(\d+[a-z]{5})\] (.*)$", re.MULTILINE)
CHARACTERS_PER_TOKEN = 4
MIB = 2**20
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Echo:
    """Answer each request with its own text at once, so that a wrong answer shows."""

    model = base_url = None

    def __init__(self) -> None:
        self.calls = self.items = 0

    async def send(self, call, on_text):
        asked = call.messages[-1]["content"]
        items = ITEM.findall(asked)
        self.calls += 1
        self.items += len(items) or 1
        await asyncio.sleep(0)
        # The text of an item is a JSON string already.
        elements = ",".join(f'{{"id":"{name}","answer":{text}}}' for name, text in items)
        reply = f'{{"results":[{elements}]}}' if items else asked
        on_text(reply)
        characters = sum(len(message["content"]) for message in call.messages)
        usage = mb.Usage(characters // CHARACTERS_PER_TOKEN, len(reply) // CHARACTERS_PER_TOKEN)
        return mb.Completion("stop", usage=usage)

    async def aclose(self) -> None:
        pass


def ask(text: str, system: str = SYSTEM) -> list[dict[str, str]]:
    """Return fresh messages."""
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def check(answer: str, asked: str) -> None:
    """Raise AssertionError unless a request was answered with its own text."""
    if answer != asked:
        raise AssertionError(f"{asked!r} was answered {answer!r}")


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / MIB


def peak_mib() -> float:
    """Return the most that was ever resident.

    Not `getrusage`: its figure begins with the memory of the parent process.
    """
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / MIB
