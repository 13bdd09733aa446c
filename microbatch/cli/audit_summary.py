"""The findings of audits in the summary of `run`, for people and as JSON."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.audit.lane_kind import sizes_in
from microbatch.cli.console import COLUMNS, percent, plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.accounting.audits import AuditedSize
    from microbatch.accounting.stats import Stats
    from microbatch.cli.asking_again import AskingAgain

MAX_SIZES: Final = 12
"""Sizes of kinds of lanes that are shown to people."""


def audit_figures(again: AskingAgain, stats: Stats) -> dict[str, Any]:
    """Return the figures of the audits of a run, as `--json` prints them."""
    return {
        "audit": msgspec.to_builtins(stats.audit),
        "audit_calls": _calls(stats),
        "audit_tokens": _tokens(stats),
        "asked_again": again.asked,
        "not_asked_again": again.left,
    }


def audit_lines(again: AskingAgain, stats: Stats) -> Iterator[str]:
    """Yield the figures of the audits of a run for people."""
    for line in _lines(again, stats):
        yield textwrap.fill(f"audit: {line}", COLUMNS, subsequent_indent="       ")


def _calls(stats: Stats) -> int:
    return stats.singles_by_reason.get("audit", 0)


def _tokens(stats: Stats) -> int:
    return stats.audit_usage.prompt_tokens + stats.audit_usage.completion_tokens


def _lines(again: AskingAgain, stats: Stats) -> Iterator[str]:
    sizes = stats.audit
    compared = [size for size in sizes if size.compared]
    bound = again.policy.max_excess
    for size in compared[:MAX_SIZES]:
        kinds = len({each.kind for each in compared})
        yield _line(size, bound, several=len(compared) > 1, kinds=kinds, given_up=again.given_up(size.kind, size.size))
    if compared[MAX_SIZES:]:
        yield f"and {plural(len(compared) - MAX_SIZES, 'size')} of other kinds of requests; --json has all of them"
    if not any(size.asked for size in sizes):
        yield "no answer from a combined prompt was asked for again alone"
    missing = sum(size.not_comparable for size in sizes)
    if missing:
        yield f"{plural(missing, 'answer')} not comparable: longer than 64 characters, or not given alone"
    if again.asked:
        how = "alone" if again.largest == 1 else f"in batches of at most {again.largest}"
        yield f"{plural(again.asked, 'answer')} of sizes that were given up asked again {how}"
    if again.left:
        yield f"{plural(again.left, 'answer')} of sizes that were given up not asked again yet"
    if _calls(stats):
        yield f"{plural(_calls(stats), 'call')} and {plural(_tokens(stats), 'token')} of this run were for the audit"


def _line(size: AuditedSize, bound: float, *, several: bool, kinds: int, given_up: bool) -> str:
    """Return what is known of *size*; it is named if it is one of *several*, and so is its kind if there are several *kinds*."""
    what = f"batches of {sizes_in(size.size)}"
    if kinds > 1:
        what += f" ({size.model or 'kind'} {size.kind[:6]})"
    found = f"{percent(size.raw)} of answers differ from asking alone; {percent(size.noise)} is the model's own noise; "
    if size.condemned:
        # After a certificate few scores show a change, and all scores together need not.
        now = f"is {percent(size.excess)}" if size.excess > bound else "has become larger"
        return f"{what} were given up: {found}the excess {now}, and at most {percent(bound)} is accepted"
    found += f"the excess is at most {percent(size.upper)} (95 %)" if size.upper < 1 else "too few to tell the excess"
    found += f", by {plural(size.compared, 'comparison')}"
    if given_up:
        return f"{what} were given up, undecided: {found}"
    return f"{what}: {found}" if several else found
