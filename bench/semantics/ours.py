"""microbatch over the same batch function, which plays the model: its results become the reply, by the ids of what they answer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

import microbatch as mb
from bench.peers import BatchFunction, Peer
from bench.semantics.stage import answered
from microbatch.testing.scripted import ScriptedCall

INVENTED = "99zzzzz"
"""An id that was not asked for."""


class Model:
    """A transport. An exception in an item's place is an item that the model leaves out of a combined reply, and refuses alone."""

    def __init__(self, function: BatchFunction) -> None:
        self._function = function

    async def send(self, call: mb.ChatCall, on_text: Any) -> mb.Completion:
        received = ScriptedCall(call, 0.0)
        results = await self._function([text for _, text in received.items])
        if received.combined:
            on_text(received.reply(named(received.items, results)))
        elif isinstance(results[0], Exception):
            raise mb.BadRequest("refused", status=400) from results[0]
        else:
            on_text(results[0])
        return mb.Completion("stop")

    async def aclose(self) -> None:
        pass


def named(items: list[tuple[str, str]], results: list[Any]) -> list[tuple[str, str]]:
    """Return each of *results* with the id of the item that it answers."""
    ids = defaultdict(list)
    for name, text in items:
        ids[text].append(name)
    answers = [result for result in results if not isinstance(result, Exception)]
    return [(ids[text].pop(0) if ids[text := answered(result)] else INVENTED, result) for result in answers]


class Ours(Peer):
    name = distribution = "microbatch"
    closes = True
    policy: ClassVar[dict[str, Any]] = {}

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        # `idle="wait"`: as in the others, even the first request waits.
        policy = mb.FlushPolicy(max_batch_size=size, max_wait=wait, idle="wait", **self.policy)
        self._batcher = mb.Microbatcher(Model(function), policy=policy, tokens="bytes")
        self.start = self._batcher.open
        self.stop = self._batcher.aclose

    async def submit(self, item: str) -> str:
        messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": item}]
        return (await self._batcher.submit(messages)).output


class Sharing(Ours):
    policy: ClassVar[dict[str, Any]] = {"share": True}


class OneCall(Ours):
    policy: ClassVar[dict[str, Any]] = {"max_concurrent_batches": 1}


Ours.sharing = Sharing
Ours.one_call = OneCall
