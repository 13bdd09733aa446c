"""What the commands say: flags, tables, summaries, failures, progress."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import io
import re
import sys
import threading
from types import SimpleNamespace

import msgspec
import pytest
from tqdm import tqdm

from microbatch.accounting.stats import Stats
from microbatch.cli import progress
from microbatch.cli.arguments import add_settings, described, flag, read_settings
from microbatch.cli.console import UsageError, change, dollars, percent, plural, seconds, table
from microbatch.cli.main import main, make_parser
from microbatch.cli.resume import Resumed
from microbatch.cli.run import summarize, summary_lines
from microbatch.cli.summary import MAX_KINDS, Failures
from microbatch.policy import FlushPolicy

CHEAP = Stats(
    items=20,
    answered=20,
    upstream_calls=2,
    batches=2,
    prompt_tokens=100,
    completion_tokens=50,
    cost_usd=0.001,
    unbatched_calls=20,
    unbatched_prompt_tokens=900,
    unbatched_completion_tokens=40,
    unbatched_cost_usd=0.004,
)


def policy_of(*words):
    parser = argparse.ArgumentParser()
    add_settings(parser, FlushPolicy)
    return read_settings(parser.parse_args(words), FlushPolicy)


def bulk(stats, wall_s=1.5):
    """Return what a run over 20 items has come to."""
    return SimpleNamespace(
        asked_again=False,
        skipped=0,
        stats=stats,
        items=20,
        answered=stats.answered,
        failed=20 - stats.answered,
        unasked=0,
        wall_s=wall_s,
    )


def words_of(stats, **options):
    plan = SimpleNamespace(**{"simulated": None, "single": False, "policy": FlushPolicy(merge="auto"), **options})
    return "\n".join(summary_lines(bulk(stats), plan))


def test_every_setting_of_the_policy_has_a_flag_with_its_own_words():
    parser = argparse.ArgumentParser()
    add_settings(parser, FlushPolicy)
    words = described(FlushPolicy)
    for field in dataclasses.fields(FlushPolicy):
        assert flag(field.name) in parser.format_help()
        assert words[field.name]


def test_flags_make_the_policy_they_say():
    assert policy_of() == FlushPolicy()
    given = policy_of("--max-batch-size", "4", "--max-wait", "0.5", "--idle", "wait", "--max-prompt-tokens", "99")
    assert given == FlushPolicy(max_batch_size=4, max_wait=0.5, idle="wait", max_prompt_tokens=99)


def test_a_truth_value_becomes_a_pair_of_flags():
    @dataclasses.dataclass
    class Settings:
        share: bool = False

    parser = argparse.ArgumentParser()
    add_settings(parser, Settings)
    assert read_settings(parser.parse_args(["--share"]), Settings) == Settings(share=True)
    assert read_settings(parser.parse_args(["--no-share"]), Settings) == Settings(share=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-batch-size", "0"), "--max-batch-size must be a number of at least 1, got 0"),
        (("--max-wait", "-1"), "--max-wait must be"),
        (("--low-max-wait", "nan"), "--low-max-wait must be"),
    ],
)
def test_a_setting_out_of_range_is_named_by_its_flag(words, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        policy_of(*words)


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("--max-cost", "1e999", "must be a finite number of at least 0, got 1e999"),
        ("--temperature", "nan", "must be a finite number of"),
        ("--max-cost", "-1", "must be a number of at least 0, got -1"),
    ],
)
def test_a_number_out_of_the_range_of_floats_is_refused_for_that(flag, text, message, capsys):
    with pytest.raises(SystemExit):
        main(["run", "in", "-o", "out", flag, text])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["run", "in", "-o", "out", "--idle", "never"],
        ["run", "in", "-o", "out", "--max-wait", "soon"],
        ["run", "in", "-o", "out", "--max-tokens", "0"],
        ["run", "in", "-o", "out", "--max-tokens", "x"],
        ["run", "in", "-o", "out", "--temperature", "x"],
        ["run", "in", "-o", "out", "--temperature", "-1"],
        ["run", "in", "-o", "out", "--labels", "a", "--schema", "f"],
        ["run", "in", "-o", "out", "--unknown"],
        ["run", "in", "-o", "out", "--max-batch", "3"],
        ["run", "in"],
        ["simulate", "--port", "70000"],
        ["simulate", "--first-token", "inf"],
        ["simulate", "--fault", "boredom"],
        ["simulate", "--fault-rate", "2"],
        ["simulate", "--rpm", "0"],
        ["simulate", "--tpm", "many"],
        ["warm", "in.jsonl"],
        ["warm", "--cache", "c.sqlite"],
        ["warm", "in.jsonl", "--cache", "c.sqlite", "--ttl", "0"],
        ["warm", "in.jsonl", "--cache", "c.sqlite", "--ttl", "soon"],
        ["warm", "in.jsonl", "--cache", "c.sqlite", "-o", "out.jsonl"],
        ["spool"],
        ["spool", "s.sqlite", "--dead", "--requeue"],
        ["spool", "s.sqlite", "--put", "in.jsonl", "--export", "out.jsonl"],
        ["spool", "s.sqlite", "--put"],
        ["spool", "s.sqlite", "--max-alone", "0"],
        ["unheard-of"],
    ],
)
def test_a_flag_that_cannot_be_is_told_with_exit_status_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("microbatch")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        *((name, name) for name in ("run", "calibrate", "warm", "spool", "worker", "serve", "demo", "simulate")),
        ("--odd run in.jsonl -o out.jsonl", "run"),
        ("", ""),
    ],
)
def test_an_unknown_flag_is_told_with_the_usage_of_its_command(words, command, capsys):
    operands = {"run": "in -o out", "warm": "in --cache c", "spool": "s", "worker": "s", "calibrate": "in"}
    with pytest.raises(SystemExit) as caught:
        main([*words.split(), *operands.get(words, "").split(), "--odd"])
    assert caught.value.code == 2
    usage, *_, last = capsys.readouterr().err.splitlines()
    assert usage.startswith(f"usage: microbatch {command or '[-h]'}")
    assert last.startswith(f"microbatch {command}".rstrip() + ": error: unrecognized arguments: --odd")


def test_a_source_tree_has_no_version(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setitem(main.__globals__, "version", missing)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == "microbatch unknown\n"


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "microbatch demo" in capsys.readouterr().err


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("microbatch ")


@pytest.mark.parametrize("command", ["run", "warm", "spool", "worker", "serve", "demo", "simulate"])
def test_every_command_explains_itself_in_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        make_parser().parse_args([command, "--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert ("examples:" in shown) == (command != "demo")


def test_figures_are_written_as_people_read_them():
    assert [dollars(amount) for amount in (None, 0.01234, 1234.5)] == ["unknown", "$0.0123", "$1,234.50"]
    assert [seconds(duration) for duration in (1.26, 75, 3720)] == ["1.3 s", "1 min 15 s", "1 h 02 min"]
    assert [plural(number, "item") for number in (0, 1, 1234)] == ["0 items", "1 item", "1,234 items"]
    assert [change(*pair) for pair in ((2, 10), (12, 10), (10, 10), (None, 1), (1, 0))] == [
        "-80 %",
        "+20 %",
        "same",
        "",
        "",
    ]


def test_a_table_lines_up():
    assert table(("", "a"), [("calls", "1"), ("x", "100")]).splitlines() == [
        "         a",
        "----------",
        "calls    1",
        "x      100",
    ]


def test_the_summary_has_exactly_the_promised_keys():
    summary = summarize(bulk(CHEAP, wall_s=1.23456), Resumed())
    assert list(summary) == [
        "items",
        "answered",
        "failed",
        "upstream_calls",
        "batches",
        "fallback_calls",
        "retries",
        "prompt_tokens",
        "completion_tokens",
        "unbatched_calls",
        "unbatched_prompt_tokens",
        "cost_usd",
        "unbatched_cost_usd",
        "wall_s",
        "changed",
        "reused",
        "unasked",
        "alone_by_field",
        "unknown_ids",
        "cut_replies",
        "canaries_failed",
        "lanes_parted",
        "singles_compared",
        "unpriced_calls",
        "merge_rules",
        "skipped",
    ]
    assert (summary["wall_s"], summary["unbatched_calls"]) == (1.235, 20)


def test_the_table_compares_with_one_call_each():
    shown = words_of(CHEAP)
    assert "20 of 20 items answered, 0 failed, in 1.5 s" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith("cost")] == [
        ["cost", "$0.0010", "$0.0040", "-75", "%"]
    ]
    assert "more than it saved" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_it_is_said_plainly_when_batching_cost_more_than_it_saved():
    dear = msgspec.structs.replace(CHEAP, cost_usd=0.005)
    assert "Batching cost more than it saved" in words_of(dear)
    assert "Batching cost more" not in words_of(dear, single=True)


def test_it_is_said_plainly_that_the_endpoint_was_simulated_and_what_is_not_known():
    assert "endpoint was simulated" in words_of(CHEAP, simulated="gpt-4.1-mini")
    unpriced = msgspec.structs.replace(CHEAP, cost_usd=None, unbatched_cost_usd=None, unreported_calls=2)
    assert "no price" in words_of(unpriced)
    assert "2 calls ended without reporting tokens" in words_of(unpriced)


def test_what_the_dollars_leave_out_is_said():
    some = msgspec.structs.replace(CHEAP, unpriced_calls=3)
    assert "3 calls of unpriced models are not included in the dollars" in words_of(some)
    assert "no price" not in words_of(some)
    assert "1 call of unpriced models is not included" in words_of(msgspec.structs.replace(CHEAP, unpriced_calls=1))
    none = msgspec.structs.replace(CHEAP, cost_usd=None, unbatched_cost_usd=None, unpriced_calls=3)
    assert "--prices FILE" in words_of(none)
    assert "unpriced" not in words_of(CHEAP)
    assert "no price for this model" in words_of(none, simulated="llama-9")


def test_a_run_without_answers_has_no_table():
    assert words_of(Stats()) == "0 of 20 items answered, 20 failed, in 1.5 s"


def test_equal_failures_are_told_once_with_the_first_few():
    failures = Failures()
    for number in range(2_465):
        failures.add("ConnectFailed: refused", f"p{number}", "id ")
    failures.add("ConnectFailed: reset", "p9", "id ")
    assert list(failures.lines()) == [
        "id p0, p1, p2, p3, p4 and 2,460 more: ConnectFailed: refused",
        "id p9: ConnectFailed: reset",
    ]


def refusal(number, words="Value {} of item_{} is not allowed", **others):
    message = f"status 400; it says: {words.format(number, number)}"
    return {"type": "BadRequest", "message": message, "status": 400, "code": None, **others}


def test_refusals_that_differ_by_numbers_and_ids_are_told_once_in_the_words_of_the_first():
    failures = Failures()
    for number in range(100):
        failures.add_error(refusal(number), f"p{number}")
    failures.add_error(refusal(0, "The image of item_{} is broken"), "a")
    failures.add_error(refusal(0, code="odd"), "b")
    failures.add_error(refusal(0, status=422), "c")
    failures.add_error({"type": "MissingAnswer", "message": "no answer"}, "d")
    said = "BadRequest: status 400; it says: Value 0 of item_0 is not allowed"
    assert list(failures.lines()) == [
        f"id p0, p1, p2, p3, p4 and 95 more: {said}",
        "id a: BadRequest: status 400; it says: The image of item_0 is broken",
        f"id b: {said}",
        f"id c: {said}",
        "id d: MissingAnswer: no answer",
    ]


def test_failures_of_very_many_kinds_take_no_room():
    failures = Failures()
    for number in range(1_000):
        failures.add(f"odd {number}", "x")
    shown = list(failures.lines())
    assert len(shown) == MAX_KINDS + 1
    assert f"{1_000 - MAX_KINDS:,} failures of other kinds" in shown[-1]


def test_progress_without_tqdm_shows_items_calls_tokens_dollars_and_the_time_left(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress.Progress(40, lambda: CHEAP, shown=True) as shown:
        for done in range(1, 21):
            shown.show(done)
    last = capsys.readouterr().err.rstrip("\n").rsplit("\r", 1)[1]
    for part in ("20 of 40 items", "items/s", "2 calls", "150 tokens", "$0.0010", "left"):
        assert part in last


def test_the_bar_is_tqdms_where_there_is_tqdm(capsys):
    with progress.Progress(40, lambda: CHEAP, shown=True) as shown:
        for done in range(1, 21):
            shown.show(done)
    assert "20/40" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["tqdm", "none"])
def test_what_is_asked_again_is_added_to_the_total(module, monkeypatch, capsys):
    if module == "none":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress.Progress(40, lambda: CHEAP, shown=True) as shown:
        shown.show(40)
        shown.extend(12)
        shown.show(50)
    assert re.search(r"50(/| of )52", capsys.readouterr().err)


def test_progress_without_a_bar_says_nothing(capsys):
    with progress.Progress(1, Stats, shown=False) as shown:
        shown.show(1)
    assert capsys.readouterr() == ("", "")


def test_a_bar_whose_stderr_fails_keeps_no_lock(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            raise OSError

    monkeypatch.setattr(sys, "stderr", Broken())
    with progress.Progress(10, Stats, shown=True) as bar:
        bar.show(5)

    def hold():
        with tqdm.get_lock():
            pass

    # A bar that is garbage-collected in another thread takes the lock there.
    other = threading.Thread(target=hold, daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive()


@pytest.mark.parametrize(
    ("share", "shown"), [(0.0149, "1.5 %"), (1.0, "100.0 %"), (-0.0003, "0.0 %"), (-0.02, "-2.0 %"), (0.0, "0.0 %")]
)
def test_a_share_is_shown_in_percent_with_one_decimal_and_never_as_minus_zero(share, shown):
    assert percent(share) == shown
