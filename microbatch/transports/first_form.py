"""Holds calls back for a moment while the first one shows in which form an endpoint can be asked for JSON.

Calls that leave together would all be refused for the same reason. A refusal comes at once; an answer takes longer, and nothing should
wait for it. So the others wait until the first call was answered, refused forms included, but not long.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from weakref import ref

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.protocols import ChatCall

PATIENCE: Final = 0.1
"""Seconds after the start of the first call from which on no call waits for it."""


class FirstForm:
    """The first call with a schema to an endpoint.

    Attributes:
        over: Whether no call waits for it any more.
    """

    def __init__(self) -> None:
        self.over: bool = False
        self._call: Callable[[], ChatCall | None] | None = None
        self._until = 0.0
        self._ended = asyncio.Event()

    async def wait(self, call: ChatCall) -> None:
        """Wait for the first call to end, unless *call* is the first one."""
        now = asyncio.get_running_loop().time()
        if self._call is None:
            self._call, self._until = ref(call), now + PATIENCE
        elif now >= self._until:
            self.end()
        elif self._call() is not call:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._until):
                    await self._ended.wait()
            self.end()

    def end(self, call: ChatCall | None = None) -> None:
        """Release all calls that wait, and let no more wait; with a *call* only if it is the first one."""
        if call is None or (self._call is not None and self._call() is call):
            self.over = True
            self._ended.set()
