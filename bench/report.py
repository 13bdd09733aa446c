"""The results of one run: its raw samples, and the tables and findings that are computed from them."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

Cell = str | int | float | bool | None


class Table:
    """Rows under named columns. Cells hold exact values, which are rounded only when the table is shown.

    Args:
        title: Shown above.
        head: The columns, each with the format of its numbers: "library | items {:,} | us {:.1f}".
        notes: Shown below.
    """

    def __init__(self, title: str, head: str, *notes: str) -> None:
        columns = [column.partition(" {") for column in head.split(" | ")]
        self.title, self.notes = title, notes
        self.columns = {name: (brace + form).strip() for name, brace, form in columns}
        self.rows: list[list[Cell]] = []

    def add(self, *cells: Cell) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.title}: {len(cells)} cells under {len(self.columns)} columns")
        self.rows.append(list(cells))

    def by(self, *keys: str) -> dict[Any, dict[str, Any]]:
        """Return the rows as records, by the value of one column or by the values of several."""
        records = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        if len(keys) == 1:
            return {record[keys[0]]: record for record in records}
        return {tuple(record[key] for key in keys): record for record in records}

    def markdown(self) -> str:
        """Return title, rows and notes as Markdown, aligned so that it can be read as it is."""
        columns = list(zip(list(self.columns), *self._shown(), strict=True))
        widths = [max(map(len, column)) for column in columns]
        numeric = [bool(form) for form in self.columns.values()]
        pad = [str.rjust if number else str.ljust for number in numeric]
        head, *rows = [
            "| " + " | ".join(f(cell, width) for f, cell, width in zip(pad, row, widths, strict=True)) + " |"
            for row in zip(*columns, strict=True)
        ]
        ends = [("-:" if number else "--").rjust(width, "-") for number, width in zip(numeric, widths, strict=True)]
        lines = [head, "| " + " | ".join(ends) + " |", *rows]
        return "\n\n".join([f"*{self.title}*", "\n".join(lines), *self.notes])

    def _shown(self) -> list[list[str]]:
        return [[_show(cell, form) for cell, form in zip(row, self.columns.values(), strict=True)] for row in self.rows]


def _show(cell: Cell, form: str) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    words = form.format(cell) if form and not isinstance(cell, str) else str(cell)
    return words.replace("|", "\\|")


class Run(msgspec.Struct):
    """One run of a benchmark, as it is written to disk.

    Attributes:
        quick: Whether it was the short form, whose figures are rougher.
        seed: Seed of all random numbers.
        options: The benchmark's own options, defaults included.
        versions: Versions of the distributions that matter.
        date: When it started, ISO 8601, UTC.
        seconds: How long it took.
        samples: The raw measurements. Tables and findings are computed from them and from the options alone.
    """

    name: str
    quick: bool
    seed: int
    options: dict[str, Any]
    machine: str
    versions: dict[str, str]
    date: str
    seconds: float = 0.0
    samples: dict[str, Any] = {}

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Run:
        return msgspec.json.decode(path.read_bytes(), type=cls)


def begin(name: str, *, quick: bool, seed: int, options: dict[str, Any], compared: list[str]) -> Run:
    """Return a run without samples; distributions in *compared* that are not installed are left out."""
    versions = {dist: version for dist in ["microbatch", *compared] if (version := version_of(dist)) is not None}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Run(name, quick, seed, options, machine(), versions, date)


def met(so: bool) -> str:
    """Return the verdict on a target or promise, in the same words everywhere."""
    return "met" if so else "MISSED"


def version_of(distribution: str) -> str | None:
    """Return the version of *distribution*, or None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def machine() -> str:
    """Return what the figures depend on beside the code, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores, "
        f"{memory:.0f} GiB, load {os.getloadavg()[0]:.1f} at the start"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"
