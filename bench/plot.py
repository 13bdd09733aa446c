"""Figures in one style; each benchmark says what is on its axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.benchmark import missing

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise missing(error) from None

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

OURS = "#c2410c"
OTHERS = ("#1d4ed8", "#0f766e", "#7c3aed", "#a16207", "#be185d", "#475569", "#15803d", "#0369a1")
MUTED = "#94a3b8"

# For the whole process: legends and labels that are added to a figure later follow it too.
mpl.rcParams.update(
    {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 9,
        "grid.color": "#e2e8f0",
        "legend.frameon": False,
        "svg.fonttype": "none",  # text stays text: smaller, and searchable
        "svg.hashsalt": "microbatch",  # the same figure gives the same file
    }
)


def panels(count: int = 1, *, width: float = 5.2, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """Return a figure with *count* panels side by side, each *width* x *height* inches."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
