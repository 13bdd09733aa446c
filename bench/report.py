"""What a benchmark found: tables to read, samples to check them by, and what it ran on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

Cell = str | int | float | bool | None


class Column(msgspec.Struct, frozen=True):
    """One column of a table.

    Attributes:
        name: What it holds, its unit included.
        form: How a number is written, as in a format specification; "" for words.
    """

    name: str
    form: str = ""

    def show(self, cell: Cell) -> str:
        if cell is None:
            return "-"
        if isinstance(cell, str):
            return cell
        if isinstance(cell, bool):
            return "yes" if cell else "no"
        return format(cell, self.form)


class Table(msgspec.Struct):
    """Rows under named columns; cells are values, and are rounded only when shown."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]] = []
    notes: list[str] = []

    def add(self, *cells: Cell) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.title}: {len(cells)} cells under {len(self.columns)} columns")
        self.rows.append(list(cells))

    def shown(self) -> list[list[str]]:
        return [[column.show(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]

    def text(self) -> str:
        """Return the table for a terminal."""
        lines = [[column.name for column in self.columns], *self.shown()]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        pad = [str.rjust if self._numeric(at) else str.ljust for at in range(len(widths))]
        head, *body = ["  ".join(f(c, w) for f, c, w in zip(pad, line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.title, "", head, "  ".join("-" * width for width in widths), *body, *self._said()])

    def markdown(self) -> str:
        """Return the table for the README."""
        marks = ["---:" if self._numeric(at) else "---" for at in range(len(self.columns))]
        lines = [[column.name for column in self.columns], marks, *self.shown()]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def _numeric(self, at: int) -> bool:
        cells = [row[at] for row in self.rows if row[at] is not None]
        return bool(cells) and not any(isinstance(cell, str | bool) for cell in cells)

    def _said(self) -> list[str]:
        return ["", *self.notes] if self.notes else []


class Machine(msgspec.Struct, frozen=True):
    """Where it ran."""

    python: str
    system: str
    processor: str
    cores: int
    memory_gib: float
    load_before: float

    def __str__(self) -> str:
        return (
            f"Python {self.python}, {self.system}, {self.processor}, {self.cores} cores, {self.memory_gib:.0f} GiB, "
            f"load {self.load_before:.1f} at the start"
        )


class Report(msgspec.Struct):
    """All that one run of a benchmark leaves behind.

    Attributes:
        name: The benchmark's.
        question: What it answers, in a sentence.
        quick: Whether it was the short form, whose figures are rougher.
        seed: Of everything drawn by chance.
        options: What else it was told.
        machine: Where it ran.
        versions: Of the distributions compared.
        date: When it started, ISO 8601, UTC.
        seconds: How long it took.
        tables: By name.
        findings: What they say, in sentences, with the shortfalls.
        samples: The raw measurements behind the tables.
    """

    name: str
    question: str
    quick: bool
    seed: int
    options: dict[str, Any]
    machine: Machine
    versions: dict[str, str]
    date: str
    seconds: float = 0.0
    tables: dict[str, Table] = {}
    findings: list[str] = []
    samples: dict[str, Any] = {}

    def text(self) -> str:
        """Return the report for a terminal."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        head = f"{self.name}: {self.question}\n{self.machine}\n{versions}; seed {self.seed}{', quick' if self.quick else ''}"
        tables = [table.text() for table in self.tables.values()]
        findings = ["\n".join(f"* {finding}" for finding in self.findings)] if self.findings else []
        return "\n\n".join([head, *tables, *findings, f"took {self.seconds:.0f} s"])

    def write(self, folder: Path) -> Path:
        """Write it to *folder* as JSON; return the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Report:
        return msgspec.json.decode(path.read_bytes(), type=cls)


def begin(name: str, question: str, *, quick: bool, seed: int, options: dict[str, Any], compared: list[str]) -> Report:
    """Start the report of a benchmark that compares the distributions *compared*, of which any may be missing."""
    versions = {dist: version for dist in ["microbatch", *compared] if (version := version_of(dist)) is not None}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Report(name, question, quick, seed, options, machine(), versions, date)


def met(so: bool) -> str:
    """Return the verdict on a target or promise, worded alike everywhere: a miss is not to be overlooked."""
    return "met" if so else "MISSED"


def version_of(distribution: str) -> str | None:
    """Return the version of *distribution*, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def machine() -> Machine:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine(
        platform.python_version(),
        f"{platform.system()} {platform.machine()}",
        _processor(),
        os.cpu_count() or 1,
        memory,
        os.getloadavg()[0],
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"
