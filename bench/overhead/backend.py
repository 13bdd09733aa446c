"""What stands where the endpoint would: it answers everybody at once, or after a pause it is given."""

from __future__ import annotations

import re
import time
from itertools import chain
from typing import TYPE_CHECKING

import microbatch as mb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Pause = Callable[[], Awaitable[object]] | None

ITEM = re.compile(r'\[(\d+[a-z]{5})\] "(\d+) ')
"""An item's id, and the number its text begins with."""


class Function:
    """The batch function of those who take any object: the negative of each number it is given.

    Attributes:
        calls: How often it was called.
        spent: None: what it costs is not measured, being next to nothing.
    """

    spent = None

    def __init__(self, pause: Pause) -> None:
        self.calls = 0
        self._pause = pause

    async def answer(self, items: list[int]) -> list[int]:
        self.calls += 1
        if self._pause is not None:
            await self._pause()
        return [-item for item in items]


class Echo:
    """A transport that answers each item of a combined prompt with the number its text begins with.

    The replies are templates with gaps, built for every batch size before the clock starts: what is left to do in the
    measured time is to find the ids and to fill the gaps.

    Attributes:
        calls: How often it was called.
        spent: Seconds it took by itself, pauses aside.
    """

    model = base_url = None

    def __init__(self, size: int, pause: Pause) -> None:
        self.calls = 0
        self.spent = 0.0
        self._pause = pause
        element = '{"id":"%s","answer":"%s"}'
        self._templates = ['{"results":[' + ",".join([element] * items) + "]}" for items in range(size + 1)]

    async def send(self, call: mb.ChatCall, on_text: Callable[[str], None]) -> mb.Completion:
        self.calls += 1
        if self._pause is not None:
            await self._pause()
        start = time.perf_counter()
        content = call.messages[-1]["content"]
        found = ITEM.findall(content)
        # A request that goes alone is asked as its caller wrote it, and is answered without a wrapper.
        reply = self._templates[len(found)] % tuple(chain.from_iterable(found)) if found else content.partition(" ")[0]
        self.spent += time.perf_counter() - start
        on_text(reply)
        return mb.Completion("stop", usage=mb.Usage(len(content) // 4, 12 * len(found)))

    async def aclose(self) -> None:
        pass
