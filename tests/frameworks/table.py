"""The table in microbatch/docs/frameworks.md: written from what these tests measure, and read by them."""

from __future__ import annotations

import re
from pathlib import Path

AI_SDK = "ai-sdk"
GATEWAY = "gateway"
CLIENT = "AsyncOpenAI"
COLUMNS = {GATEWAY: "gateway", CLIENT: "`AsyncOpenAI`"}

PAGE = Path(__file__).parents[2] / "microbatch" / "docs" / "frameworks.md"
CONSTRAINTS = Path(__file__).parent / "constraints.txt"
WRITE = "MICROBATCH_WRITE_TABLE"
"""Environment variable with which the table is written."""

MOST_CALLS = 3
"""Upstream calls for all callers of a case, if it is combined."""

NO_ANSWER = "no answer"
NOT_MEASURED = "-"
_PACKAGES = {
    "openai": ("openai",),
    "instructor": ("instructor",),
    "pydantic-ai": ("pydantic-ai-slim",),
    "langchain-openai": ("langchain-openai",),
    "litellm": ("litellm",),
    "llama-index": ("llama-index-llms-openai", "llama-index-llms-openai-like"),
    "llama-index-embeddings": ("llama-index-embeddings-openai",),
}
_NODE_VERSIONS = "ai 6.0, @ai-sdk/openai 3.0, @ai-sdk/openai-compatible 2.0"
_HEAD = f"| framework | mode | {' | '.join(COLUMNS.values())} | versions |"
_TABLE = re.compile(re.escape(_HEAD) + r"\n(?:\|.*\n)*")


def versions(framework: str) -> str:
    """Return the versions of a framework that the constraints pin."""
    if framework == AI_SDK:
        return _NODE_VERSIONS
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    return ", ".join(f"{name} {pins[name]}" for name in _PACKAGES[framework])


def cell(right: int, calls: int) -> str:
    return str(calls) if right else NO_ANSWER


def written(rows: list[tuple[str, str, str, int, int, str]]) -> str:
    """Return the table of what was measured, one line for each framework and mode."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for framework, mode, through, right, calls, _ in rows:
        found.setdefault((framework, mode), {})[through] = cell(right, calls)
    lines = [_HEAD, "|---" * (3 + len(COLUMNS)) + "|"]
    for (framework, mode), cells in sorted(found.items()):
        counts = " | ".join(cells.get(through, NOT_MEASURED) for through in COLUMNS)
        lines.append(f"| {framework} | {mode} | {counts} | {versions(framework)} |")
    return "\n".join(lines) + "\n"


def write(rows: list[tuple[str, str, str, int, int, str]]) -> None:
    page = PAGE.read_text()
    table = written(rows)
    PAGE.write_text(_TABLE.sub(lambda _: table, page))


def documented() -> dict[tuple[str, str, str], str]:
    """Return the cells of the table, by framework, mode and way."""
    found = _TABLE.search(PAGE.read_text())
    assert found is not None, f"{PAGE.name} has no table; with {WRITE}=1 and its head it is written"
    cells = {}
    for line in found[0].splitlines()[2:]:
        framework, mode, *counts, pins = (part.strip() for part in line.strip("|").split("|"))
        assert pins == versions(framework), (
            f"{framework}: written for other versions; set {WRITE}=1 to write the table anew"
        )
        cells |= {(framework, mode, through): count for through, count in zip(COLUMNS, counts, strict=True)}
    return cells
