"""Services whose model answers worse in batches, with an audit, on virtual time.

`python tests/audited.py --runs 400` plays each scenario so many times, with other seeds, and prints how the audits decided.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import asyncio
import random
import re
import statistics
from typing import Literal

import msgspec

import microbatch as mb
from microbatch.testing import VirtualClockLoop

Label = Literal["north", "south", "east", "west"]
LABELS = ("north", "south", "east", "west")
SYSTEM = [{"role": "system", "content": "Say in which direction the path leads. " * 8}]

_ITEM = re.compile(r"^\[(\w+)\] (.+)$", re.MULTILINE)


class PlantedModel:
    """A transport to a model that answers in half a second, right alone, and wrong in some share of the items of a batch.

    Args:
        harm: Share of the items answered wrong in prompts of at least so many items, by that number.
        noise: Share of the items of which two answers differ, whether alone or not.
        rng: Draws both.
    """

    model = "planted"

    def __init__(self, harm: dict[int, float], noise: float, rng: random.Random) -> None:
        self.harm, self.noise, self.rng = harm, noise, rng
        self.calls: list[int] = []
        self.reported = mb.Usage()

    async def send(self, call, on_text):
        await asyncio.sleep(0.5)
        prompt = call.messages[-1]["content"]
        items = _ITEM.findall(prompt) if "results" in prompt else []
        self.calls.append(len(items) or 1)
        if items:
            elements = [
                {"id": name, "answer": self.said(msgspec.json.decode(text), len(items))} for name, text in items
            ]
            text = msgspec.json.encode({"results": elements}).decode()
        else:
            text = msgspec.json.encode({"answer": self.said(prompt, 1)}).decode()
        on_text(text)
        usage = mb.Usage(100 + len(prompt) // 4, len(text) // 4)
        self.reported += usage
        return mb.Completion("stop", usage=usage)

    async def aclose(self):
        pass

    def said(self, text, size):
        right = LABELS[len(text) % 2]
        share = self.harm.get(max((least for least in self.harm if least <= size), default=0), 0.0)
        if self.rng.random() < share:
            return LABELS[3]
        # Two answers differ if exactly one of them is the other label: 2 p (1 - p) = noise.
        chance = (1 - (1 - 2 * self.noise) ** 0.5) / 2
        return LABELS[2] if self.rng.random() < chance else right


class Outcome(msgspec.Struct):
    """The outcome of a run.

    Attributes:
        rows: `stats().audit` at the end.
        decisions: For each decision the samples so far, the decision, the size, and the batches of that size so far.
        latencies: Those of all requests, in seconds.
        stats: The figures at the end.
        reported: The usage that the model has reported.
        calls: The number of items of each call.
    """

    rows: tuple[mb.AuditedSize, ...]
    decisions: list[tuple[int, str, int, int]]
    latencies: list[float]
    stats: mb.Stats
    reported: mb.Usage
    calls: list[int]


class Notes:
    """Hooks that write decisions down."""

    def __init__(self, model):
        self.model, self.samples, self.decisions = model, 0, []

    def on_audit(self, event):
        self.samples += 1
        if event.decision is not None:
            sent = sum(event.size / 2 < size <= event.size for size in self.model.calls)
            self.decisions.append((self.samples, event.decision, event.size, sent))


def play(seed, harm, *, noise=0.0, size=16, bursts=100, audit=None, slots=64, pause=1.0, later=None):
    """Send *bursts* of *size* requests at random times, on average every *pause* seconds, and return the `Outcome`."""
    loop = VirtualClockLoop()
    model = PlantedModel(dict(harm), noise, random.Random(seed))
    notes = Notes(model)
    rng = random.Random(seed + 1)

    async def serve():
        policy = mb.FlushPolicy(max_batch_size=size, idle="wait", max_concurrent_batches=slots)
        # The secret decides what is sampled, too.
        options = {"policy": policy, "audit": audit, "hooks": [notes], "tokens": "bytes", "id_secret": str(seed)}
        async with mb.Microbatcher(model, **options) as batcher:
            latencies = []

            async def ask(text):
                reply = await batcher.submit([*SYSTEM, {"role": "user", "content": text}], output_type=Label)
                latencies.append(reply.latency)

            async with asyncio.TaskGroup() as tasks:
                for burst in range(bursts):
                    if later is not None and burst == bursts // 2:
                        model.harm = later
                    for item in range(size):
                        tasks.create_task(ask(f"path {burst} {item} {'x' * rng.randrange(9)}"))
                    await asyncio.sleep(rng.expovariate(1 / pause))
            if batcher.audits is not None:
                await batcher.audits.settled()
            stats = batcher.stats()
        return Outcome(stats.audit, notes.decisions, latencies, batcher.stats(), model.reported, model.calls)

    try:
        return loop.run_until_complete(serve())
    finally:
        loop.close()


def left(outcome, size):
    """Return the samples and the batches of *size* after which it was condemned; None if it was not."""
    found = [
        (samples, sent)
        for samples, decision, step, sent in outcome.decisions
        if (decision, step) == ("condemned", size)
    ]
    return found[0] if found else None


def decided(outcome, decision):
    """Return whether any size was *decision*."""
    return any(each == decision for _, each, _, _ in outcome.decisions)


EVERY = mb.AuditPolicy(rate=1.0)


def share(values):
    """Return the share of true *values*, in per cent."""
    values = list(values)
    return f"{100 * sum(map(bool, values)) / len(values):.1f} %"


def main() -> None:
    """Play the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    runs = range(0, 1000 * parser.parse_args().runs, 1000)

    outcomes = [left(play(seed, {16: 0.26}, audit=mb.AuditPolicy(), bursts=70), 16) for seed in runs]
    print(
        "74 % right at 16, sound at 8: 16 is left within 60 batches in",
        share(found and found[1] <= 60 for found in outcomes),
    )
    harmed = [play(seed, {5: 0.10}, audit=EVERY, bursts=260) for seed in runs]
    print(
        "excess 0.10 above 4: 16 is left within 250 samples in",
        share((found := left(each, 16)) and found[0] <= 250 for each in harmed),
    )
    both = [left(each, 8) for each in harmed]
    print(
        "                     8 too, within 250 samples in all, in", share(found and found[0] <= 250 for found in both)
    )
    noisy = [play(seed, {}, noise=0.10, size=4, audit=EVERY, bursts=600) for seed in runs]
    print("excess 0, noise 0.10, 600 samples: no shrink in", share(not decided(each, "condemned") for each in noisy))
    bound = [play(seed, {2: 0.02}, size=4, audit=EVERY, bursts=1000) for seed in runs]
    print(
        "excess at the bound, 1,000 samples: false alarms in",
        share(decided(each, "condemned") for each in bound),
        end="; ",
    )
    print("false certificates in", share(decided(each, "certified") for each in bound))
    only = mb.AuditPolicy(rate=1.0, adapt=False)
    for harm, noise in ((0.03, 0.0), (0.0, 0.10), (0.05, 0.05)):
        rows = [play(seed, {2: harm}, noise=noise, size=2, audit=only, bursts=2000).rows for seed in runs]
        excess = harm - harm * noise  # what is wrong anyway does not become worse
        errors = [row.excess - excess for (row,) in rows]
        mean, spread = statistics.mean(errors), statistics.stdev(errors) / len(errors) ** 0.5
        print(f"adapt=False, excess {excess:.3f}, noise {noise}: mean error {mean:+.4f} (standard error {spread:.4f})")


if __name__ == "__main__":
    main()
