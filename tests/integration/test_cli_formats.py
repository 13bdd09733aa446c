"""`run -o`: the same answers in every format, from a journal that stands whatever happens."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from command_line import QUESTION, given, here, output, products, refuse, summary  # noqa: F401 a fixture
from helpers import serving

from microbatch import Microbatcher
from microbatch.cli.main import main
from microbatch.cli.writing.output import OutputFile
from microbatch.testing.reading import EndpointError

pytestmark = pytest.mark.usefixtures("here")

ODD = ("a, b", 'say "no"', "two\nlines", "a\ttab", "žluť 🐎", "x\r", "=1+1", "null", "refuse me")
PARQUET = pytest.param(
    "out.parquet", marks=pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
)
TABLES = ["out.csv", "out.tsv", "out.csv.gz", "out.tsv.gz", PARQUET]
ALL = ["out.jsonl", "out.jsonl.gz", *TABLES]


@pytest.fixture
def asked():
    """Serve an endpoint that repeats the name of a product, and refuses one; yield its flags and the prompts that it was sent."""
    given(*({"id": f"p{number}", "name": name} for number, name in enumerate(ODD)))
    with serving(
        answer=lambda text, schema: text.removeprefix("Product: ") if schema is None else {"is": text}
    ) as endpoint:
        prompts = refuse(endpoint, lambda text: "refuse me" in text, code=400)
        yield ("--model", "m", "--base-url", endpoint.base_url), prompts


def run(asked, *words, out="out.jsonl", status=1, question=QUESTION):
    assert main(["run", "in.jsonl", "-o", out, *question, *asked[0], *words]) == status


def read(path):
    """Return the rows of a file of any format."""
    if path.endswith(".parquet"):
        return importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()
    raw = Path(path).read_bytes()
    return parse(path.removesuffix(".gz"), gzip.decompress(raw) if path.endswith(".gz") else raw)


def parse(path, raw):
    if path.endswith("jsonl"):
        return [json.loads(line) for line in raw.splitlines()]
    dialect = "excel" if path.endswith("csv") else "excel-tab"
    return [*csv.DictReader(io.StringIO(raw.decode(), newline=""), dialect=dialect, strict=True)]


def answers(rows):
    """Return the outputs by id, None for a failure."""
    assert set(Counter(row["custom_id"] for row in rows).values()) == {1}
    return {row["custom_id"]: row["output"] or None for row in rows}


EXPECTED = {f"p{number}": None if name == "refuse me" else name for number, name in enumerate(ODD)}


@pytest.mark.parametrize("path", ALL)
def test_every_format_holds_the_same_answers(asked, path):
    run(asked, out=path)
    assert answers(read(path)) == EXPECTED


@pytest.mark.parametrize("path", TABLES)
def test_a_table_has_the_cost_of_each_answer_and_the_error_of_each_failure(asked, path):
    run(asked, out=path)
    told = {row["custom_id"]: row for row in read(path)}
    journal = {row["custom_id"]: row for row in output(path + ".journal.jsonl")}
    assert list(told["p0"]) == [
        *("custom_id", "output", "error", "route", "prompt_tokens", "completion_tokens", "cached_tokens", "estimated"),
        *("cache_write_tokens", "reasoning_tokens", "cost_usd"),
    ]
    for name, row in journal.items():
        if row["error"] is None:
            assert not told[name]["error"]
            assert int(told[name]["prompt_tokens"]) == row["usage"]["prompt_tokens"] > 0
            assert told[name]["route"] == row["route"]
        else:
            assert json.loads(told[name]["error"]) == row["error"]
            assert not told[name]["prompt_tokens"]


def test_prices_stand_in_a_table(asked):
    run(asked, "--model", "gpt-4.1-mini", out="out.csv")
    journal = {row["custom_id"]: row for row in output("out.csv.journal.jsonl")}
    costs = {row["custom_id"]: row["cost_usd"] for row in read("out.csv")}
    assert {name: float(cost) for name, cost in costs.items() if cost} == {
        name: row["cost_usd"] for name, row in journal.items() if row["error"] is None
    }


SCHEMA = {"type": "object", "properties": {"is": {"type": "string"}}, "required": ["is"], "additionalProperties": False}


@pytest.mark.parametrize("path", TABLES)
def test_answers_that_are_objects_are_json_in_a_table(asked, path):
    Path("schema.json").write_text(json.dumps(SCHEMA))
    run(asked, "--schema", "schema.json", out=path)
    found = answers(read(path))
    assert {name: text and json.loads(text) for name, text in found.items()} == {
        name: text and {"is": f"Product: {text}"} for name, text in EXPECTED.items()
    }


@pytest.mark.parametrize("path", ["out.jsonl", "out.jsonl.gz", "out"])
def test_openai_batch_lines_are_as_the_batch_api_writes_them(asked, path):
    run(asked, "--output-format", "openai-batch", out=path)
    rows = {row["custom_id"]: row for row in read(path if path != "out" else str(Path("out").rename("out.copy.jsonl")))}
    assert all(list(row) == ["id", "custom_id", "response", "error"] for row in rows.values())
    assert len({row["id"] for row in rows.values()}) == len(rows)
    assert rows.keys() == EXPECTED.keys()
    tokens = 0
    for name, text in EXPECTED.items():
        response, error = rows[name]["response"], rows[name]["error"]
        assert error is None
        if text is None:
            assert response["status_code"] == 400
            assert response["body"]["error"]["type"] == "BadRequest"
            continue
        body = response["body"]
        assert response["status_code"] == 200
        assert (body["object"], body["model"], type(body["id"])) == ("chat.completion", "m", str)
        assert [choice["message"]["content"] for choice in body["choices"]] == [text]
        assert body["choices"][0]["finish_reason"] == "stop"
        tokens += body["usage"]["prompt_tokens"]
    journal = output(path + ".journal.jsonl")
    assert tokens == sum(line["usage"]["prompt_tokens"] for line in journal if line["error"] is None)


def test_a_journal_can_be_written_in_another_format_later(asked):
    run(asked, out="out", status=1)
    before = output("out")
    Path("out").rename("all.journal.jsonl")
    Path("out.digest").rename("all.digest")
    asked[1].clear()
    run(asked, "--resume", "--output-format", "openai-batch", out="all")
    assert len(asked[1]) <= 1  # the one that was refused
    bodies = {
        row["custom_id"]: row["response"]["body"] for row in map(json.loads, Path("all").read_text().splitlines())
    }
    assert {name: body["choices"][0]["message"]["content"] for name, body in bodies.items() if "choices" in body} == {
        line["custom_id"]: line["output"] for line in before if line["error"] is None
    }


# --- stdout


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "openai-batch"])
def test_answers_go_to_stdout_and_everything_else_to_stderr(asked, form, capsysbinary):
    run(asked, "--output-format", form, "--json", out="-")
    shown = capsysbinary.readouterr()
    rows = parse("jsonl" if form == "openai-batch" else form, shown.out)
    assert {row["custom_id"] for row in rows} == EXPECTED.keys()
    if form != "openai-batch":
        assert answers(rows) == EXPECTED
    lines = shown.err.decode().splitlines()
    assert any(line.startswith("8 of 9 items answered, 1 failed") for line in lines)
    assert json.loads(next(line for line in lines if line.startswith("{")))["answered"] == 8
    assert not any("--resume" in line for line in lines)
    assert [*Path().iterdir()] == [Path("in.jsonl")]


def test_an_audit_of_answers_on_stdout_keeps_no_record(asked, capsys):
    run(asked, "--audit", out="-")
    assert {path.name for path in Path().iterdir()} == {"in.jsonl"}
    assert "lane_kind" in capsys.readouterr().out


# --- resuming


@pytest.mark.parametrize("path", ALL)
def test_what_is_left_is_asked_and_each_id_has_one_row_in_the_end(asked, path, capsys):
    given(*({"id": f"p{number}", "name": name} for number, name in enumerate(ODD)), "not json")
    run(asked, out=path)
    assert answers(read(path)) == EXPECTED | {"10": None}
    asked[1].clear()
    given(*({"id": f"p{number}", "name": name.replace("refuse", "take")} for number, name in enumerate(ODD)))
    capsys.readouterr()
    run(asked, "--resume", "--json", out=path, status=0)
    assert (summary(capsys)["answered"], len(asked[1])) == (1, 1)
    assert answers(read(path)) == EXPECTED | {"p8": "take me", "10": None}
    asked[1].clear()
    before = read(path)
    if path != "out.jsonl":
        Path(path).unlink()
    run(asked, "--resume", out=path, status=0)
    assert asked[1] == []
    assert read(path) == before


def test_failures_that_a_resumed_run_mends_leave_no_line(asked):
    given(
        *({"id": f"p{number}", "name": f"refuse me {number}" if number % 2 else f"n{number}"} for number in range(20))
    )
    run(asked)
    assert Counter(line["error"] is None for line in output()) == {True: 10, False: 10}
    order = [line["custom_id"] for line in output() if line["error"] is None]
    asked[1].clear()
    with serving(answer=lambda text, _: text) as endpoint:
        run((("--model", "m", "--base-url", endpoint.base_url), []), "--resume", "--force", status=0)
    lines = output()
    assert len(lines) == 20
    assert all(line["error"] is None for line in lines)
    assert [line["custom_id"] for line in lines][:10] == order


def test_an_output_that_cannot_be_written_leaves_the_journal_and_says_how_to_go_on(asked, capsys):
    given({"id": "p0", "name": "x"}, "odd")
    Path("out.csv.new").mkdir()
    run(asked, out="out.csv")
    told = capsys.readouterr().err
    assert "All answers so far are in out.csv.journal.jsonl. To ask for the rest:" in told
    given({"id": "p0", "name": "x"})
    run(asked, "--resume", out="out.csv")
    told = capsys.readouterr().err
    assert "cannot write 'out.csv'" in told
    assert "the answers are in 'out.csv.journal.jsonl', and with --resume the output is written from it" in told
    assert not Path("out.csv").exists()
    Path("out.csv.new").rmdir()
    asked[1].clear()
    run(asked, "--resume", out="out.csv", status=0)
    assert asked[1] == []
    assert answers(read("out.csv")) == {"p0": "x", "2": None}


def test_ctrl_c_leaves_the_answers_so_far_in_the_table(asked, monkeypatch, capsys):
    products(400)

    def write(self, line, real=OutputFile.write):
        real(self, line)
        if self.written == 20:
            signal.raise_signal(signal.SIGINT)

    words = ("--max-concurrent-batches", "4", "--max-batch-size", "4")
    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "write", write)
        run(asked, *words, out="out.csv", status=130)
    assert "Stopped; all answers so far are in out.csv." in capsys.readouterr().err
    so_far = answers(read("out.csv"))
    assert 20 <= len(so_far) < 400
    run(asked, *words, "--resume", out="out.csv", status=0)
    assert answers(read("out.csv")) == {f"p{number}": f"thing {number}" for number in range(400)} | so_far


def test_an_output_that_no_run_can_go_on_from_is_kept(asked, capsys):
    Path("out.csv").write_text("precious")
    for words in ((), ("--resume",)):
        run(asked, *words, out="out.csv", status=2)
        assert "'out.csv' exists, and there is no 'out.csv.journal.jsonl'" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in Path().glob("out*")} == {"out.csv": "precious"}
    run(asked, "--force", out="out.csv")
    assert Path("out.csv.old1").read_text() == "precious"
    assert answers(read("out.csv")) == EXPECTED
    first = Path("out.csv").read_bytes()
    run(asked, out="out.csv", status=2)
    run(asked, "--force", out="out.csv")
    assert Path("out.csv.old2").read_bytes() == first
    assert answers(output("out.csv.old2.journal.jsonl")) == EXPECTED
    assert Path("out.csv.old2.digest").exists()


def test_a_journal_whose_table_was_never_written_is_kept_as_often_as_it_is_replaced(asked):
    kept = []
    for number in range(3):
        run(asked, "--force", out="out.csv")
        Path("out.csv").unlink()  # as if the run had been killed
        if number:
            assert Path(f"out.csv.old{number}.journal.jsonl").read_bytes() == kept[-1]
        kept.append(Path("out.csv.journal.jsonl").read_bytes())


def test_a_run_that_cannot_begin_leaves_the_table_of_the_last_one(asked, monkeypatch, capsys):
    run(asked, out="out.csv")
    Path("other.csv").write_text("precious")

    def full(*_):
        raise OSError(28, "No space left on device")

    for words, out in (
        (("--resume", "--force", "--audit"), "out.csv"),
        (("--force",), "out.csv"),
        (("--force",), "other.csv"),
    ):
        before = everything()
        with monkeypatch.context() as patch:
            patch.setattr("microbatch.cli.resume._rewrite", full)
            patch.setattr("microbatch.cli.resume.keep_settings", full)
            run(asked, *words, out=out, status=2)
        assert "No space left on device" in capsys.readouterr().err
        with monkeypatch.context() as patch:
            patch.setattr(Microbatcher, "__aenter__", full)
            run(asked, *words, out=out, status=1)
        assert everything() | {"other.csv.journal.jsonl": None} == before | {"other.csv.journal.jsonl": None}


def test_a_changed_input_changes_the_table_and_the_old_one_is_kept(asked):
    run(asked, out="out.csv")
    before = Path("out.csv").read_bytes()
    given({"id": "p0", "name": "new"}, {"id": "p1", "name": ODD[1]})
    asked[1].clear()
    run(asked, "--resume", out="out.csv", status=0)
    assert len(asked[1]) == 1
    assert answers(read("out.csv")) == {"p0": "new", "p1": ODD[1]}
    assert Path("out.csv.old1").read_bytes() == before


# --- nothing is written by a command that is refused

REFUSED = {
    "a cache that is none": (("--cache", "in.jsonl"), "out.jsonl"),
    "a cache that is none, and a table": (("--cache", "in.jsonl"), "out.csv"),
    "begun anew": (("--cache", "in.jsonl", "--force"), "done.jsonl"),
    "begun anew, and a table": (("--cache", "in.jsonl", "--force"), "done.csv"),
    "resumed after a change": (("--cache", "in.jsonl", "--resume", "--force", "--template", "{name}!"), "done.csv"),
    "other settings": (("--resume", "--max-batch-size", "3"), "done.csv"),
    "answers that are there": ((), "done.jsonl"),
    "a settings file that cannot be written": ((), "blocked.csv"),
    "an input that is not there": ((), "nowhere/out.csv"),
    "the input": ((), "in.jsonl"),
    "a folder": ((), "folder.csv"),
    "stdout and resume": (("--resume",), "-"),
    "stdout and parquet": (("--output-format", "parquet"), "-"),
    "two formats": (("--output-format", "tsv"), "out.csv"),
    "no field": (("--template", "{nothing}"), "out.csv"),
    "another process": ((), "locked.jsonl"),
}


def everything():
    return {str(path): path.is_file() and path.read_bytes() for path in Path().rglob("*")}


@pytest.mark.parametrize("refused", REFUSED)
def test_a_command_that_is_refused_leaves_everything_as_it_was(asked, refused):
    words, path = REFUSED[refused]
    for done in ("done.jsonl", "done.csv"):
        run(asked, out=done)
    for folder in ("folder.csv", "blocked.csv.digest"):
        Path(folder).mkdir()
    before = everything()
    asked[1].clear()
    with Path("locked.jsonl").open("a") as file:
        importlib.import_module("fcntl").flock(file, 2)
        before["locked.jsonl"] = b""
        run(asked, *words, out=path, status=2)
    assert everything() == before
    assert asked[1] == []


# --- the endpoint's own words


def test_what_the_endpoint_says_stands_in_the_lines_and_in_the_summary_without_the_prompt_or_a_key(asked, capsys):
    given(*({"id": f"p{number}", "name": f"a secret thing, refuse me {number}"} for number in range(30)), {"name": "x"})
    with serving(answer=lambda text, _: text) as endpoint:
        asks, real = iter(range(10_000)), endpoint.read

        def refusing(body):
            text = body["messages"][-1]["content"]
            if "refuse me" in text:
                raise EndpointError(400, f"Case {next(asks)}: frobs are banned; key sk-abcdef123456; you said: {text}")
            return real(body)

        endpoint.read = refusing
        run((("--model", "m", "--base-url", endpoint.base_url), []), out="out.csv")
    shown = capsys.readouterr().err
    lines = [line["error"]["message"] for line in output("out.csv.journal.jsonl") if line["error"] is not None]
    assert len(lines) == 30
    for text in (*lines, shown, *(row["error"] for row in read("out.csv") if row["error"])):
        assert "frobs are banned" in text
        assert "secret thing" not in text
        assert "sk-abcdef" not in text
    assert shown.count("frobs are banned") == 1
    assert "and 25 more: BadRequest: " in shown
