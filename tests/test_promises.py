"""Every promise in the documentation is shown by tests, and names them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| `(\w+)` \| (.+) \| (.+) \| `(.+)` \|$", re.MULTILINE)


def promised():
    """The table in the documentation: name -> (words, files, command)."""
    rows = ROW.findall((ROOT / "microbatch" / "docs" / "reliability.md").read_text("utf-8"))
    assert len({name for name, *_ in rows}) == len(rows) > 15
    return {name: (words, set(re.findall(r"`([^`]+)`", files)), command) for name, words, files, command in rows}


def shown():
    """The marks in the tests: name -> files that hold a test with it."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.promise":
                (keyword,) = node.keywords
                assert keyword.arg == "of", path
                name = ast.literal_eval(keyword.value)
                found.setdefault(name, set()).add(place(path))
    return found


def place(path: Path) -> str:
    """How the table names *path*: the simulation is one place."""
    return "simulation" if path.parent.name == "simulation" else path.name


def test_every_promise_is_shown_by_the_tests_that_the_table_names_and_every_mark_is_promised():
    assert {name: files for name, (_, files, _) in promised().items()} == shown()


def test_the_command_of_each_promise_runs_its_tests():
    for name, (_, _, command) in promised().items():
        assert command == f"pytest -m \"promise(of='{name}')\""
