"""What happens when something goes wrong: the same probes put to microbatch and to what a user would pick instead.

Every probe runs in an event loop of its own, over a batch function that answers every item by name, so that an answer that went to the
wrong caller is seen. The rule by which its verdict is given stands beside it. For microbatch the batch function plays the model.
"""

from __future__ import annotations

import gc
import logging
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from bench import peers
from bench.peers.floors import Minimal
from bench.report import Column, Table
from bench.semantics import figure, probes
from bench.semantics.ours import Ours
from bench.semantics.stage import Stage
from bench.semantics.verdict import HANG, MARKS, RIGHT, Verdict

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from bench.report import Report

QUESTION = "What happens to callers when one of them is cancelled, the backend fails, or the batcher is misused?"
COMPARED = list(peers.DISTRIBUTIONS)

LIMITS = {True: 0.4, False: 1.5}
"""Seconds after which a caller is said to hang, for the short and the long form. Answers take 0.04 s."""

ROUNDS = {True: 1, False: 3}
"""How often every probe is run; the worst verdict counts."""

Verdicts = dict[str, dict[str, list[Verdict]]]
"""Of each probe and library, one a round."""

draw = figure.draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to set."""


def run(options: argparse.Namespace, found: Report) -> None:
    kinds = {Ours.name: Ours, **asked(), Minimal.name: Minimal}
    strays: dict[str, list[str]] = {name: [] for name in kinds}
    verdicts: Verdicts = {probe.name: {name: [] for name in kinds} for probe in probes.PROBES}
    limit = LIMITS[options.quick]
    with quiet():
        for _ in range(ROUNDS[options.quick]):
            for name, kind in kinds.items():
                for probe in probes.PROBES:
                    verdicts[probe.name][name].append(timed(probe, Stage(kind, limit, strays[name])))
                gc.collect()  # what was never retrieved is complained of now, under the right name
        unlimited = timed(probes.PROBES[-1], Stage(Unlimited, limit, []))
    worst = {
        probe: {name: max(rounds, key=lambda one: list(MARKS).index(one.mark)) for name, rounds in by_name.items()}
        for probe, by_name in verdicts.items()
    }
    found.samples["verdicts"] = msgspec.to_builtins(worst)
    found.samples["rounds"] = {
        probe: {name: [one.cell for one in rounds] for name, rounds in by_name.items()}
        for probe, by_name in verdicts.items()
    }
    found.samples["distributions"] = {name: kind.distribution for name, kind in kinds.items()}
    found.samples["strays"] = {name: sorted(set(messages)) for name, messages in strays.items()}
    found.tables["semantics"] = cells(worst)
    found.tables["semantics_counts"] = counts(worst, strays)
    found.tables["semantics_rules"] = rules(limit)
    found.findings += findings(worst, verdicts, unlimited)


class Unlimited(Ours):
    """As many calls at once as it makes by default; what that does to filling is told in a note."""

    one_call = None


def asked() -> dict[str, type[peers.Peer]]:
    """Return the peers; one library twice, with another limit on its calls at once, would give the same verdicts twice."""
    return {name: kind for name, kind in peers.installed().items() if name in peers.MODULES}


def timed(probe: probes.Probe, stage: Stage) -> Verdict:
    start = time.perf_counter()
    verdict = probe.run(stage)
    return msgspec.structs.replace(verdict, seconds=time.perf_counter() - start)


@contextmanager
def quiet() -> Iterator[None]:
    """Let libraries complain in silence: what loops complain of is counted, and the rest is in the verdicts."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def cells(worst: dict[str, dict[str, Verdict]]) -> Table:
    names = list(next(iter(worst.values())))
    table = Table(
        "What happens, by probe and library", [Column("probe"), *(Column(name.partition(".")[0]) for name in names)]
    )
    for probe, by_name in worst.items():
        table.add(probe, *(verdict.cell for verdict in by_name.values()))
    table.notes = [
        "; ".join(f"{sign} {mark}" for mark, sign in MARKS.items())
        + ". Batches of four; the numbers are callers, or calls.",
        "`minimal` is what one would write by hand: a list, a timer and a task for each batch.",
    ]
    return table


def counts(worst: dict[str, dict[str, Verdict]], strays: dict[str, list[str]]) -> Table:
    table = Table(
        f"Verdicts of {len(worst)} probes",
        [Column("library"), *(Column(mark, "d") for mark in MARKS), Column("complaints of the loop", "d")],
    )
    for name, messages in strays.items():
        marks = [by_name[name].mark for by_name in worst.values()]
        table.add(name, *map(marks.count, MARKS), len(messages))
    table.notes = ["Complaints: exceptions in callbacks, and those of tasks and futures that nobody retrieved."]
    return table


def rules(limit: float) -> Table:
    table = Table("The rules", [Column("probe"), Column("rule")])
    for probe in probes.PROBES:
        table.add(probe.name, probe.rule)
    table.notes = [
        "What is neither right nor arguable is wrong; "
        f"a caller who waits longer than {limit:g} s hangs, where answers take 0.04 s."
    ]
    return table


def findings(worst: dict[str, dict[str, Verdict]], verdicts: Verdicts, unlimited: Verdict) -> list[str]:
    total, names = len(worst), list(next(iter(worst.values())))
    ours = {probe: by_name[Ours.name] for probe, by_name in worst.items()}
    bad = [f"{probe} ({verdict.word}: {verdict.detail})" for probe, verdict in ours.items() if verdict.mark != RIGHT]
    rights = {name: sum(by_name[name].mark == RIGHT for by_name in worst.values()) for name in names}
    others = sorted(names[1:], key=lambda name: -rights[name])
    said = [
        f"microbatch is right in {rights[Ours.name]} of {total} probes; target (all) "
        + (f"MISSED: {'; '.join(bad)}." if bad else "met."),
        f"Right in others, of {total}: {', '.join(f'{name} {rights[name]}' for name in others)}.",
    ]
    hung = [name for name in names if any(by_name[name].mark == HANG for by_name in worst.values())]
    misled = [name for name in names if any(by_name[name].misled for by_name in worst.values())]
    said.append(f"In some probe callers wait past the limit with: {', '.join(hung) or 'none'}.")
    said.append(f"In some probe callers get an answer that is not theirs with: {', '.join(misled) or 'none'}.")
    fill = worst[probes.PROBES[-1].name]
    said.append(
        f"In `{probes.PROBES[-1].name}` each library makes as many calls at once as it does by default, which is one for async-batcher "
        "and batched; microbatch is set to one by max_concurrent_batches=1 "
        f"({fill[Ours.name].word}). At its default of 64 and this window of {probes.WINDOW * 1000:.0f} ms nothing is ever "
        f"saturated, and it makes {unlimited.word}."
    )
    unsteady = [
        f"{probe} with {name}"
        for probe, by_name in verdicts.items()
        for name, rounds in by_name.items()
        if len({one.mark for one in rounds}) > 1
    ]
    if len(next(iter(verdicts.values()))[Ours.name]) > 1:
        said.append(f"Verdicts that differed between rounds (the worst counts): {', '.join(unsteady) or 'none'}.")
    if any("dike.batch" in by_name and by_name["dike.batch"].mark == HANG for by_name in worst.values()):
        said.append(
            "dike ends what hangs here by its own limit, with an error after max_processing_time, by default 10 s."
        )
    said += [f"Not compared: {name} ({reason})." for name, reason in peers.absent().items()]
    said.append(
        "A verdict tells what happens in this situation, not how often the situation comes up; generic collectors never promised "
        "what only a prompt needs, such as surviving a wrong number of results. SIMULATED: no model is asked anywhere here."
    )
    return said
