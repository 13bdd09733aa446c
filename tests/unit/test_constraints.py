"""The test command installs exact versions; users are asked for minimums only."""

import re
import tomllib
from pathlib import Path

from helpers import each
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OWN = PROJECT["project"]["name"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIRED = PROJECT["project"]["dependencies"]
# The frameworks cannot be installed beside the rest, so they have constraints of their own.
ASKED = {
    "tests/constraints.txt": [
        *REQUIRED,
        *PROJECT["build-system"]["requires"],
        *(asked for extra, requirements in EXTRAS.items() if extra != "frameworks" for asked in requirements),
    ],
    "tests/frameworks/constraints.txt": [*REQUIRED, *EXTRAS["frameworks"]],
}


def lines_of(file):
    return [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]


def pinned(file):
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines_of(file))}


def foreign(file):
    return [asked for asked in map(Requirement, ASKED[file]) if asked.name != OWN]


@each("file, line", [(file, line) for file in ASKED for line in lines_of(file)])
def test_a_constraint_is_a_name_and_an_exact_version(file, line):
    """No address, no hash, no marker: it holds wherever the command is run."""
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9A-Za-z.+]*", line)


@each("file", ASKED)
def test_nothing_is_pinned_twice(file):
    assert len(pinned(file)) == len(lines_of(file))


@each("file, asked", [(file, asked) for file in ASKED for asked in foreign(file)])
def test_every_requirement_is_pinned_to_a_version_that_it_takes(file, asked):
    assert asked.specifier.contains(pinned(file)[canonicalize_name(asked.name)])


@each("asked", [asked for file in ASKED for asked in foreign(file)])
def test_a_requirement_is_a_minimum_and_nothing_else(asked):
    assert [each.operator for each in asked.specifier] == [">="]
    assert asked.url is None


def test_ci_installs_the_frameworks_with_their_own_constraints():
    script = (ROOT / ".ci/run").read_text()
    assert "PIP_CONSTRAINT=tests/frameworks/constraints.txt " in script
    assert "pytest -q -n 2 tests/frameworks" in script


def test_the_test_command_uses_the_constraints_and_the_others_do_not():
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if re.match(r"python3 -m venv \S+ && ", line)]
    run, test, latest = commands
    assert "PIP_CONSTRAINT=tests/constraints.txt PIP_BUILD_CONSTRAINT=tests/constraints.txt " in test
    assert "CONSTRAINT" not in run + latest
    assert readme.index("## Test it") < readme.index(test) < readme.index(latest)
