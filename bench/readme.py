"""`python -m bench readme` writes what the benchmarks found into the README, so that no figure there is typed by hand.

What stands between these marks is written anew each time, from the reports in `bench/published`, which are in the repository:

    <!-- bench: overhead burst -->                  the table of that name, and what it was measured by
    <!-- /bench -->

    <!-- bench: overhead findings -->               what was found, as a list
    <!-- /bench -->

    adds <!-- bench: gateway latency columns="p50 ms" rows="whole" rows="gateway" -->1.5<!-- /bench --> ms

The last, within a line, is a single cell. `columns="library | burst 32"` shows these columns in this order. `rows="a | b"` keeps the
rows of which a cell reads so, or the findings in which the words occur; given twice, both have to be met.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from bench.__main__ import SEED
from bench.report import Report, Table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PUBLISHED = Path(__file__).parent / "published"
FINDINGS = "findings"

_REGION = re.compile(
    r"(?P<head><!-- bench: (?P<name>\w+) (?P<what>\S+)(?P<choices>(?: \w+=\"[^\"]*\")*) -->)"
    r"(?P<body>(?:(?!<!-- /?bench).)*)(?P<foot><!-- /bench -->)",
    re.DOTALL,
)
_MARK = re.compile(r"<!-- /?bench.*")
_CHOICE = re.compile(r'(\w+)="([^"]*)"')
_FIGURE = re.compile(r"bench/published/(\w+)\.svg")


class ReadmeError(Exception):
    """A region of the README asks for what is not there."""


def main(results: Path, *, readme: Path = README, published: Path = PUBLISHED, quick: bool = False) -> int:
    """Publish the reports in *results* that the README uses, and write the README; return 1 if something is missing.

    A report that is not in *results* stays as it was published. With *quick* those of the short form will do.
    """
    text = readme.read_text("utf-8")
    try:
        publish(text, results, published, quick=quick)
        readme.write_text(rendered(text, published), "utf-8")
    except ReadmeError as error:
        print(f"bench readme: {error}", file=sys.stderr)
        return 1
    return 0


def publish(text: str, results: Path, published: Path, *, quick: bool) -> None:
    """Copy the reports and figures that *text* uses from *results* to *published*."""
    figures = set(_FIGURE.findall(text))
    names = sorted({region["name"] for region in _regions(text)} | figures)
    fresh = [name for name in names if (results / f"{name}.json").exists()]
    for name in fresh:
        if Report.read(results / f"{name}.json").quick and not quick:
            raise ReadmeError(
                f"{results / name}.json is of a --quick run, too rough for the README: run `python -m bench {name}`"
            )
    sources = {name: results if name in fresh else published for name in figures}
    if missing := [name for name, folder in sorted(sources.items()) if not (folder / f"{name}.svg").exists()]:
        raise ReadmeError(f"the README shows figures that have not been drawn: {', '.join(missing)}")
    published.mkdir(parents=True, exist_ok=True)
    for name in fresh:
        shutil.copyfile(results / f"{name}.json", published / f"{name}.json")
        if name in figures:
            shutil.copyfile(results / f"{name}.svg", published / f"{name}.svg")


def rendered(text: str, published: Path) -> str:
    """Return *text* with its regions as the reports in *published* have them.

    Raises:
        ReadmeError: A region is not well-formed, or asks for what is not there.
    """
    _regions(text)
    return _REGION.sub(lambda region: region["head"] + _body(region, published) + region["foot"], text)


def _regions(text: str) -> list[re.Match[str]]:
    if left := _MARK.search(_REGION.sub("", text)):
        raise ReadmeError(f"not a region, or one without its other end: {left[0]}")
    return list(_REGION.finditer(text))


def _body(region: re.Match[str], published: Path) -> str:
    path = published / f"{region['name']}.json"
    if not path.exists():
        raise ReadmeError(f"there is no report of {region['name']}: run `python -m bench {region['name']}`")
    found = Report.read(path)
    try:
        if not region["body"].startswith("\n"):
            return _cell(_table(found, region))
        if region["what"] == FINDINGS:
            body = "\n".join(f"* {finding}" for finding in _findings(found, region))
        else:
            body = _table(found, region).markdown()
    except ReadmeError as error:
        raise ReadmeError(f"{region['head']}: {error}") from None
    return f"\n\n{body}\n\n{_caption(found)}\n\n"


def _table(found: Report, region: re.Match[str]) -> Table:
    """Return what the *region* shows of its table."""
    if region["what"] not in found.tables:
        raise ReadmeError(f"there is no such table, only {_named([*found.tables, FINDINGS])}")
    table = found.tables[region["what"]]
    for words in _choices(region, "rows"):
        table = _with_rows(table, words)
    for words in _choices(region, "columns"):
        table = _with_columns(table, words)
    return table


def _with_rows(table: Table, words: list[str]) -> Table:
    shown = table.shown()
    for word in words:
        if not any(word in cells for cells in shown):
            raise ReadmeError(f"no row has a cell {word!r}")
    chosen = [row for row, cells in zip(table.rows, shown, strict=True) if not set(words).isdisjoint(cells)]
    return Table(table.title, table.columns, chosen)


def _with_columns(table: Table, words: list[str]) -> Table:
    names = [column.name for column in table.columns]
    for word in words:
        if word not in names:
            raise ReadmeError(f"there is no column {word!r}, only {_named(names)}")
    places = [names.index(word) for word in words]
    return Table(table.title, [table.columns[at] for at in places], [[row[at] for at in places] for row in table.rows])


def _findings(found: Report, region: re.Match[str]) -> list[str]:
    chosen = found.findings
    for words in _choices(region, "rows"):
        chosen = [finding for finding in chosen if any(word in finding for word in words)]
    if not chosen:
        raise ReadmeError("nothing of the kind was found")
    return chosen


def _choices(region: re.Match[str], wanted: str) -> list[list[str]]:
    pairs = _CHOICE.findall(region["choices"])
    for key, _ in pairs:
        if key not in {"columns", "rows"}:
            raise ReadmeError(f"{key}= is neither columns= nor rows=")
    return [[word.strip() for word in value.split("|")] for key, value in pairs if key == wanted]


def _cell(table: Table) -> str:
    shown = table.shown()
    if len(shown) != 1 or len(shown[0]) != 1:
        raise ReadmeError(
            f"within a line there is room for one cell, not for {len(shown)} rows of {len(table.columns)}"
        )
    return shown[0][0]


def _caption(found: Report) -> str:
    where = f"Python {found.machine.python}, {found.machine.cores} cores, {found.date[:10]}"
    return f"*`{_command(found)}`, {where}*"


def _command(found: Report) -> str:
    """Return what does the same again."""
    words = ["python -m bench", found.name]
    if found.quick:
        words.append("--quick")
    for key, value in (({} if found.seed == SEED else {"seed": found.seed}) | found.options).items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False:
            words += [flag, *(f"{one}" for one in (value if isinstance(value, list) else [value]))]
    return " ".join(words)


def _named(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)
