"""`run` and its kin on files as people have them: the same answers from every format, and every record once in a join."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import QUESTION, given, here, output, products, summary  # noqa: F401 a fixture
from helpers import serving

from microbatch.cli.main import main

pytestmark = pytest.mark.usefixtures("here")

LABELS = ("--labels", "home,other", "--simulate")
RECORDS = [{"id": f"p{number}", "name": f'thing {number}, "new"\nor old', "price": str(number)} for number in range(60)]


def run(*inputs, out="out.jsonl", words=(*QUESTION, *LABELS)):
    return main(["run", *inputs, "-o", out, *words])


def answers(path="out.jsonl"):
    return {line["custom_id"]: (line["output"], line["digest"]) for line in output(path)}


def as_csv(records, **options):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, records[0], **options)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def test_every_format_gives_the_same_answers(monkeypatch, capsys):
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    table = as_csv(RECORDS)
    Path("in.jsonl").write_text(lines)
    assert run("in.jsonl") == 0
    expected = answers()
    assert expected.keys() == {record["id"] for record in RECORDS}
    files = {
        "in.csv": table.encode(),
        "in.tsv": as_csv(RECORDS, dialect="excel-tab").encode(),
        "in.json": json.dumps(RECORDS, indent=2).encode(),
        "in.csv.gz": gzip.compress(table.encode()),
        "in.jsonl.gz": gzip.compress(lines.encode()),
        "excel.csv": table.encode("utf-16"),
        "noname": table.encode(),
    }
    for number, (name, content) in enumerate(files.items()):
        Path(name).write_bytes(content)
        assert run(name, out=f"{number}.jsonl") == 0
        assert answers(f"{number}.jsonl") == expected, name
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(table.encode())))
    assert run("-", out="stdin.jsonl") == 0
    assert answers("stdin.jsonl") == expected
    Path("a.csv").write_text(as_csv(RECORDS[:25]))
    Path("b.jsonl").write_text("".join(lines.splitlines(keepends=True)[25:]))
    assert run("a.csv", "b.jsonl", out="two.jsonl") == 0
    assert answers("two.jsonl") == expected
    # A run is resumed from another format as well: nothing is left to ask.
    capsys.readouterr()
    assert run("in.csv", words=(*QUESTION, *LABELS, "--resume", "--json")) == 0
    assert summary(capsys)["upstream_calls"] == 0


def test_parquet_gives_the_same_answers():
    pa = pytest.importorskip("pyarrow")
    tables = pytest.importorskip("pyarrow.parquet")
    Path("in.csv").write_text(as_csv(RECORDS), newline="")
    tables.write_table(pa.Table.from_pylist(RECORDS), "in.parquet")
    assert run("in.csv") == run("in.parquet", out="parquet.jsonl") == 0
    assert answers("parquet.jsonl") == answers()


def test_stdin_of_a_process_is_taken():
    words = ["run", "-", "-o", "out.jsonl", *QUESTION, *LABELS, "--limit", "10"]
    command = [sys.executable, "-m", "microbatch", *words]
    done = subprocess.run(command, input=as_csv(RECORDS).encode(), capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(output()) == 10


def test_a_limit_and_a_sample_ask_about_so_many_and_the_rest_is_asked_by_resuming(capsys):
    products(60)
    words = (*QUESTION, *LABELS, "--json")
    assert run("in.jsonl", words=(*words, "--limit", "10")) == 0
    assert {line["custom_id"] for line in output()} == {f"p{number}" for number in range(10)}
    assert run("in.jsonl", words=(*words, "--sample", "20", "--seed", "5", "--resume")) == 0
    sampled = len(output())
    assert 20 <= sampled <= 30
    capsys.readouterr()
    assert run("in.jsonl", words=(*words, "--resume")) == 0
    assert summary(capsys)["items"] == 60 - sampled
    assert sorted(line["custom_id"] for line in output()) == sorted(f"p{number}" for number in range(60))


def test_a_part_of_an_input_does_not_take_the_answers_to_the_rest_away(capsys):
    products(20)
    words = (*QUESTION, *LABELS)
    assert run("in.jsonl") == 0
    given(*({"id": f"p{number}", "name": f"other {number}"} for number in range(20)))
    before = Path("out.jsonl").read_text()
    assert run("in.jsonl", words=(*words, "--resume", "--limit", "5")) == 2
    assert "Resume without --limit and --sample" in capsys.readouterr().err
    assert Path("out.jsonl").read_text() == before


def test_skipped_records_are_counted_and_named_in_the_summary(capsys):
    given({"id": "a", "name": "x"}, {"id": "b", "name": ""}, {"id": "c", "name": None}, {"id": "d", "name": "y"})
    assert run("in.jsonl") == 0
    assert "2 records skipped: the fields of the template are blank (--on-empty" in capsys.readouterr().out
    assert [line["custom_id"] for line in output()] == ["a", "d"]
    assert run("in.jsonl", out="ask.jsonl", words=(*QUESTION, *LABELS, "--on-empty", "ask", "--json")) == 0
    assert summary(capsys)["answered"] == 4
    assert run("in.jsonl", out="fail.jsonl", words=(*QUESTION, *LABELS, "--on-empty", "fail", "--json")) == 1
    told = summary(capsys)
    assert (told["answered"], told["failed"], told["skipped"]) == (2, 2, 0)


USELESS = {
    "a table": ("id,name\n1,Lamp\n", (*QUESTION, *LABELS), "this looks like CSV; if it is, give --input-format csv"),
    "other ids": ('{"id":1,"name":"x"}\n', (*QUESTION, *LABELS, "--id-field", "sku"), "line 1 has id, name"),
    "responses": ('{"custom_id":"1","url":"/v1/responses","body":{}}\n', ("--simulate",), "/v1/responses"),
    "an archive": ("PK\x03\x04", (*QUESTION, *LABELS), "a Zip archive or an Excel workbook"),
}


@pytest.mark.parametrize("case", USELESS)
@pytest.mark.parametrize("command", ["run", "warm", "calibrate", "spool"])
def test_an_input_of_which_nothing_can_be_asked_sends_and_leaves_nothing(case, command, capsys):
    content, words, told = USELESS[case]
    Path("in.jsonl").write_text(content)
    where = {
        "run": ["run", "in.jsonl", "-o", "out.jsonl"],
        "warm": ["warm", "in.jsonl", "--cache", "cache.sqlite"],
        "calibrate": ["calibrate", "in.jsonl"],
        "spool": ["spool", "spool.sqlite", "--put", "in.jsonl"],
    }[command]
    assert main([*where, *(word for word in words if command != "spool" or word != "--simulate")]) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert "--resume" not in shown
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]


def test_the_template_can_be_a_file_in_which_a_backslash_is_one():
    products(3)
    Path("template").write_text("Product:\n{name} \\n\n")
    with serving() as endpoint:
        asked, real = [], endpoint.read
        endpoint.read = lambda body: (asked.append(body["messages"][-1]["content"]), real(body))[1]
        words = ("--template", "@template", "--base-url", endpoint.base_url, "--model", "m", "--single")
        assert run("in.jsonl", words=words) == 0
        assert sorted(asked) == [f"Product:\nthing {number} \\n" for number in range(3)]
        Path("template").write_text("{name}")
        assert run("in.jsonl", words=(*words, "--resume")) == 2


# --- examples

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    ("form", "answer", "written"),
    [(("--labels", "a,b"), "b", '"b"'), ((), "b", "b"), (("--schema", "schema.json"), {"n": 3}, '{"n":3}')],
)
def test_examples_stand_between_the_instructions_and_every_question(single, form, answer, written):
    products(6)
    Path("schema.json").write_text(json.dumps(SCHEMA))
    given(
        {"input": {"name": "X"}, "output": answer},
        {"input": "Whole question", "output": answer},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]},
        path="examples.jsonl",
    )
    with serving() as endpoint:
        asked, real = [], endpoint.read
        endpoint.read = lambda body: (asked.append(body["messages"]), real(body))[1]
        words = (*QUESTION, "--system", "Sort.", *form, "--examples", "examples.jsonl", "--base-url", endpoint.base_url)
        assert run("in.jsonl", words=(*words, "--model", "m", *(["--single"] if single else []))) == 0
    assert len(asked) == (6 if single else 1)
    shown = ["Sort.", "Product: X", written, "Whole question", written, "u", "v"]
    for messages in asked:
        told = [message["content"].removesuffix("\n").partition("\n")[0] for message in messages[:7]]
        assert told == shown
        assert [message["role"] for message in messages[:7]] == ["system", *("user", "assistant") * 3]
        assert "thing" in messages[-1]["content"]
        assert len(messages) == 8
    assert len(output()) == 6
    assert all(line["error"] is None for line in output())


def test_other_examples_are_other_questions(capsys):
    products(3)
    given({"input": "x", "output": "home"}, path="examples.jsonl")
    words = (*QUESTION, *LABELS, "--examples", "examples.jsonl")
    assert run("in.jsonl", words=words) == 0
    given({"input": "x", "output": "other"}, path="examples.jsonl")
    assert run("in.jsonl", words=(*words, "--resume")) == 2
    assert "--examples (changed)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({"input": "x", "output": "neither"}, 'do not allow the "output" "neither"'),
        ({"input": {"title": "x"}, "output": "home"}, 'the field "name" is missing'),
        ({"input": 5, "output": "home"}, '"input" must be'),
        ({"output": "home"}, '"input" and "output", or "messages"'),
        ({"messages": [{"role": "user", "content": "x"}]}, "a user and an assistant in turn"),
        ({"messages": [{"role": "system", "content": "x"}]}, "a user and an assistant in turn"),
        ({"messages": "x"}, '"messages" must be a list'),
        ("nonsense", "it is not JSON"),
    ],
)
def test_an_example_that_is_wrong_is_named_before_anything_is_sent(example, words, capsys):
    products(1)
    given({"input": "x", "output": "home"}, example, path="examples.jsonl")
    assert run("in.jsonl", words=(*QUESTION, *LABELS, "--examples", "examples.jsonl")) == 2
    shown = capsys.readouterr().err
    assert "--examples: examples.jsonl, line 2: " in shown
    assert words in shown
    assert not Path("out.jsonl").exists()


def test_a_file_without_examples_is_a_usage_error(capsys):
    products(1)
    Path("examples.jsonl").write_text("\n")
    assert run("in.jsonl", words=(*QUESTION, *LABELS, "--examples", "examples.jsonl")) == 2
    assert "holds no example" in capsys.readouterr().err


# --- a join


def joined(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file)) if path.endswith(".csv") else [json.loads(line) for line in file]


@pytest.mark.parametrize("out", ["out.csv", "out.jsonl"])
def test_a_join_holds_every_record_once_and_in_order_with_its_answer(out):
    given(
        {"id": "c", "name": "x", "price": 3},
        {"id": "b", "name": ""},
        "broken",
        {"id": "a", "name": "y", "output": "mine"},
        {"id": "d"},
    )
    assert run("in.jsonl", out=out, words=(*QUESTION, *LABELS, "--join")) == 1
    rows = joined(out)
    journal = {line["custom_id"]: line for line in output(f"{out}.journal.jsonl")}
    assert [row.get("id") or None for row in rows] == ["c", "b", None, "a", "d"]
    assert [row["output 2"] or None for row in rows] == [
        journal["c"]["output"],
        None,
        None,
        journal["a"]["output"],
        None,
    ]
    assert rows[3]["output"] == "mine"
    errors = [json.loads(row["error"]) if row["error"] and out.endswith("csv") else row["error"] for row in rows]
    kinds = [error["type"] if error else None for error in errors]
    assert kinds == [None, "Skipped", "InputError", None, "InputError"]


@pytest.mark.parametrize("out", ["out.csv", "out.jsonl"])
def test_a_join_holds_what_can_be_made_out_of_records_that_cannot_be_asked_about(out):
    Path("in.csv").write_bytes(b"id,name\n1,Lamp\n,no id\n2,Chair,of oak\n3,caf\xe9\n4,Table,\n")
    assert run("in.csv", out=out, words=(*QUESTION, *LABELS, "--join")) == 1
    rows = joined(out)
    told = [[row.get(name) or "" for name in ("id", "name", "column 3")] for row in rows]
    assert told == [
        ["1", "Lamp", ""],
        ["", "no id", ""],
        ["2", "Chair", "of oak"],
        ["3", "caf\ufffd", ""],
        ["4", "Table", ""],
    ]
    assert [bool(row["output"]) for row in rows] == [True, False, False, False, True]


def test_a_join_of_a_large_input_is_in_its_order():
    Path("in.csv").write_text(as_csv(RECORDS))
    assert run("in.csv", out="out.csv", words=(*QUESTION, *LABELS, "--join")) == 0
    rows = joined("out.csv")
    found = {line["custom_id"]: line["output"] for line in output("out.csv.journal.jsonl")}
    assert rows == [record | {"output": found[record["id"]], "error": ""} for record in RECORDS]


def test_a_join_is_written_again_by_resuming_and_overwrites_no_other_file():
    products(20)
    Path("out.csv").write_text("precious")
    words = (*QUESTION, *LABELS, "--join")
    assert run("in.jsonl", out="out.csv", words=words) == 2
    assert Path("out.csv").read_text() == "precious"
    Path("out.csv").unlink()
    assert run("in.jsonl", out="out.csv", words=(*words, "--limit", "5")) == 0
    assert len(joined("out.csv")) == 5
    assert run("in.jsonl", out="out.csv", words=words) == 2  # it holds answers
    assert run("in.jsonl", out="out.csv", words=(*words, "--resume")) == 0
    assert [row["id"] for row in joined("out.csv")] == [f"p{number}" for number in range(20)]


@pytest.mark.parametrize("how", [("--join",), ("--output-format", "openai-batch")])
def test_an_output_that_is_written_at_the_end_is_never_taken_for_a_journal(how, capsys):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    given(*({"custom_id": f"r{number}", "body": body} for number in range(5)))
    command = ["run", "in.jsonl", "-o", "out.jsonl", "--simulate"]
    assert main([*command, *how]) == 0
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert main([*command, "--resume"]) == 2
    assert "give the --join or --output-format of that run too" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    assert main([*command, *how, "--resume", "--json"]) == 0
    assert summary(capsys)["upstream_calls"] == 0
