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
    "embeddings",
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
    "integrity",
    "cheaper",
    "semantic",
    "lookups",
)
SEED = 1


class Option(NamedTuple):
    """A command-line option of a benchmark, with its default in the full and in the short form; one of type bool takes no value."""

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
        measure: Returns the raw samples; the options are its own, and `quick` and `seed`.
        tables: Returns the tables of a run by name, from its samples and options alone.
        findings: Returns what the tables show, in sentences, missed targets included.
        draw: Draws a figure; a module may lack it.
    """

    QUESTION: str
    COMPARED: list[str]
    OPTIONS: dict[str, Option]
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    tables: Callable[[Run], dict[str, Table]]
    findings: Callable[[Run, dict[str, Table]], list[str]]
    draw: Callable[[Run, dict[str, Table]], Figure]


def load(name: str) -> Benchmark:
    try:
        return importlib.import_module(f"bench.{name}")
    except ModuleNotFoundError as error:
        raise missing(error) from None


def missing(error: ModuleNotFoundError) -> SystemExit:
    """Return the end of the command for a package that is not installed."""
    return SystemExit(f"bench: {error}; what it needs comes with: pip install -e '.[bench]'")
