"""The settings that decide when requests travel together and what is done when that goes wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from microbatch.errors import ConfigError

WhenFull = Literal["wait", "reject", "bypass"]
Idle = Literal["flush", "wait"]
Resolve = Literal["stream", "verified"]
Merge = Literal["always", "when-cheaper"]


def at_least(minimum: float, **settings: float | None) -> None:
    """Check numbers given by name against *minimum*; None passes.

    Raises:
        ConfigError: One is no number, is NaN or is below the minimum; the message names it.
    """
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < minimum:
            raise ConfigError(f"{name} must be a number of at least {minimum}, got {value!r}")


def whole(minimum: int, **settings: int | None) -> None:
    """Check whole numbers given by name against *minimum*; None passes.

    Raises:
        ConfigError: One is not an int or is below the minimum; the message names it.
    """
    for name, value in settings.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{name} must be a whole number, got {value!r}")
    at_least(minimum, **settings)


def one_of(kind: object, **settings: str | None) -> None:
    """Check words given by name against the `Literal` *kind*; None passes.

    Raises:
        ConfigError: One is not among the words; the message lists them.
    """
    for name, value in settings.items():
        if value is not None and value not in get_args(kind):
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, get_args(kind)))}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushPolicy:
    """When a lane stops waiting for company, and how much may be under way.

    Args:
        max_batch_size: Most requests in one combined prompt. Accuracy falls slowly up to about 20 and steeply after 50
            (arXiv:2406.10786, arXiv:2603.22608).
        max_wait: Longest time the first request of a batch waits for company, in seconds. 0 sends at the next loop tick.
        max_batch_tokens: Most tokens of our instructions and the items together; the shared messages are not counted.
        max_prompt_tokens: Most tokens of the whole combined prompt, shared messages included. None sets no limit.
        max_output_tokens: Most tokens a combined reply is expected to hold: the sum over items of 1.2 x `max_tokens` + 16, or
            of the 95th percentile of the lane's answers so far when callers give no `max_tokens`.
        max_concurrent_batches: Most calls on the wire at once, single ones, retries and fallback calls included; also the most
            calls that one account (endpoint, model, key) may have begun and not finished, back-off included. Beyond it a quarter as
            many again, from 4 on, may start at once: for accounts with nothing on the wire, and one high-priority call per account.
        max_queued: Most requests accepted and not yet answered. High priority may exceed it by 2 %, at least by one.
        when_full: What a submit does beyond `max_queued`: "wait" for room, "reject" with `Overloaded`, or "bypass": go
            alone at once if a call may start, else `Overloaded`.
        idle: "flush" sends a request at once when its lane has nothing under way, so batching adds no latency when it is quiet;
            "wait" always waits for company up to `max_wait`.
        merge: "always" combines whatever may share a prompt; "when-cheaper" sends requests alone where the wrapper and the
            framing would cost more than the shared messages save, by the model's prices (output at 4 times the input where
            no price is known).
        share: Whether equal requests that are under way at the same time are answered by one, each with its own copy, whatever
            their temperature. Those of temperature 0 are, and with a cache all are.
        low_max_wait: `max_wait` of low-priority requests, which ignore `idle`, in seconds.

    Raises:
        ConfigError: A limit is below its minimum or a word is unknown.
    """

    max_batch_size: int = 16
    max_wait: float = 0.1
    max_batch_tokens: int = 8_000
    max_prompt_tokens: int | None = None
    max_output_tokens: int = 2_000
    max_concurrent_batches: int = 64
    max_queued: int = 10_000
    when_full: WhenFull = "wait"
    idle: Idle = "flush"
    merge: Merge = "always"
    share: bool = False
    low_max_wait: float = 2.0

    def __post_init__(self) -> None:
        whole(
            1,
            max_batch_size=self.max_batch_size,
            max_batch_tokens=self.max_batch_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=self.max_output_tokens,
            max_concurrent_batches=self.max_concurrent_batches,
            max_queued=self.max_queued,
        )
        at_least(0, max_wait=self.max_wait, low_max_wait=self.low_max_wait)
        if not isinstance(self.share, bool):
            raise ConfigError(f"share must be True or False, got {self.share!r}")
        one_of(WhenFull, when_full=self.when_full)
        one_of(Idle, idle=self.idle)
        one_of(Merge, merge=self.merge)


MAX_WAIT: Final = 120.0
"""An endpoint that asks to wait longer, in seconds, is not waited for: the openai SDK draws the line there as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a call that failed is made again.

    Retried are failures that time may heal: connections that fail or break, timeouts, 408, 409, 429 (but for quota and
    billing), 5xx; the endpoint's `x-should-retry` overrides the status. A call is retried only before its first token. What
    the endpoint asks to wait is never undercut; if it asks for more than two minutes, the call fails at once.

    Args:
        max_attempts: Most attempts of one call, the first included. 1 never retries.
        base: Upper end of the first random delay, in seconds; it doubles with each further attempt ("full jitter", AWS
            Architecture Blog, "Exponential Backoff And Jitter").
        cap: Upper end of any random delay, in seconds.
        budget: Retries allowed per first attempt, shared by all calls to the same endpoint, model and key, so that an outage
            is not answered with a multiple of the load. Asking again after a cut stream is paid from it too.
        reserve: Retries allowed beyond that, so that a batcher with little traffic can retry at all.

    Raises:
        ConfigError: A limit is below its minimum.
    """

    max_attempts: int = 4
    base: float = 0.5
    cap: float = 20.0
    budget: float = 0.2
    reserve: int = 10

    def __post_init__(self) -> None:
        whole(1, max_attempts=self.max_attempts)
        whole(0, reserve=self.reserve)
        at_least(0, base=self.base, cap=self.cap, budget=self.budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackPolicy:
    """What is done about answers that are missing or broken.

    Args:
        resolve: "stream" answers each caller as soon as its element has arrived in order; "verified" waits for the end
            of the reply. None means "stream", or "verified" with a canary.
        canary: Whether each combined prompt ends in an item whose only right answer is a random word. A reply that gets it
            wrong is distrusted as a whole: one item may have given orders to all, or the model may have slipped a line. It
            costs about 35 tokens a call, and the reply's schema is a little larger.
        max_concurrent: Most calls one batch's fallback has under way at once.

    Raises:
        ConfigError: A limit is below its minimum, a word is unknown, or early answers are asked for together with a canary,
            which can only be checked at the end.
    """

    resolve: Resolve | None = None
    canary: bool = False
    max_concurrent: int = 4

    def __post_init__(self) -> None:
        one_of(Resolve, resolve=self.resolve)
        whole(1, max_concurrent=self.max_concurrent)
        if self.canary and self.resolve == "stream":
            raise ConfigError('canary=True needs resolve="verified": the canary is the last answer of a reply')

    @property
    def early(self) -> bool:
        """Whether callers are answered while the reply still streams."""
        return not self.canary and self.resolve != "verified"
