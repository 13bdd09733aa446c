"""`microbatch worker SPOOL [options]`: answer what is in a spool.

Take requests from a spool, have them answered in combined prompts, and store
the answers, where `batcher.result(id)` and `microbatch spool --export` find
them. SPOOL is a file, or Redis at redis://HOST:PORT/DB. Any number of workers
may serve one spool; the requests of one that died are taken by the others.

A worker runs until it is stopped. On Ctrl-C or SIGTERM it takes no more
requests, lets the calls under way end, and reports what it did. A second signal
stops it at once; no request is lost by that. The key is taken from
OPENAI_API_KEY, for OpenAI and OPENAI_BASE_URL, or --api-key-env.

While the endpoint does not answer, requests are put back without counting as
failed, and the worker tries again at growing intervals. A key or an account
that is refused from the start ends it.

Exit status: 0, 1 if requests became dead letters, the server has lost some or
the endpoint was given up, 2 if something is wrong with the command, or requests
name no model and the command does not either, 130 stopped by a second signal.

Examples:
  microbatch worker spool.sqlite --model gpt-4.1-mini
  microbatch worker redis://localhost:6379/0 --until-empty --json
  microbatch worker spool.sqlite --provider-batch     (half price, within a day)
"""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from microbatch.accounting.prices import PriceBook
from microbatch.accounting.stats import Stats
from microbatch.cli import arguments, console
from microbatch.cli.arguments import add_flag
from microbatch.cli.console import UsageError, note, plural, report_summary, seconds
from microbatch.cli.plan import check_spool, read_plan, spool_at
from microbatch.cli.progress import Progress
from microbatch.cli.session import Session
from microbatch.cli.spool import lost_requests
from microbatch.cli.stopping import stoppable
from microbatch.cli.summary import DAMAGE, comparison, damage, fields, reuse, unpriced
from microbatch.errors import ConfigError, StorageError
from microbatch.spool.endpoint import GIVE_UP_AFTER
from microbatch.spool.payload import Payload
from microbatch.spool.provider.api import OpenAIBatchApi
from microbatch.spool.provider.worker import POLL, ProviderBatches, Tally
from microbatch.spool.records import LEASE, MAX_ALONE, Stage
from microbatch.spool.worker import NO_MODEL, Worker
from microbatch.transports.chat_wire import BatchWire

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from microbatch.accounting.prices import Price
    from microbatch.spool.records import Counts
    from microbatch.spool.worker import Done

_BATCH_PRICE: Final = "half the price of live calls"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `worker`."""
    parser.add_argument("spool", metavar="SPOOL", help="a file (SQLite), or redis://HOST:PORT/DB")
    arguments.add_endpoint(parser.add_argument_group("endpoint"))
    group = parser.add_argument_group("the work")
    add_flag(group, "--until-empty", "end when everything in the spool is answered or dead")
    lease = "time after which other workers take the requests of this one if it died"
    add_flag(group, "--lease SECONDS", lease, least=0.1, default=LEASE)
    max_alone = "a request that fails in full and half batches, and then N times alone, is dead"
    add_flag(group, "--max-alone N", max_alone, default=MAX_ALONE)
    give_up = "end after so long without a single answer, while the endpoint fails"
    default = f"(default: {GIVE_UP_AFTER:g} with --until-empty, else never; not with --provider-batch)"
    add_flag(group, "--give-up-after SECONDS", f"{give_up} {default}")
    arguments.add_cache(group)
    api = "use the provider's batch API (/v1/files, /v1/batches)"
    add_flag(group, "--provider-batch", f"{api}: {_BATCH_PRICE}, and up to a day until the answers come")
    poll = "with --provider-batch: time between two looks at the batches under way"
    add_flag(group, "--poll SECONDS", poll, least=0.01, default=POLL)
    arguments.add_id_seed(group)
    arguments.add_reports(group)
    arguments.add_policy(parser.add_argument_group("batching"))


def run(args: argparse.Namespace) -> int:
    """Answer requests until stopped, and return the exit status."""
    if args.provider_batch and (args.cache or args.rpm or args.tpm or args.single):
        raise UsageError("--cache, --rpm, --tpm and --single are for live calls: leave them out with --provider-batch")
    check_spool(args.spool)
    return asyncio.run(WorkerRun(args).go())


class WorkerRun:
    """One worker, from its flags to its summary."""

    def __init__(self, args: argparse.Namespace) -> None:
        give_up_after = args.give_up_after
        if give_up_after is None and args.until_empty:
            give_up_after = GIVE_UP_AFTER
        self._args = args
        self._plan = read_plan(args)
        self._spool = spool_at(args.spool, max_alone=args.max_alone)
        self._session = Session(self._plan, give_up_after=give_up_after)
        self._endpoint = self._session.endpoint
        self._worker: Worker | ProviderBatches | None = None

    async def go(self) -> int:
        """Work, report and return the exit status."""
        args, start = self._args, asyncio.get_running_loop().time()
        async with AsyncExitStack() as stack:
            await self._spool.open()
            stack.push_async_callback(self._spool.aclose)
            if self._plan.transport.model is None:
                await self._check_models()
            before = await self._spool.counts()
            stopped = True
            with Progress(before.depth, self._session.stats, shown=args.progress) as progress:

                def advance(done: Done | Tally) -> None:
                    progress.show(done.answered)
                    if self._endpoint.given_up:
                        self._end()

                make = self._provider_worker if args.provider_batch else self._live_worker
                worker = self._worker = await make(stack, advance)
                with stoppable(self._stop):
                    await worker.run()
                    stopped = False
            counts = await self._spool.counts()
            stats = self._session.stats()
            given_up = self._why_given_up(worker)
        self._report(worker.done, stats, counts, asyncio.get_running_loop().time() - start)
        if given_up is not None:
            note(f"microbatch worker: {given_up}; {plural(counts.depth, 'request')} left in the spool as they were")
        if stopped:
            return console.STOPPED
        return console.SOME_FAILED if counts.dead > before.dead or counts.lost or given_up is not None else console.OK

    async def _check_models(self) -> None:
        """Raise `ConfigError` if a request in the spool names no model."""
        async for kept in self._spool.export():
            if kept.payload is None or kept.found.state == "dead":
                continue
            with suppress(StorageError):  # the worker puts a damaged request back with that error
                if Payload.decode(kept.payload).model is None:
                    raise ConfigError(NO_MODEL)

    def _stop(self) -> None:
        self._session.note_stop()
        self._end()

    def _end(self) -> None:
        """Take and send no more; the calls under way end."""
        self._endpoint.stop()
        if self._worker is not None:
            self._worker.stop()

    def _why_given_up(self, worker: Worker | ProviderBatches) -> str | None:
        if isinstance(worker, Worker) and worker.refused is not None:
            return f"the endpoint refuses to answer: {worker.refused}"
        if self._endpoint.given_up:
            return f"nothing was answered for {seconds(self._endpoint.failing_for)}"
        return None

    async def _live_worker(self, stack: AsyncExitStack, advance: Callable[[Done | Tally], None]) -> Worker:
        full = self._plan.policy
        policies = {
            Stage.FULL: full,
            Stage.HALF: dataclasses.replace(full, max_batch_size=max(1, full.max_batch_size // 2)),
            Stage.ALONE: dataclasses.replace(full, max_batch_size=1, max_concurrent_batches=1),
        }
        batchers = {}
        for stage, policy in policies.items():
            batcher = await stack.enter_async_context(self._session.batcher(policy))
            batchers[stage] = batcher, policy.max_batch_size * policy.max_concurrent_batches
        worker = Worker(
            self._spool,
            batchers,
            lease=self._args.lease,
            until_empty=self._args.until_empty,
            needs_model=self._plan.transport.model is None,
            prober=await stack.enter_async_context(self._session.prober),
            progress=advance,
        )
        self._endpoint.probe = worker.probe
        return worker

    async def _provider_worker(self, stack: AsyncExitStack, advance: Callable[[Done | Tally], None]) -> ProviderBatches:
        args, transport = self._args, self._plan.transport
        await transport.open()
        stack.push_async_callback(transport.aclose)
        where = urlsplit(transport.base_url).netloc or transport.base_url
        wire = BatchWire(transport.model, where=where, structured=args.structured)
        prices = PriceBook(self._plan.prices, base_url=transport.base_url)
        if prices.load is not None:
            await asyncio.to_thread(prices.load)

        def price(model: str | None, asked: str | None) -> Price | None:
            return prices.for_model(model, asked or transport.model)

        return ProviderBatches(
            self._spool,
            OpenAIBatchApi(transport.forward, wire.refusal),
            wire,
            policy=self._plan.policy,
            price=price,
            canary=args.canary,
            id_secret=self._plan.id_seed,
            lease=args.lease,
            poll_interval=args.poll,
            until_empty=args.until_empty,
            progress=advance,
        )

    def _report(self, done: Done | Tally, stats: Stats, counts: Counts, wall_s: float) -> None:
        answered = f"{plural(done.answered, 'request')} answered, {done.failed:,} failed"
        dead = plural(counts.dead, "dead letter")
        lines = [
            f"{answered}, {done.returned:,} put back as they were, in {seconds(wall_s)}",
            f"in the spool: {counts.depth:,} to be answered, {counts.done:,} answers, {dead}",
        ]
        if isinstance(done, Tally):
            stats = Stats(
                upstream_calls=done.lines,
                prompt_tokens=done.usage.prompt_tokens,
                completion_tokens=done.usage.completion_tokens,
                cost_usd=done.cost_usd,
                unpriced_calls=done.unpriced,
            )
            jobs, prompts = plural(done.jobs, "batch job"), plural(done.lines, "prompt")
            lines.append(f"{jobs} with {prompts}: {console.dollars(done.cost_usd)}, the price of batches")
        elif stats.answered:
            lines += [f"\n{comparison(stats)}\n", *reuse(stats), *damage(stats)]
        lines += unpriced(stats)
        if self._plan.simulated is not None:
            lines.append("The endpoint was simulated: the answers are made up, and nothing was paid.")
        figures = {
            "answered": done.answered,
            "failed": done.failed,  # this and `returned` count each time a request was put back
            "returned": done.returned,
            "depth": counts.depth,
            "dead": counts.dead,
            "jobs": done.jobs if isinstance(done, Tally) else 0,
            **fields(stats, "upstream_calls", "prompt_tokens", "completion_tokens", "cost_usd"),
            "wall_s": round(wall_s, 3),
            "lost": counts.lost,
            "alone_by_field": stats.alone_by_field,
            **fields(stats, *DAMAGE, "singles_compared", "unpriced_calls"),
        }
        report_summary(self._args, lines, figures)
        if counts.dead:
            note(f"Dead letters: microbatch spool {self._args.spool} --dead")
        if counts.lost:
            note(lost_requests(counts.lost))
