"""`python -m bench` lists the benchmarks, `python -m bench NAME` runs one, `python -m bench all` runs each in its own process."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench import plot, results
from bench.benchmark import NAMES, SEED, load
from bench.report import Run, begin

if TYPE_CHECKING:
    from bench.benchmark import Benchmark

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", metavar="NAME")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="the short form: fewer rounds, rougher figures")
    common.add_argument("--seed", type=int, default=SEED, help="of all random numbers (default %(default)s)")
    common.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and figures (default bench/results)")
    # To run one of them, what the others need is not imported.
    asked = (sys.argv[1:] if arguments is None else arguments)[:1]
    modules = {name: load(name) for name in (asked if asked and asked[0] in NAMES else NAMES)}
    for name, module in modules.items():
        command = commands.add_parser(name, parents=[common], help=module.QUESTION, description=module.__doc__)
        for key, option in module.OPTIONS.items():
            default = f"{option.full}; {option.quick} if quick" if option.full != option.quick else option.full
            words = f"{option.help} (default {default})"
            how = {"action": "store_const", "const": True} if option.type is bool else {"type": option.type}
            command.add_argument(f"--{key.replace('_', '-')}", help=words, **how)
    commands.add_parser("all", parents=[common], help="all of them, one after the other")
    commands.add_parser("results", parents=[common], help="publish the results, and write bench/RESULTS.md")
    options = parser.parse_args(arguments)
    if options.name is None:
        parser.print_help()
        return 0
    if options.name == "all":
        return run_all(options)
    if options.name == "results":
        return results.main(options.out, quick=options.quick)
    run_one(options.name, modules[options.name], options)
    return 0


def run_one(name: str, module: Benchmark, options: argparse.Namespace) -> None:
    """Run a benchmark; write its samples and its figure, and print its tables and findings."""
    for key, option in module.OPTIONS.items():
        if getattr(options, key) is None:
            setattr(options, key, option.quick if options.quick else option.full)
    own = {key: getattr(options, key) for key in module.OPTIONS}
    run = begin(name, quick=options.quick, seed=options.seed, options=own, compared=module.COMPARED)
    start = time.perf_counter()
    run.samples = module.measure(options)
    run.seconds = time.perf_counter() - start
    path = run.write(options.out)
    run = Run.read(path)  # so that what is reported is what the file says
    print(results.section(run))
    print(f"written: {path}")
    if hasattr(module, "draw"):
        plot.save(module.draw(run, module.tables(run)), path.with_suffix(".svg"))


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
