"""Tables and findings of the latency benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.latency.world import ALONE, LATENCY, MODES, STREAMED, WHOLE
from bench.report import Table

if TYPE_CHECKING:
    from bench.report import Run

SCENE = (
    f"SIMULATED endpoint on virtual time: {LATENCY.first_token} s to the first token, then {LATENCY.tokens_per_second:g} tokens/s in "
    "each call, however many there are; no network and no processor time. Answers are labels, so most of an element is its id."
)
SECONDS = "mean {:.3f} | p50 {:.3f} | p99 {:.3f}"
SHARES = ("mean", "p50", "p99")
DEFAULT_WAIT, LONGEST_WAIT = 0.1, 0.5


def tables(run: Run) -> dict[str, Table]:
    return {"positions": positions(run), "loads": loads(run), "windows": windows(run)}


def positions(run: Run) -> Table:
    table = Table(
        f"Seconds to the answer in a full batch, SIMULATED endpoint, {run.options['batches']} batches each, all requests at once, no limit "
        "on calls",
        f"batch | mode | {SECONDS} | first {{:.3f}} | last {{:.3f}}",
        "First and last: by place in the batch, on average.",
    )
    for size, modes in run.samples["positions"].items():
        for mode, one in modes.items():
            table.add(size, mode, *(one[name] for name in SHARES), one["places"][0], one["places"][-1])
    return table


def loads(run: Run) -> Table:
    table = Table(
        f"Seconds to the answer by load, SIMULATED endpoint, Poisson arrivals, 4 calls at once, batches of at most 16, median of "
        f"{run.options['runs']} runs",
        f"load | items/s {{:.2f}} | mode | {SECONDS} | mean batch {{:.2f}} | calls an item {{:.3f}}",
        f"Capacity: {run.samples['capacity']:.1f} items/s in full batches, {run.samples['alone_capacity']:.1f} items/s one call each; "
        "beyond it, the queue and the times grow for as long as callers come. The first tenth of the callers is left out.",
    )
    for load, modes in run.samples["loads"].items():
        for mode in MODES:
            one = modes[mode]
            table.add(load, modes["rate"], mode, *(one[name] for name in SHARES), one["batch"], 1 / one["batch"])
    return table


def windows(run: Run) -> Table:
    table = Table(
        f"The window: wait against batch size, SIMULATED endpoint, streamed, batches of at most 16, {run.options['arrivals']:,} Poisson "
        "arrivals each",
        "arrivals | idle | max_wait, ms {:.0f} | mean batch {:.2f} | added wait, mean ms {:.1f} | p50 s {:.3f}"
        " | p99 s {:.3f} | tokens an item {:.0f}",
        "Added wait: from submit until the call leaves. Arrivals: quiet 1 a second, busy 40 a second.",
    )
    for name, by_idle in run.samples["windows"].items():
        for idle, points in by_idle.items():
            for one in points:
                max_wait = None if idle == ALONE else one["max_wait"] * 1e3
                table.add(name, idle, max_wait, *(one[key] for key in ("batch", "added_ms", "p50", "p99", "tokens")))
    return table


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    found = [SCENE]
    for (size, mode), row in tables["positions"].by("batch", "mode").items():
        if mode == STREAMED:
            whole, alone = (run.samples["positions"][size][other] for other in (WHOLE, ALONE))
            found.append(
                f"Batches of {size}: streaming answers after {row['mean']:.2f} s on average against {whole['mean']:.2f} s for the whole "
                f"reply ({1 - row['mean'] / whole['mean']:.0%} sooner), the first after {row['first']:.2f} s; p99 is {row['p99']:.2f} s "
                f"against {whole['p99']:.2f} s. One call each takes {alone['mean']:.2f} s where nothing limits calls: even streamed, a "
                f"batch takes {row['mean'] / alone['mean']:.1f} times that on average."
            )
    for load, modes in run.samples["loads"].items():
        p50, p99 = ([modes[mode][name] for mode in MODES] for name in ("p50", "p99"))
        beyond = modes["rate"] > run.samples["alone_capacity"]
        found.append(
            f"{load.capitalize()} load ({modes['rate']:.2f} items/s, mean batch {modes[STREAMED]['batch']:.1f}): p50 {p50[0]:.2f} s "
            f"streamed, {p50[1]:.2f} s whole, {p50[2]:.2f} s one call each; p99 {p99[0]:.2f}, {p99[1]:.2f} and {p99[2]:.2f} s."
            + (" One call each cannot keep up: its times grow for as long as callers come." if beyond else "")
        )
    for name, by_idle in run.samples["windows"].items():
        alone = by_idle[ALONE][0]["tokens"]
        for idle in ("flush", "wait"):
            at = {one["max_wait"]: one for one in by_idle[idle]}
            words = [
                f"max_wait {wait * 1e3:.0f} ms makes batches of {at[wait]['batch']:.2f} and saves {1 - at[wait]['tokens'] / alone:.0%} of the "
                f"tokens for {at[wait]['added_ms']:.0f} ms of added wait"
                for wait in (DEFAULT_WAIT, LONGEST_WAIT)
            ]
            found.append(f'{name.capitalize()} arrivals, idle="{idle}": {"; ".join(words)}.')
    return found
