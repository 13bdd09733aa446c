"""Lines about the audit in the summary of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from microbatch.accounting.audits import AuditedSize
from microbatch.accounting.stats import Stats
from microbatch.cli.audit_summary import MAX_SIZES, audit_figures, audit_lines
from microbatch.cli.summary import remarks
from microbatch.messages import Usage
from microbatch.policy import AuditPolicy


def again(**figures):
    none = {"asked": 0, "largest": 0, "left": 0, "given_up": lambda *_: False}
    return SimpleNamespace(policy=AuditPolicy(), **{**none, **figures})


def stats(*sizes, calls=0, tokens=0):
    return Stats(audit=sizes, singles_by_reason={"audit": calls}, audit_usage=Usage(tokens - tokens // 3, tokens // 3))


def audited(size=16, **figures):
    none = {"asked": 100, "compared": 100, "not_comparable": 0, "raw": 0.0, "noise": 0.0, "excess": 0.0, "upper": 0.03}
    verdict = {"certified": False, "condemned": False}
    return AuditedSize(**{"kind": "abcdef0123", "model": "m", "size": size, **none, **verdict, **figures})


def told(*sizes, calls=0, tokens=0, **figures):
    return " ".join("\n".join(audit_lines(again(**figures), stats(*sizes, calls=calls, tokens=tokens))).split())


def test_one_size_is_told_in_a_sentence():
    assert told(audited(raw=0.011, noise=0.008, excess=0.003, upper=0.0161)) == (
        "audit: 1.1 % of answers differ from asking alone; 0.8 % is the model's own noise; the excess is at most 1.6 % (95 %), "
        "by 100 comparisons"
    )


def test_several_sizes_are_named_and_so_is_what_was_given_up_and_asked_again():
    sizes = audited(8), audited(16, raw=0.41, noise=0.01, excess=0.4, condemned=True), audited(64)
    shown = told(*sizes, asked=412, largest=8, left=3, calls=43, tokens=5_432)
    for part in (
        "audit: batches of up to 8: 0.0 % of answers differ",
        "audit: batches of up to 16 were given up: 41.0 % of answers differ from asking alone",
        "the excess is 40.0 %, and at most 2.0 % is accepted",
        "batches of more than 32:",
        "412 answers of sizes that were given up asked again in batches of at most 8",
        "3 answers of sizes that were given up not asked again yet",
        "43 calls and 5,432 tokens of this run were for the audit",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("sizes", "figures", "part"),
    [
        ([audited(upper=1.0, compared=2)], {}, "too few to tell the excess, by 2 comparisons"),
        ([audited(compared=1, upper=0.97)], {}, "at most 97.0 % (95 %), by 1 comparison"),
        ([audited(compared=0, not_comparable=7)], {}, "7 answers not comparable"),
        ([audited(asked=0, compared=0)], {}, "no answer from a combined prompt was asked for again alone"),
        ([], {}, "no answer from a combined prompt was asked for again alone"),
        ([audited()], {"asked": 1, "largest": 1}, "1 answer of sizes that were given up asked again alone"),
        ([audited(condemned=True, excess=0.001)], {}, "the excess has become larger, and at most 2.0 % is accepted"),
        (
            [audited(8), audited(16, raw=0.3, excess=0.3, upper=0.669)],
            {"given_up": lambda _, size: size == 16},
            "batches of up to 16 were given up, undecided: 30.0 % of answers",
        ),
        ([audited(), audited(kind="other")], {}, "batches of up to 16 (m abcdef): 0.0 %"),
        ([audited(kind=str(number)) for number in range(99)], {}, f"and {99 - MAX_SIZES} sizes of other kinds"),
    ],
)
def test_what_else_there_is_to_tell(sizes, figures, part):
    assert part in told(*sizes, **figures)


def test_lines_are_wrapped():
    sizes = [audited(), audited(32, raw=0.41, noise=0.01, excess=0.4, condemned=True)]
    assert all(len(line) <= 80 for each in audit_lines(again(), stats(*sizes)) for line in each.splitlines())


@pytest.mark.parametrize("asked_again", [False, True])
def test_short_instructions_are_not_blamed_for_the_cost_of_asking_again(asked_again):
    dear, plan = (
        Stats(answered=9, cost_usd=0.005, unbatched_cost_usd=0.004),
        SimpleNamespace(single=False, simulated=None),
    )
    shown = " ".join(" ".join(remarks(dear, plan, asked_again=asked_again)).split())
    assert ("shorter than" in shown) is not asked_again
    assert ("has had asked again" in shown) is asked_again


def test_the_json_has_every_figure():
    size = audited(certified=True)
    figures = audit_figures(again(asked=4, left=1), stats(size, calls=3, tokens=70))
    assert figures == {
        "audit": ({name: getattr(size, name) for name in AuditedSize.__struct_fields__},),
        "audit_calls": 3,
        "audit_tokens": 70,
        "asked_again": 4,
        "not_asked_again": 1,
    }
