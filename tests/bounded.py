"""Jobs against simulated endpoints whose limits a bound on combined replies may meet, and models that do not stop.

`python tests/bounded.py` plays them all on virtual time and prints for each what the bound has cost: combined calls that were
refused or cut for it, requests that failed, the most tokens that a combined call was charged, and the combined calls that were made
before the lane went alone.
"""

# ruff: noqa: T201

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

import msgspec

import microbatch as mb
from microbatch.errors import StatusError
from microbatch.testing import Faults, Latency, Quota, SimulatedModel, SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.protocols import ChatCall, Completion
    from microbatch.testing.reading import Prompt

SYSTEM = "Read the product and answer. " * 40
TPM = 200_000
ITEMS = 320

Label = Literal["electronics", "clothing", "home", "beauty"]


class Item(msgspec.Struct):
    """An answer of several parts."""

    label: Label
    score: int
    sure: bool


def text_of_700(text: str, _schema: dict[str, Any] | None) -> str:
    """Return an answer of about 700 tokens."""
    return text + " gamma" * 680


TYPES: dict[str, Any] = {"labels": Label, "objects": Item, "short texts": str, "texts of 700 tokens": str}

ENDPOINTS: dict[str, dict[str, Any]] = {
    "no limits": {},
    "16,384 tokens of output": {"max_output_tokens": 16_384},
    "2,048 tokens of output": {"max_output_tokens": 2_048},
    "a context of 8k": {"context_tokens": 8_192},
    "200k tokens a minute": {"quota": Quota(tpm=TPM)},
    "JSON on many lines": {"indent": 4},
    "6,000 hidden tokens": {"reasoning_tokens": 6_000},
    "20,000 hidden tokens": {"reasoning_tokens": 20_000},
    "6,000 hidden tokens of 16,384": {"reasoning_tokens": 6_000, "max_output_tokens": 16_384},
    "6,000 hidden tokens of 8k": {"reasoning_tokens": 6_000, "context_tokens": 8_192},
    "its own name for the limit": {"max_tokens_name": "max_completion_tokens", "max_output_tokens": 16_384},
}

USELESS = ("rambling", "strange_ids", "empty_results", "whitespace")
"""Faults of a model that is of no use for combining."""


class Recorded(SimulatedTransport):
    """Writes down under which bound each combined call was sent, and which of them were refused or cut.

    Attributes:
        sent: The bounds.
        troubled: "refused" or "cut", in order; refusals for the pace are not counted.
        charged: Prompt and bound of each, in tokens, as far as they were not refused.
        combined: Combined calls.
        under_way: Those under way; `peak` is the most there were.
    """

    def __init__(self, model: SimulatedModel, name: str | None = None) -> None:
        super().__init__(model)
        self.model = name
        self.sent: list[int | None] = []
        self.troubled: list[str] = []
        self.charged: list[int] = []
        self.combined = self.under_way = self.peak = 0
        reply = model.reply

        def noted(prompt: Prompt, key: str = "") -> Any:
            if prompt.combined and prompt.max_tokens is not None:
                self.charged.append(prompt.tokens + prompt.max_tokens)
            return reply(prompt, key)

        model.reply = noted  # type: ignore[method-assign]

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Send *call* and note what becomes of it."""
        if "separate requests" not in call.messages[-1]["content"]:
            assert call.bound is None
            return await super().send(call, on_text)
        self.sent.append(call.bound)
        self.combined += 1
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        try:
            completion = await super().send(call, on_text)
        except StatusError as error:
            if error.status != 429:
                self.troubled.append("refused")
            raise
        finally:
            self.under_way -= 1
        if completion.finish_reason == "length":
            self.troubled.append("cut")
        return completion


def messages(number: int) -> list[dict[str, str]]:
    """Return one question."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Product {number}, of colour {number * 7919}"},
    ]


def simulated(**options: Any) -> SimulatedModel:
    """Return a model that takes its time."""
    return SimulatedModel(record=True, latency=Latency(first_token=0.5, tokens_per_second=200), **options)


def batcher_for(transport: SimulatedTransport, **options: Any) -> mb.Microbatcher:
    """Return a batcher of batches of 16."""
    return mb.Microbatcher(transport, policy=mb.FlushPolicy(max_batch_size=16), **options)


async def by_map(batcher: mb.Microbatcher, count: int, output_type: Any, **options: Any) -> list[Any]:
    """Ask *count* questions as bulk work."""
    requests = (mb.Request(messages(number), output_type=output_type, **options) for number in range(count))
    return [result.unwrap().output async for result in batcher.map(requests, ordered=True)]


async def in_waves(
    batcher: mb.Microbatcher, count: int, output_type: Any, *, each: int = 16, **options: Any
) -> list[Any]:
    """Ask *count* questions, *each* at once, and the next ones when those have been answered."""
    outputs: list[Any] = []
    for start in range(0, count, each):
        asked = (
            batcher.submit(messages(number), output_type=output_type, **options)
            for number in range(start, min(count, start + each))
        )
        outputs += [reply.output for reply in await asyncio.gather(*asked)]
    return outputs


async def _play(kind: str, options: dict[str, Any], ask: Callable[..., Any]) -> str:
    if kind == "texts of 700 tokens":
        options = {**options, "answer": text_of_700}
    transport = Recorded(simulated(**options))
    limit = mb.RateLimit(tpm=TPM) if "quota" in options else None
    async with batcher_for(transport, rate_limit=limit) as batcher:
        await ask(batcher, ITEMS, TYPES[kind])
        stats = batcher.stats()
    alone = f"alone after {transport.combined} combined calls" if stats.lanes_parted else "combined to the end"
    return f"{len(transport.troubled)} cut or refused, {stats.failed} failed, at most {max(transport.charged):,} charged, {alone}"


def main() -> None:
    """Print the table."""
    cases = [(name, kind, options) for name, options in ENDPOINTS.items() for kind in TYPES]
    cases += [
        (f"a model with {kind}", "short texts", {"faults": Faults(kind, rate=1.0, on="combined")}) for kind in USELESS
    ]
    for name, kind, options in cases:
        for ask in (by_map, in_waves):
            with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
                print(f"{name:30} {kind:20} {ask.__name__:9} {runner.run(_play(kind, options, ask))}")


if __name__ == "__main__":
    main()
