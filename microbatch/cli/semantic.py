"""`--semantic-cache`: its flags, its cache, and its figures in the summary of `run`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.cli.arguments import add_flag
from microbatch.cli.console import COLUMNS, UsageError, plural
from microbatch.errors import ConfigError
from microbatch.semantic.cache import SemanticCache

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from microbatch.accounting.stats import Stats
    from microbatch.cli.arguments import Group
    from microbatch.protocols import Cache

_SHOWN: Final = 6  # kinds of questions
_MAX_ERROR: Final = 0.01


def add_semantic_cache(group: Group) -> None:
    """Add `--semantic-cache` and `--max-error`."""
    text = (
        "answer similar questions from the cache too, once it was shown that such answers are right; needs --cache and "
        "--embedding-model; what was shown, and the vectors, are not kept in the cache but end with this process"
    )
    add_flag(group, "--semantic-cache", text)
    text = "with --semantic-cache: the largest share of wrong answers that is accepted"
    add_flag(group, "--max-error SHARE", text, default=_MAX_ERROR, least=0, most=1)


def semantic_cache(args: argparse.Namespace, exact: Cache | None) -> SemanticCache | None:
    """Return the cache of the flags around *exact*; None without `--semantic-cache`. Raise `UsageError` if a flag is missing."""
    if not getattr(args, "semantic_cache", False):
        return None
    if exact is None:
        raise UsageError("--semantic-cache needs --cache FILE or URL, where the answers are kept")
    if args.embedding_model is None and not getattr(args, "simulate", False):
        raise UsageError("--semantic-cache needs --embedding-model NAME, the endpoint's model for vectors of questions")
    try:
        return SemanticCache(exact, model=args.embedding_model or _SIMULATED, max_error=args.max_error)
    except ConfigError as error:
        raise UsageError(str(error).replace("max_error", "--max-error")) from error


_SIMULATED: Final = "text-embedding-3-small"
"""The embedding model with `--simulate`, if none is named."""


def semantic_figures(stats: Stats) -> dict[str, Any]:
    """Return the figures of a semantic cache, as `--json` prints them."""
    names = "similar_hits", "shadow_pairs", "similar_checks", "false_hits", "false_hit_interval", "guard_refusals"
    others = "look_ups", "look_ups_late", "look_ups_failed", "look_up_cost_usd", "check_cost_usd", "similar_net_usd"
    figures = {name: getattr(stats, name) for name in (*names, *others)}
    return {**figures, "similar": msgspec.to_builtins(stats.similar)}


def semantic_lines(stats: Stats) -> Iterator[str]:
    """Yield the figures of a semantic cache for people."""
    for line in _lines(stats):
        yield textwrap.fill(f"similar: {line}", COLUMNS, subsequent_indent="         ")


def _lines(stats: Stats) -> Iterator[str]:
    if stats.similar_hits:
        line = f"{plural(stats.similar_hits, 'item')} answered with the answer to a similar question"
        if stats.false_hit_interval is not None:
            wrong = f"{stats.false_hits:,} of {stats.similar_checks:,} that were asked again wrong"
            line += f"; {wrong}, which is at most {stats.false_hit_interval[1]:.1%} of all (95 %)"
        yield line
    for kind in stats.similar[:_SHOWN]:
        of = f" ({kind.kind[:6]})" if len(stats.similar) > 1 else ""
        if kind.state == "proven":
            yield f"answers{of} are handed out from a similarity of {kind.threshold:g} on, after {plural(kind.pairs, 'comparison')}"
        elif kind.state == "shadow":
            yield f"in shadow{of}, after {plural(kind.pairs, 'comparison')}: nothing is handed out yet"
        else:
            yield f"{kind.state}{of}: {kind.why or 'answers of more than 64 characters cannot be compared'}"
    if not stats.similar:
        yield "no answer was compared with that to a similar question"
    failed = stats.look_ups_failed + stats.look_ups_late
    if failed:
        yield f"{failed:,} of {plural(stats.look_ups, 'look-up')} got no vector, or one that came too late"
