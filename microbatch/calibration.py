"""Calibration before a job: ask a sample alone and in batches of several sizes, and recommend a size.

`microbatch.audit.calibration` has the statistics. Here the sample is drawn, and asked by one batcher for each size.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Hashable, Iterable, Sequence
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.audit.calibration import CalibratedSize, Calibration, Trial, recommended
from microbatch.audit.comparison import agree, can_compare
from microbatch.audit.means import least_count
from microbatch.batching.request import arguments_of, check_messages, read_messages, read_options
from microbatch.checking import Count, Share, checks_arguments
from microbatch.client import Microbatcher
from microbatch.errors import BudgetExceeded, ConfigError
from microbatch.messages import Request
from microbatch.policy import AuditPolicy, FlushPolicy
from microbatch.prompt.parameters import HARMLESS
from microbatch.spool.endpoint import Cause, cause_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from microbatch.accounting.prices import Price
    from microbatch.accounting.stats import Stats
    from microbatch.audit.comparison import Same
    from microbatch.messages import Messages, Requests, Result
    from microbatch.policy import FallbackPolicy, RetryPolicy
    from microbatch.protocols import Transport
    from microbatch.schema.answer_type import AnswerType
    from microbatch.transports.rate_limit import RateLimit

    Outage = Callable[[Exception], Awaitable[bool]]

SAMPLE: Final = 400
SIZES: Final = (2, 4, 8, 16, 32)
"""The size of the sample, and the sizes of batches, by default."""

_SLICE: Final = 256
"""Requests read from a source before the event loop gets its turn, so that a signal is noticed."""

_TRIES: Final = 3
"""Times that a batch is asked, if it fails for reasons that may not be its own and others are answered."""


async def calibrate(
    transport: Transport,
    requests: Requests,
    *,
    sample: int = SAMPLE,
    sizes: Sequence[int] = SIZES,
    max_excess: float = 0.02,
    seed: int = 0,
    same: Callable[[Any, Any], bool] | None = None,
    policy: FlushPolicy | None = None,
    retry: RetryPolicy | None = None,
    fallback: FallbackPolicy | None = None,
    rate_limit: RateLimit | None = None,
    prices: Mapping[str, Price] | Callable[[str], Price | None] | None = None,
) -> Calibration:
    """Ask a sample of *requests* alone, twice, and in batches of each size, upward, and return what that does to the answers.

    The first size that is found to do harm is the last one asked, and so is one that cannot be reached. Up to 320 batches of each size
    are asked, so that even a short sample takes thousands of calls; nothing comes from a cache. Nothing is sent if the sample has too
    few items for *max_excess* even without any difference (173 for 0.02); `Calibration.needed` then says how many are enough.

    Args:
        transport: The way to the model.
        requests: As for `Microbatcher.map`. Equal ones count once; timeouts and priorities are left out of account.
        sample: Requests that are drawn from them; all, if there are fewer.
        sizes: Sizes of batches to try.
        max_excess: The largest excess that is accepted, above 0 and below 1; see `AuditPolicy`.
        seed: Makes the same sample and the same batches again.
        same: Compares two outputs, that from the batch first; see `AuditPolicy`.
        policy: As for `Microbatcher`; the size, `merge` and `idle` are set here.
        retry: As for `Microbatcher`, like all that follow.
        fallback: As for `Microbatcher`. Missing and broken answers count with the answer that they get in the end.
        rate_limit: May be shared with batchers.
        prices: USD per million tokens by model.

    Raises:
        ConfigError: An argument is wrong, or no request can be combined; nothing was sent.
        RequestFailed: The endpoint does not answer; what was asked is lost.
    """

    def make(policy: FlushPolicy) -> Microbatcher:
        return Microbatcher(
            transport, policy=policy, retry=retry, fallback=fallback, rate_limit=rate_limit, prices=prices
        )

    calibrator = Calibrator(
        make, policy or FlushPolicy(), sample=sample, sizes=sizes, max_excess=max_excess, seed=seed, same=same
    )
    await calibrator.run(requests)
    return calibrator.result


async def _no_outage(_: Exception) -> bool:
    return False


class Calibrator:
    """A calibration under way.

    Args:
        make: Makes a batcher, not open, with a policy.
        policy: The policy of all batchers but for the size.
        sample: See `calibrate`, as for what follows.
        sizes: Sizes of batches.
        max_excess: The largest excess that is accepted.
        seed: Seed of the sample and of the batches.
        same: Compares two outputs.
        outage: Called with the error of a batch that failed for reasons that may not be its own, before it is asked again. Waits while
            the endpoint does not answer, and returns whether it has waited; raises an error if the endpoint is given up.
        ended: Called with the figures of asking alone, and with those of each size when it has been tried.

    Attributes:
        result: The figures so far.

    Raises:
        ConfigError: An argument is wrong.
    """

    @checks_arguments
    def __init__(
        self,
        make: Callable[[FlushPolicy], Microbatcher],
        policy: FlushPolicy,
        *,
        sample: Count = SAMPLE,
        sizes: Sequence[int] = SIZES,
        max_excess: Share = 0.02,
        seed: int = 0,
        same: Callable[[Any, Any], bool] | None = None,
        outage: Outage = _no_outage,
        ended: Callable[[CalibratedSize], object] = lambda _: None,
    ) -> None:
        AuditPolicy(max_excess=max_excess, same=same)  # checks them
        self._sizes = sorted(set(sizes) - {1})
        if not self._sizes or self._sizes[0] < 1:
            raise ConfigError(f"sizes must be whole numbers from 2 on, got {list(sizes)}")
        self.result: Calibration = Calibration(max_excess=max_excess, seed=seed)
        self._make = make
        self._policy = policy
        self._sample = sample
        self._max_excess = max_excess
        self._seed = seed
        self._same = same
        self._outage = outage
        self._ended = ended
        self._least = least_count(max_excess)
        self._items: list[_Item] = []

    async def run(self, requests: Requests) -> None:
        """Draw the sample from *requests*, and ask until `result` is complete; see `calibrate`."""
        harmless = HARMLESS.union(self._policy.combine_params)
        drawn = await _drawn(requests, self._sample, random.Random(self._seed), harmless)  # noqa: S311 repeatable, no secret
        self._note(sample=len(drawn.items), unusable=drawn.unusable)
        if not drawn.items:
            raise ConfigError(drawn.why)
        if len(drawn.items) < self._least:
            self._note(needed=self._least)
            return
        alone = self._make(self._policy_of(1))
        async with alone:  # to the end, so that the transport stays open
            await self._ask_alone(alone, drawn.items)
            if self._items:
                await self._try_sizes()

    def _note(self, **figures: Any) -> None:
        self.result = msgspec.structs.replace(self.result, **figures)

    def _policy_of(self, size: int) -> FlushPolicy:
        return dataclasses.replace(self._policy, max_batch_size=size, merge="always", idle="wait")

    # --- alone

    async def _ask_alone(self, batcher: Microbatcher, items: Sequence[_Item]) -> None:
        """Ask for each of *items* twice, and keep those whose answers can be compared."""
        begun = asyncio.get_running_loop().time()
        kept = await self._keep(batcher, items, _Item.take_first)
        questions = len(items)
        if self._enough(kept):  # or the second answers would be paid for in vain
            questions += len(kept)
            kept = await self._keep(batcher, kept, _Item.take_second)
        seconds = asyncio.get_running_loop().time() - begun
        if not self._enough(kept):
            tell = not self._mostly_incomparable and kept
            self._note(needed=self._to_draw(self._least, len(kept)) if tell else None)
            kept = []
        self._items = kept
        noise = sum(not item.alone for item in kept) / (len(kept) or 1)
        result = self.result
        row = _row(
            1,
            batcher.stats(),
            seconds,
            batches=questions,
            compared=len(kept),
            not_comparable=result.not_comparable,
            failed=result.failed,
            agreement=1 - noise if kept else 0.0,
            upper=0.0,
        )
        self._note(compared=len(kept), noise=noise, alone=row)
        self._ended(row)

    @property
    def _mostly_incomparable(self) -> bool:
        return self.result.not_comparable * 2 > self.result.sample

    def _enough(self, items: Sequence[_Item]) -> bool:
        """Return whether *items* are enough to say something, and about most of the sample."""
        return len(items) >= self._least and not self._mostly_incomparable

    def _to_draw(self, needed: int, compared: int) -> int:
        """Return the items to draw so that *needed* are compared, if as large a share as now is: *compared* of the sample."""
        return math.ceil(needed * self.result.sample / compared)

    async def _keep(
        self, batcher: Microbatcher, items: Sequence[_Item], take: Callable[[_Item, str, Same | None], bool]
    ) -> list[_Item]:
        """Ask for each of *items*, and return those whose answer *take* has taken."""
        kept, failed = [], 0
        for item, (answered,) in zip(items, await self._ask(batcher, [[item] for item in items]), strict=True):
            if answered.reply is None:
                failed += 1
            elif take(item, answered.reply.text, self._same):
                kept.append(item)
        lost = len(items) - len(kept) - failed
        self._note(failed=self.result.failed + failed, not_comparable=self.result.not_comparable + lost)
        return kept

    # --- in batches

    async def _try_sizes(self) -> None:
        lanes: dict[Hashable, list[int]] = {}
        for number, item in enumerate(self._items):
            lanes.setdefault(item.lane, []).append(number)
        needed: dict[int, int | None] = {}
        for size in self._sizes:
            trial = Trial(size, [*lanes.values()], self._max_excess, self._seed)
            row = await self._try(trial)
            rows = (*self.result.sizes, row)
            if row.outcome == "undecided":
                needed[size] = None if trial.needed is None else self._to_draw(trial.needed, len(self._items))
            best = recommended(rows)
            open_ = (count for tried, count in needed.items() if best is None or tried > best)
            self._note(sizes=rows, recommended=best, needed=next(open_, None))
            self._ended(row)
            harmful = row.outcome == "fails" or (row.outcome == "undecided" and row.excess > self._max_excess)
            if harmful or row.outcome == "not reached":
                return

    async def _try(self, trial: Trial) -> CalibratedSize:
        """Ask batches until the trial is decided, and return its figures."""
        batcher = self._make(self._policy_of(trial.size))
        begun = asyncio.get_running_loop().time()
        async with batcher:
            while (outcome := trial.outcome) is None:
                numbers = trial.next_round()
                batches = [[self._items[number] for number in batch] for batch in numbers]
                for batch, results in zip(numbers, await self._ask(batcher, batches), strict=True):
                    self._score(trial, batch, results)
            seconds = asyncio.get_running_loop().time() - begun
        return _row(
            trial.size,
            batcher.stats(),
            seconds,
            outcome=outcome,
            batches=trial.batches,
            compared=trial.compared,
            not_comparable=trial.not_comparable,
            failed=trial.failed,
            repaired=trial.repaired,
            agreement=trial.agreement,
            excess=trial.excess,
            upper=trial.upper_bound,
        )

    def _score(self, trial: Trial, batch: Sequence[int], results: Sequence[Result[Any]]) -> None:
        """Enter the answers of one batch."""
        scores = []
        for number, result in zip(batch, results, strict=True):
            item, reply = self._items[number], result.reply
            if reply is None:
                trial.failed += 1
                continue
            trial.answered += 1
            trial.reached += reply.route == "batch" and reply.batch_size == trial.size
            trial.repaired += reply.route == "fallback"
            first = agree(item.answer, reply.text, item.first, self._same)
            second = agree(item.answer, reply.text, item.second, self._same)
            if first is None or second is None:
                trial.not_comparable += 1
            else:
                scores.append(trial.add(number, first=first, second=second, alone=item.alone))
        trial.end_batch(scores)

    # --- asking

    async def _ask(self, batcher: Microbatcher, batches: Sequence[Sequence[_Item]]) -> list[list[Result[Any]]]:
        """Return the outcomes of *batches*; one that failed for reasons that may not be its own is asked again as a whole.

        Raises:
            MicrobatchError: Nothing was answered, or the endpoint was given up.
        """
        results: list[list[Result[Any]]] = [[] for _ in batches]
        tries = Counter[int]()
        pending = [*range(len(batches))]
        while pending:
            outcomes = batcher.map((item.request for number in pending for item in batches[number]), ordered=True)
            failing: list[int] = []
            waited = False
            for number in pending:
                results[number] = [await anext(outcomes) for _ in batches[number]]
                error = _outer_error(results[number])
                if isinstance(error, BudgetExceeded):
                    raise error
                if error is not None:
                    failing.append(number)
                    down = await self._outage(error)
                    waited |= down
                    tries[number] += not down
            await anext(outcomes, None)  # its end
            errors = [result.error for part in results for result in part]
            if not waited and None not in errors and errors[0] is not None:
                raise errors[0]
            pending = [number for number in failing if tries[number] < _TRIES]
        return results


def _outer_error(results: Sequence[Result[Any]]) -> Exception | None:
    """Return the first error of a batch whose cause may be the endpoint; None without one."""
    errors = (result.error for result in results)
    return next((error for error in errors if error is not None and cause_of(error) is not Cause.REQUEST), None)


def _row(size: int, stats: Stats, seconds: float, **figures: Any) -> CalibratedSize:
    return CalibratedSize(
        size=size,
        calls=stats.upstream_calls,
        fallback_calls=stats.fallback_calls,
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.completion_tokens,
        cost_usd=stats.cost_usd,
        seconds=seconds,
        **figures,
    )


# --- the sample


class _Item(msgspec.Struct, eq=False):
    """A request of the sample, and its two answers alone.

    Attributes:
        lane: Equal for those that may share a prompt.
        alone: True if the two answers agree.
    """

    request: Request[Any]
    answer: AnswerType
    lane: Hashable
    first: str = ""
    second: str = ""
    alone: bool = True

    def take_first(self, text: str, same: Same | None) -> bool:
        """Keep the first answer; return whether it can be compared."""
        self.first = text
        return can_compare(self.answer, text, same)

    def take_second(self, text: str, same: Same | None) -> bool:
        """Keep the second answer; return whether it can be compared with the first."""
        self.second = text
        alone = agree(self.answer, self.first, text, same)
        self.alone = alone is True
        return alone is not None


class _Drawn(msgspec.Struct):
    """A sample.

    Attributes:
        unusable: Requests that cannot be combined, or are wrong.
        why: Why there are no items.
    """

    items: list[_Item]
    unusable: int = 0
    why: str = "there are no requests"


async def _drawn(requests: Requests, most: int, draw: random.Random, harmless: Collection[str]) -> _Drawn:
    """Return *most* different requests, all alike likely, in one pass over *requests*; all of them if there are fewer."""
    drawn, known = _Drawn([]), set[bytes]()
    async for each in _each(requests):
        try:
            item, content = _read(each if isinstance(each, Request) else Request(each), harmless)
        except ConfigError as error:
            drawn.unusable += 1
            drawn.why = f"no request can be combined; of the last one: {error}"
            continue
        digest = blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in known:
            continue
        known.add(digest)
        # Reservoir sampling (Vitter's algorithm R).
        place = draw.randrange(len(known))
        if len(drawn.items) < most:
            drawn.items.append(item)
        elif place < most:
            drawn.items[place] = item
    return drawn


async def _each(requests: Requests) -> AsyncIterator[Request[Any] | Messages]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    elif not isinstance(requests, Iterable):
        raise ConfigError(f"requests must be iterable, got {type(requests).__name__}")
    else:
        for number, request in enumerate(requests):
            if number % _SLICE == 0:
                await asyncio.sleep(0)
            yield request


def _read(request: Request[Any], harmless: Collection[str]) -> tuple[_Item, Hashable]:
    """Return *request* as an item, and all that decides its answer.

    Raises:
        ConfigError: It is wrong, or cannot be combined.
    """
    asked = msgspec.structs.replace(request, priority="normal", timeout=None, use_cache=False)
    read_request = partial(read_options, harmless=harmless)
    options = read_request(*arguments_of(asked))
    check_messages(request.messages)
    read = ", ".join(options.alone) or read_messages(request.messages, options)
    if isinstance(read, str):
        raise ConfigError(f"its form keeps it out of combined prompts: {read}")
    lane, text, _ = read
    return _Item(asked, options.answer, lane), (lane, text)
