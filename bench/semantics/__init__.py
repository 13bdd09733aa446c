"""The fate of callers when something goes wrong: the same probes for microbatch and for other collectors.

Every probe runs in an event loop of its own, over a batch function that answers every item by name, so that an answer that went to the
wrong caller is seen. The rule of each verdict stands beside its probe. For microbatch the batch function plays the model.
"""

from __future__ import annotations

import gc
import logging
import warnings
from typing import TYPE_CHECKING, Any

from bench import peers
from bench.benchmark import Option
from bench.report import Run, Table, met
from bench.semantics.ours import Ours
from bench.semantics.probes import PROBES
from bench.semantics.stage import HANG, MARKS, RIGHT, Stage

if TYPE_CHECKING:
    import argparse

QUESTION = "What happens to callers when one of them is cancelled, the backend fails, or the batcher is misused?"
COMPARED = list(peers.DISTRIBUTIONS)
OPTIONS = {
    "rounds": Option(int, 3, 1, "runs of every probe; the worst verdict counts"),
    "limit": Option(float, 1.5, 0.4, "seconds after which a caller is said to hang; answers take 0.04 s"),
}

KINDS = {Ours.name: Ours, **peers.PEERS, peers.Minimal.name: peers.Minimal}
del KINDS[peers.AsyncBatcherMany.name]  # the same library, which would get the same verdicts twice


def measure(options: argparse.Namespace) -> dict[str, Any]:
    rounds: dict[str, dict[str, list[Any]]] = {probe.name: {name: [] for name in KINDS} for probe in PROBES}
    strays: dict[str, list[str]] = {name: [] for name in KINDS}
    logging.disable(logging.CRITICAL)  # complaints of loops are counted, and the rest is in the verdicts
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(options.rounds):
                for name, kind in KINDS.items():
                    for probe in PROBES:
                        verdict = probe.run(Stage(kind, options.limit, strays[name]))
                        rounds[probe.name][name].append(verdict._asdict())
                    gc.collect()  # what was never retrieved is complained of now, under the right name
    finally:
        logging.disable(logging.NOTSET)
    return {"rounds": rounds, "complaints": {name: len(messages) for name, messages in strays.items()}}


def worst(run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the worst verdict of each probe and library."""
    order = list(MARKS)
    return {
        probe: {name: max(verdicts, key=lambda one: order.index(one["mark"])) for name, verdicts in by_name.items()}
        for probe, by_name in run.samples["rounds"].items()
    }


def tables(run: Run) -> dict[str, Table]:
    verdicts, complaints = worst(run), run.samples["complaints"]
    signs = "; ".join(f"{sign} {mark}" for mark, sign in MARKS.items())
    counts = Table(
        f"Verdicts of {len(verdicts)} probes",
        f"library | {' | '.join(f'{mark} {{:d}}' for mark in MARKS)} | complaints of the loop {{:d}}",
        "Complaints: exceptions in callbacks, and those of tasks and futures that were never retrieved. minimal: a list, a timer and a task per batch.",
    )
    for name, number in complaints.items():
        marks = [by_name[name]["mark"] for by_name in verdicts.values()]
        counts.add(name, *map(marks.count, MARKS), number)
    cells = Table(
        "Verdicts by probe and library",
        f"probe | {' | '.join(complaints)}",
        f"{signs}. Batches of four; the numbers are callers, or calls.",
    )
    for probe, by_name in verdicts.items():
        cells.add(probe, *(f"{MARKS[verdict['mark']]} {verdict['word']}" for verdict in by_name.values()))
    rules = Table(
        "The rules",
        "probe | rule",
        "What is neither right nor arguable is wrong; a caller who waits longer than "
        f"{run.options['limit']:g} s hangs, where answers take 0.04 s.",
    )
    for probe in PROBES:
        rules.add(probe.name, probe.rule)
    return {"counts": counts, "verdicts": cells, "rules": rules}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    verdicts, counts = worst(run), tables["counts"].by("library")
    ours = {probe: by_name[Ours.name] for probe, by_name in verdicts.items()}
    bad = [f"{probe} ({one['word']}: {one['detail']})" for probe, one in ours.items() if one["mark"] != RIGHT]
    names = list(counts)
    hung = [name for name in names if counts[name][HANG]]
    misled = [name for name in names if any(by_name[name]["misled"] for by_name in verdicts.values())]
    others = sorted(names[1:], key=lambda name: -counts[name][RIGHT])
    unsteady = [
        f"{probe} with {name}"
        for probe, by_name in run.samples["rounds"].items()
        for name, rounds in by_name.items()
        if len({one["mark"] for one in rounds}) > 1
    ]
    return [
        f"microbatch is right in {counts[Ours.name][RIGHT]} of {len(verdicts)} probes; target (all) {met(not bad)}"
        + (f": {'; '.join(bad)}." if bad else "."),
        f"Right in others, of {len(verdicts)}: {', '.join(f'{name} {counts[name][RIGHT]}' for name in others)}.",
        f"In some probe callers wait past the limit with: {', '.join(hung) or 'none'}.",
        f"In some probe callers get an answer that is not theirs with: {', '.join(misled) or 'none'}.",
        f"Verdicts that differed between rounds (the worst counts): {', '.join(unsteady) or 'none'}.",
        "In `fill while busy` each library makes as many calls at once as it does by default, which is one for async-batcher and batched; "
        "microbatch is set to one. dike ends what hangs here by its own limit, by default after 10 s.",
        "A verdict says what happens in a situation, not how often the situation comes up; generic collectors never promised what only a "
        "prompt needs, such as surviving a wrong number of results. SIMULATED: no model is asked anywhere here.",
    ]
