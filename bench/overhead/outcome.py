"""Tables, findings and figure of the overhead benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.overhead.entries import FLOOR, LARGE, LARGE_BYTES, OURS, SAME_WORK, SMALL_BYTES
from bench.overhead.loads import BURST, TIMES, WINDOW, WORKERS
from bench.report import Table, met
from bench.timing import median, ratio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.report import Run

    Pairs = list[dict[str, dict[str, Any]]]

LOOPS = ("asyncio", "uvloop")
AHEAD = 1.3
"""On the same work, at least so many times ahead of every peer that waits."""

NEVER_WAITS = "aiodataloader" + SAME_WORK
PEAK_BYTES = 2_355
"""2.3 KB."""

NOISE = 0.15
"""A floor that differs from itself by more says that the machine was busy."""

SETUP = (
    f"Burst N: {BURST:,} calls under one asyncio.gather, batches of N. Steady: {WORKERS} workers that ask {TIMES} times each, batches of "
    f"32, no task per item. Longest wait {WINDOW * 1e3:g} ms. x floor: the median over the rounds of the ratio to a run of bare futures "
    "(floor-future) right before; the floor's own ratio shows the noise. The cost of gather, tasks and futures is in the floor and in "
    "all other figures. No endpoint and no network: the backend answers at once. Modules are excluded from garbage collection."
)
CARRIED = (
    f"microbatch and the rows of the same work are called with two chat messages built for each call (300 tokens shared, {SMALL_BYTES} "
    f"bytes of its own, {LARGE_BYTES:,} in the row that says so), and return an output and its share of the usage; all other rows carry "
    "an integer. Same work: the library hands the messages on; the batch function groups them by all but the last message, and for each "
    "group composes the same numbered prompt, sends the same call, decodes the reply with msgspec and matches answers by position. It "
    "does not find equal requests in flight, check ids, read a reply that is not whole, retry, ask again, limit or count; microbatch does."
)
BYTES = (
    "Bytes of resident memory for each of {pending:,} requests, the waiting task and its frames included: first while all wait, then at "
    "most until all are answered and the answers kept. Wake-ups are counted where the loop is Python."
)


def times_floor(pairs: Pairs) -> float:
    return ratio(*([pair[side]["wall_us"] for pair in pairs] for side in ("own", "floor")))


def own_median(pairs: Pairs, name: str) -> float | None:
    known = [pair["own"][name] for pair in pairs if pair["own"][name] is not None]
    return median(known) if known else None


def tables(run: Run) -> dict[str, Table]:
    found = {}
    for loop in LOOPS:
        if loop in run.samples:
            found[loop] = times(run, loop)
    for loop in LOOPS:
        if f"{loop}_quiet" in run.samples:
            found[f"{loop}_quiet"] = quiet(run, loop)
    return found


def times(run: Run, loop: str) -> Table:
    loads = run.samples[loop]
    head = [f"{load}: us {{:.1f}} | {load}: x floor {{:.2f}}" for load in loads]
    table = Table(f"Wall time per item, {loop}", " | ".join(["library", "waits", *head]), SETUP, CARRIED)
    for name, facts in run.samples["entries"].items():
        if all(name in runs for runs in loads.values()):
            cells = [(own_median(runs[name], "wall_us"), times_floor(runs[name])) for runs in loads.values()]
            table.add(name, facts["waits"], *(cell for two in cells for cell in two))
    return table


def quiet(run: Run, loop: str) -> Table:
    table = Table(
        f"When little happens, and when many wait, {loop}",
        "library | lone request, 50 ms window: ms {:.1f} | waiting request: bytes {:,.0f}"
        " | answered too: bytes {:,.0f} | idle wake-ups/s {:.0f} | idle CPU: ms/s {:.1f}",
        BYTES.format(pending=run.options["pending"]),
    )
    names = ("latency_ms", "waiting_bytes", "peak_bytes", "wakeups", "idle_cpu_ms")
    for name, figures in run.samples[f"{loop}_quiet"].items():
        if isinstance(figures, dict):
            table.add(name, *(figures[key] for key in names))
    return table


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    del tables
    found = []
    for loop in LOOPS:
        loads = run.samples.get(loop, {})
        for load, runs in loads.items():
            if OURS in runs:
                found += _same_work(run, f"{loop}, {load}", runs)
        if loads:
            found += _beside_floor(loop, loads)
    for loop in LOOPS:
        found += _of_quiet(run, loop)
    return found


def _same_work(run: Run, where: str, runs: dict[str, Pairs]) -> Iterator[str]:
    """Compare with peers that get the same messages, and whose batch function composes the same prompt and reads the same reply."""
    facts, ours = run.samples["entries"], times_floor(runs[OURS])
    rivals = {
        name: times_floor(pairs) / ours
        for name, pairs in runs.items()
        if facts[name]["kind"] == "peer" and facts[name]["same_work"] and facts[name]["waits"]
    }
    if rivals:
        nearest = min(rivals, key=rivals.__getitem__)
        filling = own_median(runs[nearest], "batch")
        yield (
            f"{where}, on the same work: submit is at least {rivals[nearest]:.2f} times as fast as each of {len(rivals)} peers that wait; "
            f"target {AHEAD:g} {met(rivals[nearest] >= AHEAD)}. The nearest is {nearest.removesuffix(SAME_WORK)}, with {filling:.1f} items "
            "a batch."
        )
    if NEVER_WAITS in runs:
        times = ours / times_floor(runs[NEVER_WAITS])
        name = NEVER_WAITS.removesuffix(SAME_WORK)
        yield f"{where}, on the same work: submit takes {times:.2f} times the time of {name}, which never waits."


def _beside_floor(loop: str, loads: dict[str, dict[str, Pairs]]) -> Iterator[str]:
    ours = [f"{times_floor(runs[OURS]):.2f} ({load})" for load, runs in loads.items() if OURS in runs]
    if ours:
        yield f"{loop}: submit takes so many times the time of bare futures: {', '.join(ours)}."
    if LARGE in loads.get("steady", {}):
        yield (
            f"{loop}, steady: items of 1 KB under the default budget, whose tokens are counted, take "
            f"{times_floor(loads['steady'][LARGE]):.1f} times the time of bare futures."
        )
    worst = max(abs(times_floor(runs[FLOOR]) - 1) for runs in loads.values())
    busy = ": the machine was busy, and ratios are rough" if worst > NOISE else ""
    yield f"{loop}: the floor differs from itself by at most {worst:.0%} in the median{busy}."


def _of_quiet(run: Run, loop: str) -> Iterator[str]:
    figures = run.samples.get(f"{loop}_quiet", {})
    for name, failure in figures.items():
        if isinstance(failure, str):
            yield f"{loop}: {name} failed when many waited: {failure}."
    ours, floor = figures.get(OURS), figures.get(FLOOR)
    if isinstance(ours, dict) and isinstance(floor, dict):
        peak, bare = ours["peak_bytes"], floor["peak_bytes"]
        yield (
            f"{loop}: {peak:,.0f} bytes for each of {run.options['pending']:,} pending requests, of which bare futures take {bare:,.0f}; "
            f"target of at most {PEAK_BYTES:,} (2.3 KB) {met(peak <= PEAK_BYTES)}."
        )
        if ours["wakeups"] is not None:
            yield f"{loop}: {ours['wakeups']:.0f} wake-ups in an idle second; target of 0 {met(ours['wakeups'] <= 0)}."
        yield f"{loop}: a lone request is answered after {ours['latency_ms']:.1f} ms under a window of 50 ms."


SHOWN = {"burst 32": "20,000 at once, batches of 32", "steady": "256 workers in a loop, batches of 32"}
KINDS = ("microbatch", "peer that waits", "peer that does not", "floor")


def draw(run: Run, tables: dict[str, Table]) -> Figure:
    from matplotlib.patches import Patch

    from bench import plot  # imported late: the measured processes are to be without matplotlib

    colors = dict(zip(KINDS, (plot.OURS, *plot.OTHERS[:2], plot.MUTED), strict=True))
    figure, axes = plot.panels(len(SHOWN), width=6.4, height=6.0)
    for axis, (load, title) in zip(axes, SHOWN.items(), strict=True):
        _bars(axis, run, tables["asyncio"], f"{load}: x floor", colors)
        axis.set(title=title, xlabel="wall time, times that of bare futures")
        axis.margins(x=0.08)
        legend = [Patch(color=color, label=kind) for kind, color in colors.items()]
        axis.legend(handles=[*legend, axis.axvline(1, color="black", linewidth=1, label="bare futures")], fontsize=7)
    figure.suptitle(
        "The cost of submit, asyncio (pale: hands an integer on; same work: messages to prompt, reply to answers)"
    )
    return figure


def _bars(axis: Axes, run: Run, table: Table, column: str, colors: dict[str, str]) -> None:
    """Draw one bar for each row, the cheapest on top."""
    values = {name: row[column] for name, row in table.by("library").items()}
    names = sorted(values, key=values.__getitem__, reverse=True)
    bars = axis.barh(names, [values[name] for name in names], color=[colors[_kind(run, name)] for name in names])
    for bar, name in zip(bars, names, strict=True):
        facts = run.samples["entries"][name]
        bar.set_alpha(1.0 if facts["same_work"] or facts["kind"] == "ours" else 0.45)
    over_lines = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axis.bar_label(bars, [f"{values[name]:.1f}" for name in names], padding=3, fontsize=7, bbox=over_lines)
    axis.grid(visible=False, axis="y")


def _kind(run: Run, name: str) -> str:
    facts = run.samples["entries"][name]
    return KINDS[{"ours": 0, "floor": 3}.get(facts["kind"], 1 if facts["waits"] else 2)]
