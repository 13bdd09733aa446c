"""A kind of lane, and the sizes of batches that its answers allow.

Lanes that ask the same model in the same way are of one kind, whatever their tenant, headers and priority. Sizes are judged in steps of
1, 2, 4, 8, 16, 32 and above; a batch counts for the smallest step that it fits in.

A step is *condemned* when the evidence says that its excess is above the bound, and the kind goes on with smaller batches. It is
*certified* when the evidence says that its excess is below. The next larger step is tried again, with new evidence, when the step in
use is certified and enough requests have passed: 500 after the first condemnation, and twice as many after each further one. In
step 1 nothing is combined, and only requests count.

The time of a step is divided into numbered *periods*: a certificate begins the next one, and so does a new try. A condemnation makes
the answers of the present period doubtful, and those of larger steps that are undecided, because they will not be judged any more. A
step that is in use is never in a doubtful period.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.accounting.audits import AuditedSize
from microbatch.audit.evidence import ENOUGH, DriftDetector, Evidence, Natural
from microbatch.lru import LRU

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from microbatch.accounting.audits import Decision
    from microbatch.prompt.codec import Settings

ABOVE: Final = 64
"""The step of all sizes above 32."""

STEPS: Final = (1, 2, 4, 8, 16, 32, ABOVE)

FREE_SAMPLES: Final = 50
"""Samples of a step that are asked whatever they cost."""

RATE_AFTER_CERTIFICATE: Final = 0.005
"""Share of the items that is sampled, once a step is certified, to notice a change of the model."""

_FAR: Final = 20
"""An excess of so many times the bound is far above it: then two steps are left at once."""

_PATIENCE: Final = 500
"""Requests after the first condemnation before the next larger step is tried again."""

_MOST_KINDS: Final = 1_024
"""Kinds of lanes that are remembered."""

_AHEAD: Final = 8
"""Audits under way at which bulk work waits while the step is undecided."""


def step_of(size: int) -> int:
    """Return the step that a batch of *size* requests counts for."""
    return next((step for step in STEPS if size <= step), ABOVE)


def sizes_in(step: int) -> str:
    """Return the sizes that count for *step*, in words that follow "batches of"."""
    return f"more than {STEPS[-2]}" if step == ABOVE else f"up to {step}"


class StepRecord(msgspec.Struct):
    """The record of one step, since it was first used or tried again.

    Attributes:
        asked: Items sampled, without those whose audit was dropped.
        not_comparable: Those of them whose answers cannot be compared, or were not given.
        different: Compared items whose first answer alone differs from that in the batch.
        detector: Watches after a certificate; None before.
        calls_cost: The cost of its combined calls; the unit is that of a prompt token.
        audits_cost: The cost of their audits.
        audits_ended: Audits whose cost is known.
        period: The number of the present period of the step, from 0.
        doubtful: The periods of the step whose answers are doubtful.
    """

    asked: Natural = 0
    not_comparable: Natural = 0
    different: Natural = 0
    evidence: Evidence = msgspec.field(default_factory=Evidence)
    detector: DriftDetector | None = None
    condemned: bool = False
    calls_cost: float = 0.0
    audits_cost: float = 0.0
    audits_ended: Natural = 0
    period: Natural = 0
    doubtful: set[int] = set()

    @property
    def certified(self) -> bool:
        """True if its excess was found to be below the bound."""
        return self.detector is not None

    @property
    def undecided(self) -> bool:
        """True if its excess was found to be neither below the bound nor above."""
        return self.detector is None and not self.condemned

    def can_afford(self, overhead: float) -> bool:
        """Return whether one more audit keeps all of them within *overhead*, as a share of what the calls have cost."""
        each = self.audits_cost / (self.audits_ended or 1)
        return self.asked < FREE_SAMPLES or each * (self.asked + 1) <= overhead * self.calls_cost

    def add(self, score: int, bound: float) -> Decision | None:
        """Add a score; return what it decides."""
        self.evidence.add(score)
        if self.condemned:
            return None
        if self.detector is not None:
            self.condemned = self.detector.add(score)
        elif self.evidence.wealth_below(bound) >= ENOUGH:
            self.detector = DriftDetector(bound)
            self.period += 1
            return "certified"
        else:
            self.condemned = self.evidence.wealth_above(bound) >= ENOUGH
        if not self.condemned:
            return None
        self.detector = None
        self.doubtful.add(self.period)
        return "condemned"


class LaneKind(msgspec.Struct):
    """The record of a kind of lane; it holds no text.

    Attributes:
        digest: Names the kind: hexadecimal digits, the same in every process.
        model: The model asked; None if none is named.
        steps: The record of each step that was used.
        limit: The largest step in use; None for no limit.
        condemnations: Condemnations so far.
        requests: Requests that have left a queue since the latest of them.
        under_way: Audits that have not ended.
        doubted_at: For each step whose answers have become doubtful, the latest time of that, in seconds since 1970.
    """

    digest: str
    model: str | None = None
    steps: dict[int, StepRecord] = {}
    limit: int | None = None
    condemnations: Natural = 0
    requests: Natural = 0
    under_way: int = 0
    doubted_at: dict[int, float] = {}

    def __post_init__(self) -> None:
        """Raise `ValueError` if a record that was kept names sizes that are no steps."""
        if not set(STEPS).issuperset(self.steps) or self.limit not in (None, *STEPS[:-1]):
            raise ValueError(f"no such steps: {sorted(self.steps)}, limit {self.limit}")

    def record(self, step: int) -> StepRecord:
        """Return the record of *step*."""
        found = self.steps.get(step)
        if found is None:
            found = self.steps[step] = StepRecord()
        return found

    def holds(self, size: int) -> bool:
        """Return whether the next batch of bulk work, of *size* requests, waits for audits of those before."""
        return self.under_way >= _AHEAD and self.record(step_of(size)).undecided

    def audit_ended(self) -> bool:
        """Note that an audit has ended; return whether bulk work may have waited for it."""
        self.under_way -= 1
        return self.under_way >= _AHEAD - 1

    def is_condemned(self, size: int, given_at: float = math.inf) -> bool:
        """Return whether answers from batches of *size* requests, given at *given_at*, are not good enough.

        The time is in seconds since 1970; infinity is that of the next batch.
        """
        step = step_of(size)
        record = self.steps.get(step)
        return (record is not None and record.condemned) or given_at < self.doubted_at.get(step, -math.inf)

    def doubt(self, now: float, condemned: int | None = None) -> None:
        """Note at *now*, in seconds since 1970, which answers so far are doubtful, when a step is *condemned* or tried again.

        They are those of the condemned step and of larger ones that are undecided, which will not be judged any more, and remain so
        when the step is tried again. A step that was doubtful before and has no certificate since still is.
        """
        for step, record in self.steps.items():
            if not record.certified and (step in self.doubted_at or (condemned is not None and step >= condemned)):
                self.doubted_at[step] = now

    def period(self, size: int) -> int:
        """Return the number of the present period of batches of *size* requests."""
        record = self.steps.get(step_of(size))
        return 0 if record is None else record.period

    def is_doubtful(self, size: int, period: int) -> bool:
        """Return whether answers from batches of *size* requests in the period of that number are doubtful."""
        record = self.steps.get(step_of(size))
        return record is not None and period in record.doubtful

    def add(self, step: int, score: int, bound: float, *, adapt: bool) -> Decision | None:
        """Add the score of an item from a batch of *step*, and with *adapt* limit the size by it; return what it decides."""
        record = self.record(step)
        decision = record.add(score, bound)
        if decision == "condemned" and adapt:
            self._shrink(step, far=record.evidence.excess >= _FAR * bound)
        return decision

    def _shrink(self, step: int, *, far: bool) -> None:
        self._limit_to(STEPS[max(0, STEPS.index(step) - (2 if far else 1))])
        for larger, record in self.steps.items():
            if larger > step and record.undecided:
                record.doubtful.add(record.period)
        self.condemnations += 1

    def grows(self, requests: int, largest: int) -> bool:
        """Count *requests* that leave a queue; return whether the limit was raised by that, up to batches of *largest*."""
        self.requests += requests
        if self.limit is None or self.requests < _PATIENCE * 2 ** (self.condemnations - 1):
            return False
        if self.limit > 1 and not self.record(self.limit).certified:
            return False
        step = STEPS[STEPS.index(self.limit) + 1]
        before = self.record(step)
        if before.condemned:
            self.steps[step] = StepRecord(period=before.period + 1, doubtful=before.doubtful)
        elif before.period in before.doubtful:
            before.period += 1  # the evidence stands, and answers from now on are not doubtful
        self.limit = None if step >= min(largest, ABOVE) else step
        return True

    def give_up_tries(self) -> bool:
        """Give up new tries that are undecided, because there may not be enough requests to decide them; return whether one was.

        Their answers are doubtful: a size that did harm once is not trusted without a certificate.
        """
        given_up = False
        for step, record in self.steps.items():
            if record.undecided and record.doubtful and record.period not in record.doubtful:
                given_up = True
                record.doubtful.add(record.period)
                self._limit_to(STEPS[STEPS.index(step) - 1])
        return given_up

    def _limit_to(self, step: int) -> None:
        self.limit = step if self.limit is None else min(self.limit, step)
        self.requests = 0

    def figures(self) -> Iterator[AuditedSize]:
        """Yield the figures of each step that was audited."""
        for step, record in sorted(self.steps.items()):
            if not record.asked:
                continue
            evidence, raw = record.evidence, record.different / (record.evidence.count or 1)
            yield AuditedSize(
                kind=self.digest,
                model=self.model,
                size=step,
                asked=record.asked,
                compared=evidence.count,
                not_comparable=record.not_comparable,
                raw=raw,
                noise=raw - evidence.excess,
                excess=evidence.excess,
                upper=evidence.upper_bound,
                certified=record.certified,
                condemned=record.condemned,
            )


class LaneKinds(LRU[str, LaneKind]):
    """The kinds of lanes used lately, by their digests, of an endpoint with the address *endpoint* and a *default_model*."""

    def __init__(self, endpoint: str, default_model: str | None) -> None:
        super().__init__(_MOST_KINDS)
        self._endpoint = endpoint
        self._default_model = default_model

    def of(self, settings: Settings, shared: Sequence[Any]) -> LaneKind:
        """Return the kind of lanes with *settings* and the messages *shared*; their headers are no part of it."""
        digest = self.digest_of(settings, shared)
        return self.get_or_make(digest, lambda: LaneKind(digest, settings.model or self._default_model))

    def digest_of(self, settings: Settings, shared: Sequence[Any]) -> str:
        """Return the digest that names the kind of these lanes, the same in every process."""
        model = settings.model or self._default_model
        content = (self._endpoint, model, settings.answer.key, settings.max_tokens, settings.params, shared)
        encoded = repr(content).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(encoded, digest_size=8).hexdigest()
