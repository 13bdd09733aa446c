"""The benchmarks by name, and their common interface."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from bench.report import Run, Table

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
SEED = 1


class Option(NamedTuple):
    """A command-line option of a benchmark, with its default in the full and in the short form."""

    type: Callable[[str], Any]
    full: Any
    quick: Any
    help: str


class Benchmark(Protocol):
    """The interface of a module of this folder that is named in `NAMES`.

    Attributes:
        QUESTION: The question it answers, in a sentence.
        COMPARED: The distributions whose versions matter.
        OPTIONS: Its own options by name.
    """

    QUESTION: str
    COMPARED: list[str]
    OPTIONS: dict[str, Option]

    @staticmethod
    def measure(options: argparse.Namespace) -> dict[str, Any]:
        """Return the raw samples; *options* has the benchmark's own, and `quick` and `seed`."""

    @staticmethod
    def tables(run: Run) -> dict[str, Table]:
        """Return the tables of *run* by name, from its samples and options alone."""

    @staticmethod
    def findings(run: Run, tables: dict[str, Table]) -> list[str]:
        """Return what *tables* show, in sentences, missed targets included."""

    # A module that has `draw(run, tables) -> Figure` also leaves a figure.
    draw: Callable[[Run, dict[str, Table]], Figure]


def load(name: str) -> Benchmark:
    try:
        return importlib.import_module(f"bench.{name}")
    except ModuleNotFoundError as error:
        raise SystemExit(f"bench: {error}; what it needs comes with: pip install -e '.[bench]'") from None
