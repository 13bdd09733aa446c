"""`microbatch worker`: answers what is in a spool, in combined prompts."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from microbatch.accounting.prices import PriceBook
from microbatch.accounting.stats import Stats, together
from microbatch.cli import console
from microbatch.cli.arguments import add_endpoint, add_policy, add_telling
from microbatch.cli.console import UsageError, note, plural, seconds, tell
from microbatch.cli.flags import number, whole_number
from microbatch.cli.plan import prober, read_policy, read_transport
from microbatch.cli.progress import Progress, make_bar
from microbatch.cli.resting import RestingTransport
from microbatch.cli.simulated import SIMULATED_MODEL, SimulatedChat
from microbatch.cli.stopping import stoppable_in_order
from microbatch.cli.stores import CACHE_HELP, bulk_cache_at, spool_at
from microbatch.cli.summary import comparison, reuse
from microbatch.client import Microbatcher
from microbatch.errors import ConfigError, StorageError
from microbatch.messages import Usage
from microbatch.policy import FallbackPolicy
from microbatch.spool.endpoint import GIVE_UP_AFTER, Endpoint
from microbatch.spool.payload import Payload
from microbatch.spool.provider.api import OpenAIBatchApi
from microbatch.spool.provider.worker import POLL, ProviderBatches, Tally
from microbatch.spool.records import LEASE, MAX_ALONE, Counts, Stage
from microbatch.spool.worker import NO_MODEL, Done, Worker
from microbatch.transports.batch_wire import BatchWire
from microbatch.transports.rate_limit import RateLimit

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

USAGE = "microbatch worker SPOOL [options]"
HELP = "answer what is in a spool"
DESCRIPTION = """\
Take requests from a spool, have them answered in combined prompts, and store
the answers, where `batcher.result(id)` and `microbatch spool --export` find
them. SPOOL is a file, or Redis at redis://HOST:PORT/DB. Any number of workers
may serve one spool; what one of them held when it died is taken by the others.

A worker runs until it is stopped: on Ctrl-C or SIGTERM it takes no more, ends
what is under way, and tells what it did. A second signal stops it at once,
and nothing is lost by that. The key is taken from OPENAI_API_KEY.

While the endpoint does not answer, no request is to blame: they are put back
as they were, and the worker tries again now and then. A key or an account that
is refused from the start ends it.

Exit status: 0, 1 if requests became dead letters, the server has lost some or
the endpoint was given up, 2 if something is wrong with the command, or requests
name no model and the command does not either, 130 stopped by a second signal.
"""
EXAMPLES = """
examples:
  microbatch worker spool.sqlite --model gpt-4.1-mini
  microbatch worker redis://localhost:6379/0 --until-empty --json
  microbatch worker spool.sqlite --provider-batch      (half price, within a day)
"""

_BATCH_FACTOR: Final = "half the price of live calls"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `worker`."""
    parser.add_argument("spool", metavar="SPOOL", help="a file (SQLite), or redis://HOST:PORT/DB")
    add_endpoint(parser.add_argument_group("whom"))
    group = parser.add_argument_group("the work")
    group.add_argument(
        "--until-empty", action="store_true", help="end when everything in the spool is answered or dead"
    )
    group.add_argument(
        "--lease",
        metavar="SECONDS",
        type=number(0.1),
        default=LEASE,
        help=f"time after which others take what this worker held when it died (default: {LEASE:g})",
    )
    group.add_argument(
        "--max-alone",
        metavar="N",
        type=whole_number(1),
        default=MAX_ALONE,
        help=f"a request that fails in full and half batches, and then N times alone, is dead (default: {MAX_ALONE})",
    )
    group.add_argument(
        "--give-up-after",
        metavar="SECONDS",
        type=number(0),
        help="end after so long without a single answer, while the endpoint fails "
        f"(default: {GIVE_UP_AFTER:g} with --until-empty, else never; not with --provider-batch)",
    )
    group.add_argument("--cache", metavar="FILE|URL", help=CACHE_HELP)
    group.add_argument(
        "--provider-batch",
        action="store_true",
        help=f"use the provider's batch API (/v1/files, /v1/batches): {_BATCH_FACTOR}, and up to a day until the answers come",
    )
    group.add_argument(
        "--poll",
        metavar="SECONDS",
        type=number(0.01),
        default=POLL,
        help=f"with --provider-batch: time between two looks at what is under way (default: {POLL:g})",
    )
    add_telling(group)
    add_policy(parser.add_argument_group("batching"))


def run(args: argparse.Namespace) -> int:
    """Run it.

    Raises:
        UsageError: Something is wrong with the command.
    """
    if args.provider_batch and (args.cache or args.rpm or args.tpm or args.single):
        raise UsageError("--cache, --rpm, --tpm and --single are for live calls: leave them out with --provider-batch")
    return asyncio.run(Work(args).go())


class Report(msgspec.Struct, kw_only=True):
    """What a worker did, as `--json` prints it; figures of the same name are `Stats`'s.

    Attributes:
        answered: Requests whose answers it stored.
        failed: Requests it put back because they failed, each as often as it did.
        returned: Requests it put back for reasons that were not theirs.
        depth: Requests in the spool, in the end, that are neither answered nor dead.
        dead: Dead letters in it.
        jobs: Batch jobs begun at the provider.
        wall_s: Seconds it worked.
        lost: Requests in the spool whose content, place or answer the server has dropped.
    """

    answered: int
    failed: int
    returned: int
    depth: int
    dead: int
    jobs: int
    upstream_calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    wall_s: float
    lost: int


class Work:
    """One worker, from its flags to its report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._policy = read_policy(args)
        self._transport = (
            SimulatedChat(args.model or SIMULATED_MODEL) if args.simulate else read_transport(args, args.model)
        )
        self._spool = spool_at(args.spool, max_alone=args.max_alone)
        patience = args.give_up_after
        if patience is None and args.until_empty:
            patience = GIVE_UP_AFTER
        self._endpoint = Endpoint("the endpoint is left alone", give_up_after=patience)
        self._prober = prober(self._transport)
        self._worker: Worker | ProviderBatches | None = None
        self._batchers: list[Microbatcher] = []

    async def go(self) -> int:
        """Work, tell what was done and return the exit status."""
        start = asyncio.get_running_loop().time()
        async with AsyncExitStack() as stack:
            await self._spool.open()
            stack.push_async_callback(self._spool.aclose)
            if self._transport.model is None:
                await self._check_models()
            before = await self._spool.counts()
            stopped = True
            with Progress(self._bar(before), self._stats) as progress:
                worker = self._worker = await self._make_worker(stack, progress)
                with stoppable_in_order(self._stop):
                    await worker.run()
                    stopped = False
            counts = await self._spool.counts()
            stats = self._stats()
            given_up = self._why_given_up(worker)
        self._tell(worker.done, stats, counts, asyncio.get_running_loop().time() - start)
        if given_up is not None:
            note(f"microbatch worker: {given_up}; {plural(counts.depth, 'request')} left in the spool as they were")
        if stopped:
            return console.STOPPED
        return console.SOME_FAILED if counts.dead > before.dead or counts.lost or given_up is not None else console.OK

    async def _check_models(self) -> None:
        """Check that all requests in the spool name a model, as the command does not.

        Raises:
            ConfigError: One does not; nothing was taken.
        """
        async for kept in self._spool.export():
            if kept.payload is not None and kept.found.state != "dead" and _names_no_model(kept.payload):
                raise ConfigError(NO_MODEL)

    def _stop(self) -> None:
        """Take no more, and send no more; what is under way ends."""
        calls = plural(self._endpoint.on_wire, "call")
        note(
            f"Stopping: {calls} under way may end, and the answers are kept. Press Ctrl-C again to stop now, without them."
        )
        self._end()

    def _end(self) -> None:
        self._endpoint.stop()
        if self._worker is not None:
            self._worker.stop()

    def _why_given_up(self, worker: Worker | ProviderBatches) -> str | None:
        if isinstance(worker, Worker) and worker.refused is not None:
            return f"the endpoint refuses to answer: {worker.refused}"
        if self._endpoint.given_up:
            return f"nothing was answered for {seconds(self._endpoint.failing_for)}"
        return None

    async def _make_worker(self, stack: AsyncExitStack, progress: Progress) -> Worker | ProviderBatches:
        shown = 0

        def advance(done: Done | Tally) -> None:
            nonlocal shown
            progress.advance(done.answered - shown)
            shown = done.answered
            if self._endpoint.given_up:
                self._end()

        if self._args.provider_batch:
            return await self._provider_batches(stack, advance)
        args = self._args
        batchers = await self._open_batchers(stack)
        await stack.enter_async_context(self._prober)
        worker = Worker(
            self._spool,
            batchers,
            lease=args.lease,
            until_empty=args.until_empty,
            needs_model=self._transport.model is None,
            prober=self._prober,
            progress=advance,
        )
        self._endpoint.probe = worker.probe
        return worker

    async def _open_batchers(self, stack: AsyncExitStack) -> dict[Stage, tuple[Microbatcher, int]]:
        """Open a batcher for each stage; they share transport, limits and cache."""
        args, policy = self._args, self._policy
        rate_limit = RateLimit(rpm=args.rpm, tpm=args.tpm) if args.rpm or args.tpm else None
        cache = None if args.cache is None else bulk_cache_at(args.cache)
        policies = {
            Stage.FULL: policy,
            Stage.HALF: dataclasses.replace(policy, max_batch_size=max(1, policy.max_batch_size // 2)),
            Stage.ALONE: dataclasses.replace(policy, max_batch_size=1, max_concurrent_batches=1),
        }
        transport = RestingTransport(self._transport, self._endpoint)
        opened: dict[Stage, tuple[Microbatcher, int]] = {}
        for stage, own in policies.items():
            batcher = Microbatcher(
                transport,
                policy=own,
                fallback=FallbackPolicy(canary=args.canary),
                rate_limit=rate_limit,
                cache=cache,
            )
            opened[stage] = await stack.enter_async_context(batcher), own.max_batch_size * own.max_concurrent_batches
            self._batchers.append(batcher)
        return opened

    async def _provider_batches(self, stack: AsyncExitStack, advance: Callable[[Tally], None]) -> ProviderBatches:
        args, transport = self._args, self._transport
        await transport.open()
        stack.push_async_callback(transport.aclose)
        wire = BatchWire(transport.model, where=urlsplit(transport.base_url).netloc or transport.base_url)
        prices = PriceBook()

        def price(model: str | None) -> Callable[[Usage], float] | None:
            found = prices.for_model(model or transport.model)
            return None if found is None else found.cost

        return ProviderBatches(
            self._spool,
            OpenAIBatchApi(transport.forward, wire.refusal),
            wire,
            policy=self._policy,
            price=price,
            canary=args.canary,
            lease=args.lease,
            poll_interval=args.poll,
            until_empty=args.until_empty,
            progress=advance,
        )

    def _bar(self, before: Counts) -> Any:
        wanted = self._args.progress
        return make_bar(before.depth) if wanted or (wanted is None and sys.stderr.isatty()) else None

    def _stats(self) -> Stats:
        if not self._batchers:
            return Stats()
        # Calls that waited in vain for their turn were no calls.
        stats = [*(batcher.stats() for batcher in self._batchers), self._prober.stats()]
        calls = self._endpoint.sent + stats[-1].upstream_calls
        # The batchers share one cache, and each reports all of its counts.
        return msgspec.structs.replace(
            together(stats),
            upstream_calls=calls,
            cache_bypassed=stats[0].cache_bypassed,
            cache_evictions=stats[0].cache_evictions,
        )

    # --- afterwards

    def _tell(self, done: Done | Tally, stats: Stats, counts: Counts, wall_s: float) -> None:
        usage, cost_usd, jobs, calls = _paid(done, stats)
        write = note if self._args.json else tell
        write(
            f"{plural(done.answered, 'request')} answered, {done.failed:,} failed, {done.returned:,} put back as they were, "
            f"in {seconds(wall_s)}"
        )
        write(
            f"in the spool: {counts.depth:,} to be answered, {counts.done:,} answers, {plural(counts.dead, 'dead letter')}"
        )
        if isinstance(done, Tally):
            write(
                f"{plural(jobs, 'batch job')} with {plural(calls, 'prompt')}: {console.dollars(cost_usd)}, {_BATCH_FACTOR}"
            )
        elif stats.answered:
            write(f"\n{comparison(stats)}\n")
            if stats.cache_hits or stats.cache_misses or stats.shared:
                for line in reuse(stats):
                    write(line)
        if isinstance(self._transport, SimulatedChat):
            write("The endpoint was simulated: the answers are made up, and nothing was paid.")
        if counts.dead:
            note(f"Dead letters: microbatch spool {self._args.spool} --dead")
        if counts.lost:
            note(console.lost(counts.lost))
        if self._args.json:
            report = Report(
                answered=done.answered,
                failed=done.failed,
                returned=done.returned,
                depth=counts.depth,
                dead=counts.dead,
                jobs=jobs,
                upstream_calls=calls,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cost_usd=None if cost_usd is None else round(cost_usd, 9),
                wall_s=round(wall_s, 3),
                lost=counts.lost,
            )
            tell(msgspec.json.encode(report).decode())


def _names_no_model(raw: bytes) -> bool:
    try:
        return Payload.decode(raw).model is None
    except StorageError:
        return False  # the worker puts it back with that error


def _paid(done: Done | Tally, stats: Stats) -> tuple[Usage, float | None, int, int]:
    """Return the tokens used, their price, the batch jobs begun, and the calls or prompts made."""
    if isinstance(done, Tally):
        return done.usage, done.cost_usd, done.jobs, done.lines
    return (
        Usage(stats.prompt_tokens, stats.completion_tokens, stats.cached_tokens),
        stats.cost_usd,
        0,
        stats.upstream_calls,
    )
