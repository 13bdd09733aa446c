"""Plays any number of scenarios, or one of them with its whole trace.

python tests/simulation/run.py --scenarios 200000 --jobs 2
python tests/simulation/run.py --seed 1234
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import functools
import hashlib
import multiprocessing
import sys
import time
from pathlib import Path
from random import Random

# As a script this runs in any directory, and outside of pytest, which knows where tests and library are.
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from simulation import invariants, mixed_invariants, mixed_scenario, mixed_world, scenario, world

SLICE = 500
"""Scenarios between two signs of life."""


MIXED_EVERY = 3
"""Of so many seeds one draws a run of several parts."""


def play_seed(seed: int) -> world.World | mixed_world.MixedWorld:
    """Play the scenario with *seed*."""
    if seed % MIXED_EVERY == MIXED_EVERY - 1:
        return mixed_world.play(mixed_scenario.draw(Random(seed)))
    return world.play(scenario.draw(Random(seed)))


def breaches(played: world.World | mixed_world.MixedWorld) -> list[str]:
    """Return what is wrong with the run; nothing, if the library keeps its promises."""
    judge = invariants.breaches if isinstance(played, world.World) else mixed_invariants.breaches
    return judge(played)


def command(seed: int) -> str:
    """Return what replays *seed*."""
    return f"python tests/simulation/run.py --seed {seed}"


def play_slice(seeds: range, *, trace: bool = False) -> tuple[list[tuple[int, list[str]]], str]:
    """Play *seeds*; return those in which something is wrong, and a digest of their traces if asked for."""
    bad, digest = [], hashlib.blake2b(digest_size=8)
    for seed in seeds:
        try:
            played = play_seed(seed)
            found = breaches(played)
        except Exception as error:  # noqa: BLE001 a harness that falls over must still name the seed
            found = [f"the simulation itself failed: {error!r}"]
        else:
            if trace:
                digest.update(repr(played.trace).encode())
        if found:
            bad.append((seed, found))
    return bad, digest.hexdigest()


def main() -> int:
    """Run from the command line; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", type=int, default=2_000, help="how many to play (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s)")
    parser.add_argument("--seed", type=int, help="play this one alone and print its trace")
    parser.add_argument("--digest", action="store_true", help="print a digest of all traces, to compare runs")
    args = parser.parse_args()
    if args.seed is not None:
        return replay(args.seed)
    end = args.first + args.scenarios
    slices = [range(start, min(end, start + SLICE)) for start in range(args.first, end, SLICE)]
    begun, failures, played, digests = time.perf_counter(), 0, 0, []
    with multiprocessing.Pool(args.jobs) as pool:
        for part, (bad, digest) in zip(
            slices, pool.imap(functools.partial(play_slice, trace=args.digest), slices), strict=True
        ):
            played += len(part)
            digests.append(digest)
            for seed, found in bad:
                failures += 1
                print(
                    f"seed {seed}: {found[0]}{f' (and {len(found) - 1} more)' if found[1:] else ''}\n    {command(seed)}"
                )
            seconds = time.perf_counter() - begun
            print(f"{played} scenarios, {failures} failed, {played / seconds:.0f} a second", file=sys.stderr, end="\r")
    print(f"{played} scenarios, {failures} failed, {played / seconds:.0f} a second", " " * 20)
    if args.digest:
        print("digest", hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest())
    return 1 if failures else 0


def replay(seed: int) -> int:
    """Play one scenario and print all of it."""
    played = play_seed(seed)
    print(played.scenario)
    for now, turn, *what in played.trace:
        print(f"{now:10.6f} {turn:5} ", *what)
    found = breaches(played)
    print(*(found or ["nothing is wrong"]), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
