"""The test command installs exact versions; users are asked for minimums only."""

import re
import tomllib
from pathlib import Path

from helpers import each
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = [
    line for line in (ROOT / "tests/constraints.txt").read_text().splitlines() if line and not line.startswith("#")
]
PINNED = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in LINES}

OWN = PROJECT["project"]["name"]
ASKED = [
    Requirement(each)
    for group in (
        PROJECT["project"]["dependencies"],
        PROJECT["build-system"]["requires"],
        # The frameworks cannot be installed beside the rest, so the constraints are not theirs.
        *(asked for extra, asked in PROJECT["project"]["optional-dependencies"].items() if extra != "frameworks"),
    )
    for each in group
]
FOREIGN = [each for each in ASKED if each.name != OWN]


@each("line", LINES)
def test_a_constraint_is_a_name_and_an_exact_version(line):
    """No address, no hash, no marker: it holds wherever the command is run."""
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9A-Za-z.+]*", line)


def test_nothing_is_pinned_twice():
    assert len(PINNED) == len(LINES)


@each("asked", FOREIGN)
def test_every_requirement_is_pinned_to_a_version_that_it_takes(asked):
    assert asked.specifier.contains(PINNED[canonicalize_name(asked.name)])


@each("asked", FOREIGN)
def test_a_requirement_is_a_minimum_and_nothing_else(asked):
    assert [each.operator for each in asked.specifier] == [">="]
    assert asked.url is None


def test_the_test_command_uses_the_constraints_and_the_others_do_not():
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if re.match(r"python3 -m venv \S+ && ", line)]
    run, test, latest = commands
    assert "PIP_CONSTRAINT=tests/constraints.txt PIP_BUILD_CONSTRAINT=tests/constraints.txt " in test
    assert "CONSTRAINT" not in run + latest
    assert readme.index("## Test it") < readme.index(test) < readme.index(latest)
