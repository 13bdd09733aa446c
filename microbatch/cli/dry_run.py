"""`run --dry-run`: what a run would ask and cost, found by a run that sends nothing.

The run is played within the process and on virtual time, with the batcher, the limits and the prompts of a real one; a simulated model
makes up the answers. Neither the output nor a cache is opened.
"""

from __future__ import annotations

import asyncio
import textwrap
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.batching.request import arguments_of, read_messages, read_options
from microbatch.caching.guard import Guard
from microbatch.caching.memory import MemoryCache
from microbatch.cli import console
from microbatch.cli.arguments import Group, add_flag
from microbatch.cli.bulk_run import BulkRun
from microbatch.cli.console import COLUMNS, plural, seconds
from microbatch.cli.plan import CACHE_PATIENCE, prepare
from microbatch.cli.summary import alone, comparison, fields, skipped, unpriced
from microbatch.prompt.parameters import HARMLESS
from microbatch.testing.answers import simulated_answer
from microbatch.testing.clock import VirtualClockLoop
from microbatch.testing.model import SimulatedModel
from microbatch.testing.transport import SimulatedTransport
from microbatch.transports.chat_wire import BatchWire
from microbatch.transports.rate_limit import RateLimit

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from microbatch.cli.plan import Plan
    from microbatch.cli.simulated import SimulatedChat
    from microbatch.messages import Reply, Request
    from microbatch.protocols import ChatCall
    from microbatch.testing.reading import Prompt
    from microbatch.transports.capabilities import Structured
    from microbatch.transports.openai_chat import OpenAIChat

_SHORT_WAIT = 1.0
"""Seconds of pacing that are not worth a line."""


def add_dry_run(group: Group) -> None:
    """Add `--dry-run` and `--expect-tokens`."""
    dry = "send nothing, and print what the run would ask and cost; no key is needed, and no file is written"
    add_flag(group, "--dry-run", dry)
    expect = "with --dry-run: the length of an answer that is free text (default: 10 to 60 words)"
    add_flag(group, "--expect-tokens N", expect)


class UnsentChat(SimulatedTransport):
    """A transport that makes up the replies to what *transport* would send; see `_Expecting` for *expect_tokens*."""

    def __init__(
        self, transport: OpenAIChat | SimulatedChat, expect_tokens: int | None, form: Structured | None
    ) -> None:
        model = SimulatedModel(brief=True, strict_schemas=False)
        super().__init__(model if expect_tokens is None else _Expecting(expect_tokens))
        self.model = transport.model
        self.base_url: str = transport.base_url
        self._wire = BatchWire(self.model, where=self.base_url, structured=form)

    def body_of(self, call: ChatCall) -> dict[str, Any]:
        """Return the request that *transport* would send."""
        return self._wire.body(call)


class _Expecting(SimulatedModel):
    """A model whose answers in free text have *tokens*, unless requests allow fewer."""

    def __init__(self, tokens: int) -> None:
        super().__init__(brief=True, strict_schemas=False)
        self._tokens = tokens

    def answer_to(self, prompt: Prompt) -> Callable[[str, dict[str, Any] | None], Any]:
        """Return what answers an item of *prompt*."""
        tokens = self._tokens if prompt.most_each is None else min(self._tokens, prompt.most_each)
        return partial(_of_length, tokens)


def _of_length(tokens: int, text: str, schema: dict[str, Any] | None) -> Any:
    """Return an answer to *text* of as many *tokens*, with a *schema* at most so many."""
    return " ".join(["word"] * tokens) if schema is None else simulated_answer(text, schema, max_tokens=tokens)


class _Counted:
    """The items that a dry run has answered, by their lanes."""

    def __init__(self, plan: Plan) -> None:
        self._read_options = partial(read_options, harmless=HARMLESS.union(plan.policy.combine_params))
        self._lanes: set[bytes] = set()

    @property
    def lanes(self) -> int:
        """Kinds of questions of which several may share a prompt."""
        return len(self._lanes)

    def take(self, request: Request, _: Reply[Any]) -> None:
        """Count *request*."""
        options = self._read_options(*arguments_of(request))
        read = () if options.alone else read_messages(request.messages, options)
        if isinstance(read, tuple) and read:
            key = repr(read[0][1:]).encode("utf-8", "surrogatepass")  # without the priority
            self._lanes.add(blake2b(key, digest_size=16).digest())


def dry_run(args: argparse.Namespace) -> int:
    """Play the run of *args*, print its figures, and return the exit status."""
    plan, source = prepare(args)
    played = msgspec.structs.replace(
        plan,
        transport=UnsentChat(plan.transport, args.expect_tokens, args.structured),
        cache=None if plan.cache is None else Guard(MemoryCache(), patience=CACHE_PATIENCE),
        audit=None,
        budget=None,
        # Nothing is sent, so no permit is drawn from a store.
        rate_limit=None if plan.rate_limit is None else RateLimit(rpm=plan.rate_limit.rpm, tpm=plan.rate_limit.tpm),
    )
    counted = _Counted(plan)
    bulk = BulkRun(args, played, source, counted.take)
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(bulk.go())
    is_text = source.questions.labels is None
    lines = [*_lines(args, bulk, counted), *_remarks(args, bulk, is_text=is_text), *unpriced(bulk.stats)]
    bulk.report(args, lines, _figures(bulk, counted))
    return console.STOPPED if bulk.stopped else console.SOME_FAILED if bulk.broken is not None else console.OK


def _figures(bulk: BulkRun, counted: _Counted) -> dict[str, Any]:
    """Return the figures under the names that a run has for them."""
    stats = bulk.stats
    return {
        "items": bulk.items,
        "answered": bulk.answered,
        "failed": bulk.failed,
        "lanes": counted.lanes,
        **fields(stats, "upstream_calls", "batches", "fallback_calls", "prompt_tokens", "completion_tokens"),
        **fields(stats, "unbatched_calls", "unbatched_prompt_tokens", "unbatched_completion_tokens"),
        **fields(stats, "cost_usd", "unbatched_cost_usd"),
        "wait_s": round(bulk.wall_s, 3),
        **fields(stats, "shared", "alone_by_field", "singles_by_reason", "unpriced_calls"),
        "skipped": bulk.skipped,
        "dry_run": True,
    }


def _lines(args: argparse.Namespace, bulk: BulkRun, counted: _Counted) -> Iterator[str]:
    stats = bulk.stats
    failed = f", {bulk.failed:,} cannot be asked" if bulk.failed else ""
    yield f"dry run: {plural(bulk.items, 'item')} in {plural(counted.lanes, 'lane')}{failed}; nothing was sent"
    yield from skipped(bulk.skipped)
    if stats.answered:
        yield f"\n{comparison(stats, 'combined', 'one by one')}\n"
    if not args.single:
        yield from alone(stats)


def _remarks(args: argparse.Namespace, bulk: BulkRun, *, is_text: bool) -> Iterator[str]:
    """Yield wrapped remarks on the figures; answers may be free text if *is_text*."""
    yield from (
        textwrap.fill(remark, COLUMNS, break_on_hyphens=False) for remark in _unwrapped(args, bulk, is_text=is_text)
    )


def _unwrapped(args: argparse.Namespace, bulk: BulkRun, *, is_text: bool) -> Iterator[str]:
    stats = bulk.stats
    if stats.answered:
        each = round(stats.unbatched_completion_tokens / stats.unbatched_calls)
        counted = (
            f"Prompts are counted as they would be sent. Answers are made up, of {plural(each, 'token')} on average"
        )
        hint = "" if args.expect_tokens or not is_text else "; if theirs is another length, say so with --expect-tokens"
        yield f"{counted}{hint}."
    if (args.rpm or args.tpm) and bulk.wall_s >= _SHORT_WAIT:
        yield f"At this rate limit the run takes at least {seconds(bulk.wall_s)}."
    if stats.cost_usd is not None and stats.costs_more and not args.single:
        yield "Combining costs more than it saves here: see --single."
    if args.max_cost is not None and stats.cost_usd is not None and stats.cost_usd > args.max_cost:
        yield f"--max-cost {args.max_cost:g} ends the run before all is asked."
    not_counted = {
        "cache": f"what {args.cache} has already, which costs nothing",
        "resume": f"the answers in {args.output or 'the output'}, which are not asked for again",
        "audit": "the calls of the audit",
    }
    left = [words for name, words in not_counted.items() if getattr(args, name) not in (None, False)]
    if left:
        yield f"Left out of account: {'; '.join(left)}."
