"""`python -m bench` lists the benchmarks, `python -m bench NAME` runs one, `python -m bench all` each in a process of its own."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bench import report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = (
    "overhead",
    "semantics",
    "throughput",
    "latency",
    "demux",
    "scale",
    "overload",
    "stalls",
    "gateway",
    "hybrid",
    "quota",
)
RESULTS = Path(__file__).parent / "results"
SEED = 1


class Benchmark(Protocol):
    """What a module of this folder offers that answers a question.

    Attributes:
        QUESTION: What it answers, in a sentence.
        COMPARED: The distributions whose versions matter.
    """

    QUESTION: str
    COMPARED: list[str]

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add what can be set beside the common options."""

    @staticmethod
    def run(options: argparse.Namespace, found: report.Report) -> None:
        """Measure, and fill in *found*. `options.quick` asks for the short form, `options.seed` is the seed of all chance."""

    @staticmethod
    def draw(found: report.Report) -> Figure:
        """Draw what was found, from the report alone."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", metavar="NAME")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="the short form: fewer rounds, rougher figures")
    common.add_argument("--seed", type=int, default=SEED, help="of everything drawn by chance (default %(default)s)")
    common.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and figures (default bench/results)")
    modules: dict[str, Benchmark] = {}
    for name in NAMES:
        try:
            modules[name] = module = importlib.import_module(f"bench.{name}")
        except ModuleNotFoundError as error:
            raise SystemExit(f"bench: {error}; what it needs comes with: pip install -e '.[bench]'") from None
        module.add_arguments(
            commands.add_parser(name, parents=[common], help=module.QUESTION, description=module.__doc__)
        )
    commands.add_parser("all", parents=[common], help="all of them, one after the other")
    commands.add_parser("readme", parents=[common], help="write the results into the README")
    options = parser.parse_args(arguments)
    if options.name is None:
        parser.print_help()
        return 0
    if options.name == "all":
        return run_all(options)
    if options.name == "readme":
        from bench import readme

        return readme.main(options.out, quick=options.quick)
    run_one(options.name, modules[options.name], options)
    return 0


def run_one(name: str, module: Benchmark, options: argparse.Namespace) -> None:
    """Run a benchmark; print what it found, and leave it in the folder as JSON and as a figure."""
    own = {
        key: value
        for key, value in vars(options).items()
        if key not in ("name", "quick", "seed", "out") and value is not None
    }
    told = {key: value.name if isinstance(value, Path) else value for key, value in own.items()}
    found = report.begin(
        name, module.QUESTION, quick=options.quick, seed=options.seed, options=told, compared=module.COMPARED
    )
    start = time.perf_counter()
    module.run(options, found)
    found.seconds = time.perf_counter() - start
    print(found.text())
    written = found.write(options.out)
    figure = written.with_suffix(".svg")
    from bench import plot

    plot.save(module.draw(found), figure)
    print(f"written: {written}, {figure}")


def run_all(options: argparse.Namespace) -> int:
    """Run all of them; return 1 if one failed, 0 otherwise."""
    start, failed = time.perf_counter(), []
    for name in NAMES:
        command = [sys.executable, "-m", "bench", name, "--seed", str(options.seed), "--out", str(options.out)]
        print(f"\n== {name}", flush=True)
        if subprocess.run([*command, "--quick"] if options.quick else command, check=False).returncode:
            failed.append(name)
    print(f"\nall took {time.perf_counter() - start:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
