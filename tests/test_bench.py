"""The benchmarks run and leave raw samples, from which tables, findings, figures and RESULTS.md are computed."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import plot, results
from bench.benchmark import NAMES, Option, load
from bench.report import Run, Table, begin
from bench.timing import Stopwatch, alternate, column, quantile, ratio

ROOT = Path(__file__).parent.parent


def bench(*words):
    return subprocess.run(
        [sys.executable, "-m", "bench", *words], cwd=ROOT, check=False, capture_output=True, text=True, timeout=500
    )


@pytest.fixture
def table():
    table = Table("A burst", "library | at 32, µs {:.1f} | items {:,} | right", "A note.")
    table.add("ours", 12.34, 20_000, True)
    table.add("theirs|old", None, 1_000, False)
    return table


@pytest.fixture
def stalls():
    """A run of `stalls`, as the benchmark would leave it."""
    run = begin("stalls", quick=False, seed=1, options={"rounds": 1}, compared=["aiohttp", "no-such-thing"])
    names = ("microbatch, as the text", "no prompt at all", "its tokens counted on the loop")
    run.samples = {"gaps": {name: [{"wall": 0.01, "cpu": 0.005}] for name in names}}
    return run


# Results


def test_the_results_page_is_what_the_published_samples_say():
    assert results.PAGE.read_text("utf-8") == results.rendered(results.PUBLISHED), "run: python -m bench results"


def test_the_results_page_shows_each_published_figure():
    shown = re.findall(r"\(published/(\w+\.svg)\)", results.PAGE.read_text("utf-8"))
    assert sorted(shown) == sorted(path.name for path in results.PUBLISHED.glob("*.svg"))


class TestPublishing:
    @pytest.fixture
    def publish(self, tmp_path):
        """A function that publishes the results of a project; it returns the exit code and the page, None if there is none."""
        published, page = tmp_path / "published", tmp_path / "RESULTS.md"

        def publish(**options):
            code = results.main(tmp_path / "results", published=published, page=page, **options)
            return code, page.read_text("utf-8") if page.exists() else None

        return publish

    def test_a_run_is_copied_and_its_section_is_generated(self, publish, stalls, tmp_path):
        path = stalls.write(tmp_path / "results")
        code, text = publish()
        assert code == 0
        assert (tmp_path / "published" / "stalls.json").read_bytes() == path.read_bytes()
        assert f"`python -m bench stalls --rounds 1`, {stalls.date[:10]}, 0 s. {stalls.machine}. microbatch" in text
        assert re.search(r"\| microbatch, as the text +\| +10.0 \| +10.0 \| +5.0 \| +5.0 \|", text)
        assert "* The longest gap is 5.0 ms of CPU time of the loop's thread" in text

    def test_a_run_that_is_not_measured_again_stays_as_published(self, publish, stalls, tmp_path):
        path = stalls.write(tmp_path / "results")
        _, first = publish()
        path.unlink()
        assert publish() == (0, first)

    def test_a_quick_run_is_refused_unless_asked_for(self, publish, stalls, tmp_path, capsys):
        stalls.quick = True
        stalls.write(tmp_path / "results")
        assert publish() == (1, None)
        assert "stalls.json is of a --quick run" in capsys.readouterr().err
        code, text = publish(quick=True)
        assert code == 0
        assert "`python -m bench stalls --quick`, " in text

    def test_a_changed_sample_changes_the_page(self, publish, stalls, tmp_path):
        stalls.write(tmp_path / "results")
        publish()
        stalls.samples["gaps"]["microbatch, as the text"][0]["cpu"] = 0.0999
        stalls.write(tmp_path / "results")
        assert "less than 50 ms MISSED" in publish()[1]


# Reports and timing


def test_a_run_is_read_back_as_it_was_written(stalls, tmp_path):
    assert Run.read(stalls.write(tmp_path / "new")) == stalls
    assert set(stalls.versions) == {"microbatch", "aiohttp"}


def test_a_table_is_aligned_markdown_with_title_and_notes(table):
    assert table.markdown().splitlines() == [
        "*A burst*",
        "",
        "| library     | at 32, µs |  items | right |",
        "| ----------- | --------: | -----: | ----- |",
        "| ours        |      12.3 | 20,000 | yes   |",
        "| theirs\\|old |         - |  1,000 | no    |",
        "",
        "A note.",
    ]


def test_rows_are_found_by_their_cells(table):
    assert table.by("library")["ours"]["items"] == 20_000
    assert table.by("library", "right")["ours", True]["at 32, µs"] == 12.34


def test_a_row_has_as_many_cells_as_there_are_columns(table):
    with pytest.raises(ValueError, match="A burst: 3 cells under 4 columns"):
        table.add("ours", 1.0, 2)


def test_cases_take_turns_and_samples_of_a_round_share_a_place():
    ran = []
    samples = alternate({name: lambda name=name: ran.append(name) or len(ran) for name in "ab"}, rounds=3)
    assert "".join(ran) == "ababab"
    assert samples == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert ratio(samples["b"], samples["a"]) == 4 / 3
    assert column([{"us": 1.0}, {"us": 2.0}], "us") == [1.0, 2.0]


def test_quantiles_are_interpolated():
    assert quantile([7.0], 0.99) == 7.0
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.25) == 2.5
    assert (quantile([4.0, 8.0], 0.0), quantile([4.0, 8.0], 1.0)) == (4.0, 8.0)


def test_a_stopwatch_counts_its_own_block_alone():
    sum(range(10**6))
    with Stopwatch() as watch:
        pass
    assert 0 <= watch.cpu < 0.01
    assert watch.wall > 0


# The benchmarks


@pytest.mark.slow
def test_without_a_name_all_are_listed():
    done = bench()
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for name in [*NAMES, "all", "results"]:
        assert re.search(rf"^    {name}\b", done.stdout, re.MULTILINE), name


@pytest.mark.parametrize("package", ["psutil", "matplotlib", "openai"])
def test_a_missing_package_is_named_with_the_way_to_get_it(package):
    program = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_module('bench', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rf"bench: .*{package}.*pip install -e '\.\[bench\]'\n", done.stderr)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_the_common_interface(name):
    module = importlib.import_module(f"bench.{name}")
    assert module.QUESTION.endswith("?")
    assert module.__doc__
    assert all(isinstance(dist, str) for dist in module.COMPARED)
    assert all(isinstance(option, Option) for option in module.OPTIONS.values())
    assert list(inspect.signature(module.measure).parameters) == ["options"]
    assert list(inspect.signature(module.tables).parameters) == ["run"]
    assert list(inspect.signature(module.findings).parameters) == ["run", "tables"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cheaper", []),
        ("embeddings", ["--rounds", "1"]),
        ("gateway", ["--requests", "100", "--low", "2", "--rounds", "1"]),
        ("hybrid", ["--count", "400"]),
        ("overhead", ["--only", "minimal", "--pending", "1000"]),
        ("overload", ["--count", "2000", "--queued", "500"]),
        ("quota", ["--minutes", "3"]),
        ("semantic", ["--encoder", "simulated", "--questions", "150", "--requests", "300", "--pairs", "4"]),
        ("stalls", []),
        ("throughput", ["--count", "160", "--items", "80", "--seconds", "0.05", "--rounds", "1"]),
    ],
)
def test_a_quick_run_leaves_samples_from_which_all_else_is_computed(name, words, tmp_path):
    done = bench(name, "--quick", *words, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    run, module = Run.read(tmp_path / f"{name}.json"), load(name)
    assert (run.name, run.quick, run.seconds > 0, run.options.keys()) == (name, True, True, module.OPTIONS.keys())
    tables = module.tables(run)
    for table in tables.values():
        assert table.rows
        assert name in ("embeddings", "overhead") or "SIMULATED" in table.title
    assert results.section(run) in done.stdout
    if hasattr(module, "draw"):
        drawn = (tmp_path / f"{name}.svg").read_text("utf-8")
        assert drawn.rstrip().endswith("</svg>")
        plot.save(module.draw(run, tables), tmp_path / "again.svg")
        assert (tmp_path / "again.svg").read_text("utf-8") == drawn
