"""The record of the audits of a run, and the lines that depend on it."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

import microbatch as mb
from microbatch.audit.lane_kind import LaneKind
from microbatch.cli.asking_again import AskingAgain, Record, record_path

BOUND = 0.1


def judge(kind, step, verdict):
    """Add scores to *step* of *kind* until the *verdict* falls."""
    while kind.add(step, int(verdict == "condemned"), BOUND, adapt=True) != verdict:
        pass


@pytest.fixture
def run(tmp_path):
    """Return the audit of a run into a file, the kind of lane that it audits, and a function that reads the record."""
    kind = LaneKind("kind")
    output = SimpleNamespace(name=str(tmp_path / "out.jsonl"))
    audits = SimpleNamespace(kinds={"kind": kind}, state=lambda: [kind], restore=list)
    again = AskingAgain(mb.AuditPolicy(max_excess=BOUND), output, ())
    again.begin(audits)

    def kept():
        return msgspec.json.decode(record_path(output.name).read_bytes(), type=Record).kinds[0]

    return again, kind, kept


def period(again, size, kind="kind"):
    return again.period(mb.Reply("x", "x", "batch", mb.Usage(), batch_size=size, lane_kind=kind))


def test_a_new_try_is_in_the_record_before_a_line_that_names_its_period(run):
    """After a kill a further try would have its number else, and what is said of the one would be said of the other."""
    again, kind, kept = run
    judge(kind, 16, "condemned")
    assert period(again, 16) == 0
    judge(kind, 8, "certified")
    assert kind.grows(10_000, 16)
    assert period(again, 16) == 1
    assert kept().period(16) == 1
    assert kept().limit is None


def test_a_size_that_is_not_sent_any_more_is_given_up_condemned_or_not(run):
    again, kind, _ = run
    sizes = (4, 8, 16, 64)
    assert not any(again.given_up("kind", size) for size in sizes)
    kind.add(64, 0, BOUND, adapt=True)
    judge(kind, 16, "condemned")
    assert [again.given_up("kind", size) for size in sizes] == [False, False, True, True]
    assert not again.given_up("other", 16)


def test_the_record_is_not_written_for_each_line(run, monkeypatch):
    again, kind, _ = run
    judge(kind, 8, "certified")
    written = []
    save = AskingAgain._save
    monkeypatch.setattr(AskingAgain, "_save", lambda self, **options: (written.append(1), save(self, **options)))
    periods = [period(again, size) for size in (8, 7, 8, 16, 1, 8)]
    assert periods == [1, 1, 1, 0, 0, 1]
    assert len(written) == 1
    assert period(again, 8, kind=None) == 0
