"""`run --audit`: no answer of a size that was found to do harm is left in the output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from command_line import given, here, output, refuse, summary  # noqa: F401 a fixture
from helpers import serving

from microbatch.batching.audits import Audits
from microbatch.cli.main import main
from microbatch.testing import Latency, Mistakes

pytestmark = [pytest.mark.usefixtures("here"), pytest.mark.slow]

LABELS = ("north", "south", "east", "west")
ITEMS = 600
BAD = Mistakes(by_size={9: 0.4})
SOUND = Mistakes()
SLOW = Latency(first_token=0.05, tokens_per_second=None)
FEW = ("--max-concurrent-batches", "4")
PATIENCE = 30


def label(number):
    return LABELS[number * 7 % 4]


def answer(text, _schema):
    return label(int(re.search(r"\d+", text)[0]))


def words(endpoint, *others):
    return [
        *("run", "in.jsonl", "-o", "out.jsonl", "--template", "Path {number}", "--labels", ",".join(LABELS)),
        *("--system", "Say in which direction the path leads. " * 8, "--model", "m", "--base-url", endpoint.base_url),
        *("--max-batch-size", "16", "--json", *others),
    ]


def paths(count):
    given(*({"id": f"p{number}", "number": number} for number in range(count)))


def run(endpoint, *others, audit=("--audit",), status=0):
    assert main(words(endpoint, *audit, *others)) == status


def accuracy(count=ITEMS):
    """Check that there is one line for every id, and return the share of right answers."""
    lines = output()
    assert Counter(line["custom_id"] for line in lines) == {f"p{number}": 1 for number in range(count)}
    assert all(line["error"] is None for line in lines)
    return sum(line["output"] == label(int(line["custom_id"][1:])) for line in lines) / count


def sizes():
    return Counter(line["batch_size"] for line in output())


def row(told, size):
    return next(row for row in told["audit"] if row["size"] == size)


@pytest.mark.promise(of="audit_run")
def test_what_a_size_that_does_harm_has_answered_is_asked_again_in_smaller_batches(capsys):
    paths(ITEMS)
    with serving(answer=answer, mistakes=BAD) as endpoint:
        run(endpoint)
        shown = capsys.readouterr()
        told = json.loads(shown.out.splitlines()[-1])
        assert accuracy() >= 0.95
        assert max(sizes()) <= 8
        assert (told["answered"], told["failed"], told["unasked"], told["not_asked_again"]) == (ITEMS, 0, 0, 0)
        assert row(told, 16)["condemned"]
        assert row(told, 16)["excess"] > 0.02
        assert not row(told, max(sizes()))["condemned"]
        assert 0 < told["asked_again"] <= ITEMS
        # The calls of the run include audits; it is compared with one call for each item.
        assert endpoint.single_calls == told["audit_calls"]
        assert 0 < told["audit_tokens"] < told["prompt_tokens"] + told["completion_tokens"]
        paid = told["prompt_tokens"], told["completion_tokens"], told["upstream_calls"]
        assert paid == (endpoint.prompt_tokens, endpoint.completion_tokens, endpoint.calls)
        assert told["unbatched_calls"] == ITEMS
    assert "batches of up to 16 were given up" in " ".join(shown.err.split())
    assert f"{told['asked_again']} answers of sizes that were given up asked again in batches of at most" in " ".join(
        shown.err.replace("\n      ", "").split()
    )


def test_a_sound_model_keeps_its_size_and_nothing_is_asked_twice(capsys):
    paths(ITEMS)
    with serving(answer=answer, mistakes=SOUND) as endpoint:
        run(endpoint)
    told = summary(capsys)
    assert accuracy() == 1
    assert sizes() == {16: 592, 8: 8}
    assert (told["asked_again"], told["not_asked_again"], told["unbatched_calls"]) == (0, 0, ITEMS)
    assert row(told, 16)["excess"] == 0
    assert row(told, 16)["upper"] < 0.5
    assert not any(each["condemned"] for each in told["audit"])


def test_without_an_audit_the_summary_is_what_it_was_and_lines_say_which_batch_they_are_from(capsys):
    paths(20)
    with serving(answer=answer) as endpoint:
        run(endpoint, audit=())
    assert not {"audit", "asked_again", "audit_calls"} & summary(capsys).keys()
    assert {"batch_size", "lane_kind", "period"} <= output()[0].keys()
    assert not Path("out.jsonl.audit").exists()


def started(endpoint, lines, *others):
    """Run as a process, with --resume, until the output has so many lines."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    command = [sys.executable, "-m", "microbatch", *words(endpoint, "--audit", "--resume", *others)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + PATIENCE
    while not Path("out.jsonl").exists() or Path("out.jsonl").read_bytes().count(b"\n") < lines:
        assert time.monotonic() < end
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


@pytest.mark.promise(of="audit_run")
def test_killed_in_mid_run_and_resumed_it_ends_with_right_answers_too(capsys):
    count = 900  # a kill loses the audits under way, so that it takes longer to see the harm
    paths(count)
    with serving(answer=answer, mistakes=BAD, latency=SLOW) as endpoint:
        for part in (64, count - 40):
            process = started(endpoint, part, *FEW)
            process.kill()
            process.communicate()
        run(endpoint, "--resume")
    told = summary(capsys)
    assert accuracy(count) >= 0.95
    assert max(sizes()) <= 8
    assert told["not_asked_again"] == 0


def test_stopped_it_waits_for_no_audits_and_tells_what_is_doubtful(capsys):
    count = 900
    paths(count)
    with serving(answer=answer, mistakes=BAD, latency=SLOW) as endpoint:
        process = started(endpoint, 700, *FEW)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        told = json.loads(out.splitlines()[-1])
        assert process.returncode == 130
        assert "Traceback" not in err
        assert err.splitlines()[-1].endswith("--resume")
        assert row(told, 16)["condemned"]
        assert told["not_asked_again"] > 0
        assert told["not_asked_again"] == sizes()[16]
        run(endpoint, "--resume")
    resumed = summary(capsys)
    assert (resumed["asked_again"], resumed["not_asked_again"]) == (told["not_asked_again"], 0)
    assert accuracy(count) >= 0.95


def test_doubtful_answers_are_asked_again_in_spite_of_the_cache_and_replaced_there(capsys):
    paths(ITEMS)
    cache = ("--cache", "cache.sqlite")
    with serving(answer=answer, mistakes=BAD) as endpoint:
        run(endpoint, *cache)
        assert summary(capsys)["asked_again"] > 0
        assert accuracy() >= 0.95
        asked = endpoint.calls
        run(endpoint, *cache, "--force", audit=())
        assert endpoint.calls == asked
        assert accuracy() >= 0.95


def test_a_cache_that_takes_doubtful_answers_for_good_ones_is_left_aside(capsys, monkeypatch):
    # As where entries are dated by another clock.
    monkeypatch.setattr(Audits, "is_condemned", lambda *_: False)
    paths(ITEMS)
    with serving(answer=answer, mistakes=BAD) as endpoint:
        run(endpoint, "--cache", "cache.sqlite")
    assert accuracy() >= 0.95
    assert summary(capsys)["not_asked_again"] == 0


def test_a_model_that_becomes_bad_after_a_certificate_is_asked_again_from_there(capsys):
    count, bad_from = 900, 300
    paths(count)
    small = ("--max-batch-size", "2", "--max-concurrent-batches", "2", "--audit", "0.1", "--max-excess", "0.3")
    with serving(answer=answer, mistakes=Mistakes()) as endpoint:
        real = endpoint.reply

        def reply(prompt, key=""):
            if endpoint.items > bad_from:
                endpoint.mistakes.by_size = {2: 0.9}
            return real(prompt, key)

        endpoint.reply = reply
        run(endpoint, *small, audit=())
    told = summary(capsys)
    kept = [line for line in output() if line["batch_size"] == 2]
    assert row(told, 2)["condemned"]
    assert accuracy(count) >= 0.95
    assert {line["period"] for line in kept} == {0}, "answers before the certificate are not doubtful, all others are"
    assert len(kept) > 20
    assert 100 < told["asked_again"] < count
    assert told["not_asked_again"] == 0


def second_asking():
    """Return a condition that holds for prompts with items that were asked in an earlier combined prompt."""
    seen, on = set(), []

    def again(text):
        numbers = re.findall(r"Path (\d+)", text)
        if len(numbers) > 1 and seen.intersection(numbers):
            on.append(True)
        if len(numbers) > 1:
            seen.update(numbers)
        return bool(on)

    return again


def test_what_an_endpoint_that_falls_silent_has_left_is_told_and_asked_again_by_resume(capsys):
    paths(ITEMS)
    with serving(answer=answer, mistakes=BAD) as endpoint:
        again = second_asking()
        real = endpoint.read
        refuse(endpoint, again)
        run(endpoint, "--give-up-after", "1", status=1)
        shown = capsys.readouterr()
        told = json.loads(shown.out.splitlines()[-1])
        assert (told["answered"], told["unasked"]) == (ITEMS, 0)
        assert told["not_asked_again"] > 0
        assert "not asked again yet" in " ".join(shown.err.split())
        assert shown.err.splitlines()[-1].endswith("--resume")
        assert accuracy() < 0.95, "the earlier answers are kept"
        endpoint.read = real
        run(endpoint, "--resume")
        resumed = summary(capsys)
        assert (resumed["items"], resumed["asked_again"]) == (0, told["not_asked_again"])
        assert resumed["not_asked_again"] == 0
        assert accuracy() >= 0.95
        assert endpoint.calls
        run(endpoint, "--resume")
        assert summary(capsys)["upstream_calls"] == 0


@pytest.mark.promise(of="audit_run")
def test_an_answer_that_cannot_be_had_again_stands_and_is_told(capsys):
    paths(ITEMS)
    with serving(answer=answer, mistakes=BAD) as endpoint:
        again = second_asking()
        real = endpoint.read
        refuse(endpoint, lambda text: again(text) and bool(re.search(r"Path 3\b", text)), code=400)
        run(endpoint, status=1)
        shown = capsys.readouterr()
        told = json.loads(shown.out.splitlines()[-1])
        assert (told["answered"], told["failed"], told["unasked"], told["not_asked_again"]) == (ITEMS, 0, 0, 1)
        assert "id p3: BadRequest" in shown.err
        assert accuracy() >= 0.95
        assert sizes()[16] == 1
        endpoint.read = real
        run(endpoint, "--resume")
        assert summary(capsys)["asked_again"] == 1
        assert sizes()[16] == 0


def test_several_lines_of_an_id_that_a_kill_has_left_become_one(capsys):
    paths(40)
    with serving(answer=answer) as endpoint:
        run(endpoint)
        lines = output()
        old = [{**line, "output": "west", "batch_size": 16} for line in lines[:7]]
        given(*old, *lines, path="out.jsonl")
        run(endpoint, "--resume")
    assert accuracy(40) == 1
    assert [line["custom_id"] for line in output()] == [line["custom_id"] for line in lines]


def test_the_record_of_the_audits_holds_no_text_and_goes_with_its_output(capsys):
    paths(ITEMS)
    record = Path("out.jsonl.audit")
    with serving(answer=answer, mistakes=BAD) as endpoint:
        run(endpoint)
        kept = record.read_text()
        assert not any(word in kept for word in (*LABELS, "Path", "direction"))
        run(endpoint, "--force")
        assert Path("out.jsonl.old1.audit").read_text() == kept
        assert accuracy() >= 0.95
        told = summary(capsys)
        assert row(told, 16)["condemned"], "it began anew"
        Path("out.jsonl").unlink()
        record.write_text(kept)
        run(endpoint, "--max-excess", "0.02")
        assert summary(capsys)["asked_again"] > 0, "the record of other answers is not used"


def test_other_settings_of_the_audit_need_force_and_begin_it_anew(capsys):
    paths(200)
    with serving(answer=answer, mistakes=BAD) as endpoint:
        run(endpoint)
        for others, audit in (((), ()), (("--max-excess", "0.5"), ("--audit",))):
            run(endpoint, "--resume", *others, audit=audit, status=2)
            assert "--max-excess (was 0.02" in capsys.readouterr().err
        run(endpoint, "--resume", "--audit", "0.5")
        run(endpoint, "--resume", "--force", "--max-excess", "0.5")
        assert "the audit begins anew" in capsys.readouterr().err
        Path("out.jsonl.audit").write_text("{")
        run(endpoint, "--resume", "--force", "--max-excess", "0.5")
        assert "cannot be read: the audit begins anew" in capsys.readouterr().err
        assert accuracy(200) >= 0


@pytest.mark.parametrize(
    "words", [("--audit", "in.jsonl"), ("in.jsonl", "--audit", "2"), ("in.jsonl", "--audit", "nan")]
)
def test_a_share_that_cannot_be_read_is_refused_and_a_file_name_is_told_from_it(words, capsys):
    paths(1)
    with pytest.raises(SystemExit) as ended:
        main(["run", *words, "-o", "out.jsonl", "--template", "{number}", "--simulate"])
    assert ended.value.code == 2
    assert f"must be auto or a number of 0 to 1, got {words[-1]!r} (write --audit=auto if" in capsys.readouterr().err


def test_an_output_that_another_program_has_written_to_ends_the_run_with_its_summary(capsys):
    paths(ITEMS)
    with serving(answer=answer, mistakes=BAD) as endpoint:

        def spoiled(_):
            with Path("out.jsonl").open("a") as file:
                file.write("not ours\n")

        refuse(endpoint, spoiled)
        run(endpoint, status=1)
    shown = capsys.readouterr()
    told = json.loads(shown.out.splitlines()[-1])
    assert row(told, 16)["condemned"]
    assert (told["answered"], told["unasked"]) == (ITEMS, 0)
    assert "was not written by `microbatch run`" in shown.err
