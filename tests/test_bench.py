"""The benchmarks run, leave reports that can be read back and drawn from, and the README says what they found."""

import importlib
import inspect
import re
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from bench import plot, readme
from bench.__main__ import NAMES, main
from bench.report import Column, Report, Table, begin
from bench.timing import Stopwatch, alternate, chunks, quantile, ratios, spread

ROOT = Path(__file__).parent.parent


def bench(*words):
    return subprocess.run(
        [sys.executable, "-m", "bench", *words], cwd=ROOT, check=False, capture_output=True, text=True, timeout=500
    )


@pytest.fixture
def found():
    """A report as a benchmark would leave it."""
    found = begin("speed", "How fast?", quick=False, seed=1, options={}, compared=["aiohttp", "no-such-thing"])
    found.tables["burst"] = table = Table(
        "A burst", [Column("library"), Column("at 32, µs", ".1f"), Column("items", ","), Column("right")]
    )
    table.add("ours", 12.34, 20_000, True)
    table.add("theirs|old", None, 1_000, False)
    table.notes.append("A note.")
    found.findings += ["Ours is 2.0 times as fast.", "Target met."]
    found.samples["burst"] = {"ours": [12.3, 12.4]}
    return found


@pytest.fixture
def page(found, tmp_path):
    """A function that renders a README over the published report."""
    found.write(tmp_path)
    return lambda text: readme.rendered(text, tmp_path)


# The README


def test_the_readme_says_what_the_published_reports_found():
    text = readme.README.read_text("utf-8")
    assert text == readme.rendered(text, readme.PUBLISHED), "run: python -m bench readme"


def test_a_region_holds_the_table_and_what_it_was_measured_by(page, found):
    text = page("Before.\n<!-- bench: speed burst -->\nold\n<!-- /bench -->\nAfter.\n")
    caption = (
        f"*`python -m bench speed`, Python {found.machine.python}, {found.machine.cores} cores, {found.date[:10]}*"
    )
    assert text == (
        f"Before.\n<!-- bench: speed burst -->\n\n{found.tables['burst'].markdown()}\n\n{caption}\n\n<!-- /bench -->\nAfter.\n"
    )
    assert page(text) == text


def test_a_changed_figure_is_noticed(page, found, tmp_path):
    text = page("<!-- bench: speed burst -->\n<!-- /bench -->\n")
    assert page(text.replace("12.3", "11.3")) == text
    found.tables["burst"].rows[0][1] = 99.9
    found.write(tmp_path)
    assert "99.9" in page(text)


def test_findings_are_a_list(page):
    text = page("<!-- bench: speed findings -->\n<!-- /bench -->")
    assert "\n\n* Ours is 2.0 times as fast.\n* Target met.\n\n*`python" in text
    assert "Ours" not in page('<!-- bench: speed findings rows="Target" -->\n<!-- /bench -->')


def test_columns_and_rows_are_chosen(page):
    text = page(
        '<!-- bench: speed burst columns="items | library" rows="20,000 | 1,000" rows="yes" -->\n<!-- /bench -->'
    )
    assert "| items | library |\n| ---: | --- |\n| 20,000 | ours |\n\n" in text


def test_a_region_within_a_line_is_one_cell(page):
    text = page('It is <!-- bench: speed burst columns="at 32, µs" rows="ours" -->?<!-- /bench --> µs.')
    assert text.endswith(" -->12.3<!-- /bench --> µs.")


@pytest.mark.parametrize(
    ("region", "complaint"),
    [
        ("<!-- bench: speed bursts -->\n<!-- /bench -->", "no such table, only 'burst', 'findings'"),
        ("<!-- bench: slow burst -->\n<!-- /bench -->", "no report of slow: run `python -m bench slow`"),
        ('<!-- bench: speed burst columns="size" -->\n<!-- /bench -->', "no column 'size', only 'library', "),
        ('<!-- bench: speed burst rows="ours | mine" -->\n<!-- /bench -->', "no row has a cell 'mine'"),
        ('<!-- bench: speed burst row="ours" -->\n<!-- /bench -->', "row= is neither columns= nor rows="),
        ('<!-- bench: speed findings rows="lost" -->\n<!-- /bench -->', "nothing of the kind"),
        ("<!-- bench: speed burst -->?<!-- /bench -->", "room for one cell, not for 2 rows of 4"),
        ('<!-- bench: speed burst columns="items" -->?<!-- /bench -->', "room for one cell, not for 2 rows of 1"),
        ("<!-- bench: speed burst -->\n", "without its other end: <!-- bench: speed burst -->"),
        ("<!-- bench: speed burst rows=ours -->\n<!-- /bench -->", "not a region"),
        ("<!-- bench: speed burst -->\n<!-- bench: speed burst -->\n<!-- /bench -->", "without its other end"),
        ("<!-- /bench -->", "without its other end"),
    ],
)
def test_a_region_that_asks_for_what_is_not_there_is_an_error(page, region, complaint):
    with pytest.raises(readme.ReadmeError, match=re.escape(complaint)):
        page(region)


def test_the_caption_tells_the_options_that_were_given(page, found, tmp_path):
    found.seed, found.options = 7, {"per_second": [5.0, 20.0], "profile": True, "ray": False}
    found.write(tmp_path)
    assert "*`python -m bench speed --seed 7 --per-second 5.0 20.0 --profile`" in page(
        "<!-- bench: speed burst -->\n<!-- /bench -->"
    )


class TestPublishing:
    @pytest.fixture
    def publish(self, found, tmp_path):
        """A function that writes the README of a project over the report in its results."""
        results, published, page = tmp_path / "results", tmp_path / "published", tmp_path / "README.md"
        found.write(results)
        (results / "speed.svg").write_text("<svg/>")
        found.name = "unused"
        found.write(results)
        found.name = "speed"

        def publish(text, **options):
            page.write_text(text, "utf-8")
            return readme.main(results, readme=page, published=published, **options), page.read_text("utf-8"), published

        return publish

    def test_what_the_readme_uses_is_copied_and_written(self, publish):
        code, text, published = publish(
            "![](bench/published/speed.svg)\n<!-- bench: speed burst -->\n<!-- /bench -->\n"
        )
        assert code == 0
        assert "| ours | 12.3 |" in text
        assert sorted(path.name for path in published.iterdir()) == ["speed.json", "speed.svg"]

    def test_a_missing_report_is_named_and_nothing_is_written(self, publish, capsys):
        before = "<!-- bench: slow burst -->\n<!-- /bench -->\n"
        code, text, _ = publish(before)
        assert (code, text) == (1, before)
        assert "there is no report of slow" in capsys.readouterr().err

    def test_missing_figures_are_named_and_nothing_is_published(self, publish, tmp_path, capsys):
        (tmp_path / "results" / "speed.svg").unlink()
        code, _, published = publish("![](bench/published/slow.svg) ![](bench/published/speed.svg)\n")
        assert code == 1
        assert not published.exists()
        assert "not been drawn: slow, speed" in capsys.readouterr().err

    def test_a_report_that_was_not_measured_again_stays_as_published(self, publish, found, tmp_path):
        region = "<!-- bench: speed burst -->\n<!-- /bench -->\n"
        publish(region)
        (tmp_path / "results" / "speed.json").unlink()
        code, text, _ = publish(region)
        assert code == 0
        assert "| ours | 12.3 |" in text

    def test_the_figures_of_a_quick_run_are_refused_unless_asked_for(self, publish, found, tmp_path, capsys):
        found.quick = True
        found.write(tmp_path / "results")
        region = "<!-- bench: speed burst -->\n<!-- /bench -->\n"
        code, text, published = publish(region)
        assert (code, text) == (1, region)
        assert not published.exists()
        assert "speed.json is of a --quick run" in capsys.readouterr().err
        code, text, _ = publish(region, quick=True)
        assert code == 0
        assert "*`python -m bench speed --quick`, " in text


# Reports and timing


def test_a_report_is_read_back_as_it_was_written(found, tmp_path):
    assert Report.read(found.write(tmp_path / "new")) == found
    assert set(found.versions) == {"microbatch", "aiohttp"}


def test_a_report_is_told_with_tables_notes_and_findings(found):
    lines = found.text().splitlines()
    assert lines[0] == "speed: How fast?"
    at = lines.index("A burst")
    assert lines[at + 2 : at + 8] == [
        "library     at 32, µs   items  right",
        "----------  ---------  ------  -----",
        "ours             12.3  20,000  yes",
        "theirs|old          -   1,000  no",
        "",
        "A note.",
    ]
    assert "* Target met." in lines


def test_a_table_is_markdown_with_numbers_to_the_right(found):
    assert found.tables["burst"].markdown().splitlines() == [
        "| library | at 32, µs | items | right |",
        "| --- | ---: | ---: | --- |",
        "| ours | 12.3 | 20,000 | yes |",
        "| theirs\\|old | - | 1,000 | no |",
    ]


def test_a_row_has_as_many_cells_as_there_are_columns(found):
    with pytest.raises(ValueError, match="A burst: 3 cells under 4 columns"):
        found.tables["burst"].add("ours", 1.0, 2)


def test_cases_take_turns_and_samples_of_a_round_share_a_place():
    ran = []
    samples = alternate({name: lambda name=name: ran.append(name) or len(ran) for name in "ab"}, rounds=3)
    assert "".join(ran) == "ababab"
    assert samples == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert ratios(samples["b"], samples["a"]) == [2 / 1, 4 / 3, 6 / 5]


def test_quantiles_are_interpolated():
    assert quantile([7.0], 0.99) == 7.0
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.25) == 2.5
    assert (quantile([4.0, 8.0], 0.0), quantile([4.0, 8.0], 1.0)) == (4.0, 8.0)
    assert spread([3.0, 1.0, 2.0]) == (1.0, 2.0, 3.0)


def test_a_stopwatch_counts_its_own_block_alone():
    sum(range(10**6))
    with Stopwatch() as watch:
        pass
    assert 0 <= watch.cpu < 0.01
    assert watch.wall > 0
    assert list(chunks("abcde", 2)) == ["ab", "cd", "e"]


# The benchmarks


@pytest.mark.slow
def test_without_a_name_all_are_listed():
    done = bench()
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for name in [*NAMES, "all", "readme"]:
        assert re.search(rf"^    {name}\b", done.stdout, re.MULTILINE), name


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    for name in [name for name in sys.modules if name.startswith("bench.overhead")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"psutil.*pip install -e '\.\[bench\]'"):
        main([])


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_offers_what_the_frame_asks_for(name):
    module = importlib.import_module(f"bench.{name}")
    assert module.QUESTION.endswith("?")
    assert module.__doc__
    assert all(isinstance(dist, str) for dist in module.COMPARED)
    module.add_arguments(ArgumentParser())
    assert list(inspect.signature(module.run).parameters) == ["options", "found"]
    assert list(inspect.signature(module.draw).parameters) == ["found"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gateway", ["--requests", "100", "--low", "2", "--rounds", "1"]),
        ("hybrid", ["--count", "400"]),
        ("overload", ["--count", "2000", "--queued", "500"]),
        ("quota", ["--minutes", "3"]),
        ("stalls", []),
        ("throughput", ["--count", "160", "--seconds", "0.05", "--rounds", "1"]),
    ],
)
def test_a_quick_run_leaves_a_report_and_a_figure_that_is_drawn_from_it(name, words, tmp_path):
    done = bench(name, "--quick", *words, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = Report.read(tmp_path / f"{name}.json")
    assert (found.name, found.quick, found.seconds > 0) == (name, True, True)
    assert found.samples
    assert found.findings
    for table in found.tables.values():
        assert table.rows
        assert table.text() in done.stdout
        assert "SIMULATED" in table.title
    drawn = (tmp_path / f"{name}.svg").read_text("utf-8")
    assert drawn.rstrip().endswith("</svg>")
    plot.save(importlib.import_module(f"bench.{name}").draw(found), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text("utf-8") == drawn
