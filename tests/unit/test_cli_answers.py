"""The output of `run`, and what is read back from it."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from microbatch.cli.console import UsageError
from microbatch.cli.reading.input import id_digest
from microbatch.cli.resume import differences, hashed, keep_settings, settings_path
from microbatch.cli.writing.output import NotWritten, OutputFile, answer_line, error_object, failure_line
from microbatch.errors import BadRequest, ConfigError, MissingAnswer
from microbatch.messages import Reply, Usage


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "out.jsonl")


def good(name):
    return answer_line(name, "yes", Reply("yes", "yes", "batch", Usage(3, 2), 0.5))


def bad(name):
    return failure_line(name, {"type": "ServerError", "message": "no"})


def lines(path):
    with Path(path).open() as file:
        return [json.loads(line) for line in file]


def write(path, *told):
    with OutputFile(path) as output:
        for line in told:
            output.write(line)


def test_a_line_has_its_fields_in_order(path):
    write(path, good("a"), bad("b"))
    answered, failed = lines(path)
    assert list(failed) == ["custom_id", "output", "error", "route", "usage", "cost_usd"]
    assert list(answered) == [*failed, "batch_size", "lane_kind", "period"]
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0, "estimated": False}
    usage |= {"cache_write_tokens": 0, "reasoning_tokens": 0}
    assert answered == {
        "custom_id": "a",
        "output": "yes",
        "error": None,
        "route": "batch",
        "usage": usage,
        "cost_usd": 0.5,
        "batch_size": 1,
        "lane_kind": None,
        "period": 0,
    }
    assert failed["error"] == {"type": "ServerError", "message": "no"}
    assert [failed[key] for key in ("output", "route", "usage", "cost_usd")] == [None] * 4


@pytest.mark.parametrize(
    ("choices", "kept"),
    [
        ([{"message": {"content": "x"}, "logprobs": None}], False),
        ([{"message": {"content": None, "tool_calls": [{"id": "1"}]}}], True),
        ([{"message": {"content": "x"}, "logprobs": {"content": []}}], True),
        ([{"message": {"content": "x"}}, {"message": {"content": "y"}}], True),
        (["odd"], True),
    ],
)
def test_the_endpoints_json_is_kept_when_the_text_is_not_all_of_it(choices, kept):
    body = {"choices": choices}
    line = answer_line("a", "x", Reply("x", "x", "single", Usage(), body=body))
    assert line.get("body") == (body if kept else None)


def test_the_digest_of_the_question_follows_the_fields_of_the_answer_and_a_line_of_another_release_is_read_without_it(
    path,
):
    reply = Reply("yes", "yes", "batch", Usage())
    write(path, good("a"), answer_line("b", "yes", reply, "d1"), failure_line("c", {"type": "X"}, "d2"), good("d"))
    batch = ["batch_size", "lane_kind", "period"]
    assert [list(line)[6:] for line in lines(path)] == [batch, ["digest", *batch], ["digest"], batch]
    with OutputFile(path) as output:
        found = output.rows()
        asked = {name: found.of_id(id_digest(name)) for name in "abcd"}
        assert asked["c"] is None
        assert (asked["a"].question, asked["d"].question) == (None, None)
        assert asked["b"].question == found.question("d1") is not None
        assert (found.question("d2"), found.question(None)) == (None, None)
        assert output.row_at(found.answer_to(found.question("d1")), "new") == lines(path)[1] | {"custom_id": "new"}


def test_the_output_is_written_anew_with_nothing_but_the_rows_to_keep_and_stays_locked(path, tmp_path):
    write(path, good("a"), good("b"), bad("c"))
    before = Path(path).read_bytes()
    with OutputFile(path) as output:
        rows = output.rows()
        kept = [(rows.of_id(id_digest("b")).start, "b"), (rows.of_id(id_digest("a")).start, "z")]
        output.replace(kept, tmp_path / "aside")
        with pytest.raises(UsageError, match="another run"):
            OutputFile(path)
        output.write(good("n"))
    assert [line["custom_id"] for line in lines(path)] == ["b", "z", "n"]
    assert (tmp_path / "aside").read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"out.jsonl", "aside"}


@pytest.mark.parametrize("taken", [False, True])
def test_answers_outlive_the_deletion_of_their_file(path, taken):
    output = OutputFile(path)
    output.write(good("a"))
    Path(path).unlink()
    output.write(good("b"))
    if not taken:
        output.close()
        found = path
    else:
        Path(path).write_text("another's\n")
        with pytest.raises(NotWritten, match=r"replaced by another file.*out\.jsonl\.old1"):
            output.close()
        assert Path(path).read_text() == "another's\n"
        found = path + ".old1"
    assert [line["custom_id"] for line in lines(found)] == ["a", "b"]


def test_an_error_is_told_without_what_the_endpoint_quoted():
    error = BadRequest("no such thing", status=400, code="odd", request_id="r1", body="the prompt", attempts=2)
    assert error_object(error) == {
        "type": "BadRequest",
        "message": "no such thing",
        "attempts": 2,
        "status": 400,
        "code": "odd",
        "request_id": "r1",
    }
    assert error_object(MissingAnswer("none", raw="words", attempts=1)) == {
        "type": "MissingAnswer",
        "message": "none",
        "attempts": 1,
    }
    assert error_object(ConfigError("x")) == {"type": "ConfigError", "message": "x"}


def test_the_last_line_of_an_id_counts(path):
    write(path, bad("a"), good("a"), good("b"), bad("b"), bad("c"))
    with OutputFile(path) as output:
        found = output.rows()
        assert [found.of_id(id_digest(name)) is not None for name in "abc"] == [True, False, False]


@pytest.mark.parametrize("torn", [b"", b"{", b'{"custom_id":"c","output":null', b"x" * 200_000])
def test_an_incomplete_last_line_is_cut_off_and_nothing_else(path, torn):
    write(path, good("a"), good("b"))
    whole = Path(path).stat().st_size
    with Path(path).open("ab") as file:
        file.write(torn)
    with OutputFile(path) as output:
        assert output.rows().cut == len(torn)
        assert output.size == whole
        output.write(good("c"))
    assert [line["custom_id"] for line in lines(path)] == ["a", "b", "c"]


def test_a_file_that_is_nothing_but_an_incomplete_line_is_emptied(path):
    with Path(path).open("w") as file:
        file.write('{"custom_id"')
    with OutputFile(path) as output:
        found = output.rows()
        assert (found.cut, output.size) == (12, 0)


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"custom_id": 1, "output": 1, "error": null}', '{"custom_id": "a", "error": null}']
)
def test_a_line_that_is_not_ours_is_named(path, line):
    write(path, good("a"))
    with Path(path).open("a") as file:
        file.write(line + "\n")
    with OutputFile(path) as output, pytest.raises(UsageError, match=r"out\.jsonl: line 2 was not written by"):
        output.rows()


def test_two_runs_cannot_write_one_output(path):
    with OutputFile(path), pytest.raises(UsageError, match="another run"):
        OutputFile(path)
    with OutputFile(path):
        pass  # free again


def test_the_output_must_be_a_file_that_can_be_written(tmp_path):
    with pytest.raises(UsageError, match="must be a file"):
        OutputFile(os.devnull)
    with pytest.raises(UsageError, match="cannot write"):
        OutputFile(str(tmp_path / "nowhere" / "out.jsonl"))


def test_writing_does_not_wait_for_the_disk_and_closing_does(path, monkeypatch):
    synced, release = [], threading.Event()

    def slow(file):
        release.wait(10)
        synced.append(file)

    monkeypatch.setattr(os, "fsync", slow)
    with OutputFile(path) as output:
        for number in range(100):
            output.write(good(str(number)))
        assert len(lines(path)) == 100  # a kill now would lose nothing
        assert synced == []
        release.set()
    assert 1 <= len(synced) <= 3


def test_a_full_disk_is_told_once_and_for_all(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with OutputFile(path) as output:
        output.write(good("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(NotWritten, match="No space left"):
                output.write(good("b"))
    monkeypatch.setattr(os, "fsync", full)
    output = OutputFile(path)
    output.write(good("c"))
    with pytest.raises(NotWritten, match="No space left"):
        output.close()
    with pytest.raises(NotWritten, match="No space left"):
        output.write(good("d"))


def test_a_line_is_written_whole_even_if_the_system_takes_it_in_pieces(path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:7]))
    write(path, good("a"), good("b"))
    assert [line["custom_id"] for line in lines(path)] == ["a", "b"]


def test_settings_that_differ_are_named_but_no_prompt_is_kept(path):
    settings = {
        "--system": hashed("secret words"),
        "--max-batch-size": 16,
        "--labels": None,
        "--model": "m",
    }
    keep_settings(path, settings)
    assert "secret" not in settings_path(path).read_text()
    assert differences(path, settings) == {}
    others = {
        "--system": hashed("others"),
        "--max-batch-size": 8,
        "--labels": hashed(["a"]),
        "--model": None,
    }
    assert differences(path, others) == {
        "--system": "--system (changed)",
        "--max-batch-size": "--max-batch-size (was 16, is 8)",
        "--labels": "--labels (added)",
        "--model": "--model (was m, is not set)",
    }
    assert differences(path, {**settings, "--system": None}) == {"--system": "--system (left out)"}


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_nothing_is_known_without_a_readable_digest(path, content):
    if content is not None:
        settings_path(path).write_text(content)
    assert differences(path, {}) is None


def test_settings_that_cannot_be_kept_are_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"cannot write .*digest"):
        keep_settings(str(tmp_path / "nowhere" / "out"), {})


# --- several lines of an id


def from_batch(name, output, size=16, period=0):
    reply = Reply(output, output, "batch", Usage(3, 2), 0.5)
    reply.batch_size, reply.lane_kind = size, "k"
    return answer_line(name, output, reply, f"of {name}", period)


def large(answer):
    return answer.lane_kind == "k" and answer.batch_size > 8


def test_the_last_line_of_an_id_decides_whether_it_is_selected(path):
    told = [from_batch("once", "a"), from_batch("again", "a"), from_batch("failed", "a"), good("other")]
    told += [from_batch("again", "b", 8), bad("failed"), from_batch("worse", "a", 8), from_batch("worse", "b")]
    with OutputFile(path) as output:
        for line in told:
            output.write(line)
        assert output.select(large) == {id_digest("once"), id_digest("worse")}
        assert output.select(lambda answer: answer.lane_kind is None) == {id_digest("other")}


def test_compacting_leaves_the_last_line_of_each_id_as_it_is_and_writing_goes_on(path):
    told = [from_batch("a", "1"), good("b"), from_batch("a", "2"), bad("c"), from_batch("a", "é 3"), good("c")]
    with OutputFile(path) as output:
        for line in told:
            output.write(line)
        output.compact()
        assert lines(path) == [told[1], told[4], told[5]]
        with pytest.raises(UsageError, match="another run is writing"):
            OutputFile(path)
        output.write(good("d"))
        output.compact()
    assert lines(path) == [told[1], told[4], told[5], good("d")]
    assert not Path(path + ".new").exists()
    assert Path(path).stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_without_repeated_ids_is_not_written_anew(path):
    write(path, good("a"), bad("b"))
    before = Path(path).stat().st_ino
    with OutputFile(path) as output:
        output.compact()
    assert Path(path).stat().st_ino == before


def test_compacting_reads_and_restores_a_file_that_was_deleted_and_leaves_another_one_alone(path):
    with OutputFile(path) as output:
        for line in (from_batch("a", "1"), from_batch("a", "2")):
            output.write(line)
        Path(path).unlink()
        assert output.select(large) == {id_digest("a")}
        output.compact()
        assert lines(path) == [from_batch("a", "2")]
    other = path + "2"
    output = OutputFile(other)
    for line in (from_batch("a", "1"), from_batch("a", "2")):
        output.write(line)
    Path(other).unlink()
    Path(other).write_text("not ours")
    output.compact()
    with pytest.raises(NotWritten, match="was replaced by another file"):
        output.close()
    assert Path(other).read_text() == "not ours"


def test_what_cannot_be_compacted_is_as_it_was(path):
    told = [from_batch("a", "1"), from_batch("a", "2")]
    with OutputFile(path) as output:
        for line in told:
            output.write(line)
        Path(path + ".new").mkdir()
        with pytest.raises(UsageError, match="cannot write"):
            output.compact()
        assert lines(path) == told
        output.write(good("b"))
    assert lines(path) == [*told, good("b")]


def test_an_incomplete_line_at_the_end_is_no_line(path):
    write(path, from_batch("a", "1"))
    with OutputFile(path) as output:
        os.write(output._file, b'{"custom_id":"a","out')
        assert output.select(large) == {id_digest("a")}
