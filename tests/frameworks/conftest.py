"""Prints what was measured as one table after all tests, also where they run in several processes."""

import gc
import os

import pytest
import table

# Otherwise the import of litellm asks a server of theirs for prices.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

ROWS = "microbatch frameworks"
HEAD = ("framework", "mode", "through", "right", "calls", "first error")


@pytest.fixture
def record(record_property):
    """Return a function that takes the cells of a row."""

    def add(*cells):
        record_property(ROWS, cells)

    return add


@pytest.fixture(autouse=True)
def left_open():
    """Find what a framework leaves open while its warnings are ignored."""
    yield
    gc.collect()


def pytest_terminal_summary(terminalreporter):
    reports = [
        report for kind in terminalreporter.stats.values() for report in kind if getattr(report, "when", "") == "call"
    ]
    rows = [value for report in reports for name, value in report.user_properties if name == ROWS]
    if not rows:
        return
    if table.WRITE in os.environ:
        table.write(rows)
    lines = [HEAD, *sorted(map(tuple, rows))]
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(HEAD))]
    terminalreporter.section("16 concurrent callers of each framework")
    for line in lines:
        cells = (str(cell).ljust(width) for cell, width in zip(line, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
