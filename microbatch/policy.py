"""Settings: when requests are combined, retried and asked again."""

from __future__ import annotations

from collections.abc import Callable, Collection  # noqa: TC003 the flags of the command line are made from them
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from microbatch.checking import AtLeast, Count, Seconds, Share, check_fields, plain_function
from microbatch.errors import ConfigError

WhenFull = Literal["wait", "reject", "bypass"]
Idle = Literal["flush", "wait"]
Resolve = Literal["stream", "verified"]
Merge = Literal["always", "when-cheaper", "auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushPolicy:
    """When a batch is sent, and how much may be under way.

    Args:
        max_batch_size: Most requests in one combined prompt. Accuracy falls slowly up to about 20 and steeply after 50
            (arXiv:2406.10786, arXiv:2603.22608).
        max_wait: Longest time the first request of a batch waits for others, in seconds. 0 sends at the next loop tick.
        max_batch_tokens: Most tokens of the batch instructions and the items, without the shared messages. They are counted exactly in
            OpenAI's encodings only; with other models the count is corrected by what the endpoint reports of a lane's calls.
        max_prompt_tokens: Most tokens of the whole combined prompt, shared messages included, counted likewise. From the first report
            on it includes what the endpoint adds, such as a schema. None sets no limit.
        max_output_tokens: Most expected tokens of a combined reply: the sum over items of the 95th percentile of the lane's answers so
            far. Of the first batches, whose callers give `max_tokens`, an item counts 1.2 x `max_tokens` + 16, at most 272.
        max_concurrent_batches: Most calls on the wire at once, single calls, retries and fallback calls included; also the most calls
            that one account (endpoint, model, key) may have begun and not finished, back-off included. Beyond it a quarter as many
            again, from 4 on, may start at once: for accounts with nothing on the wire, and one high-priority call per account.
        max_queued: Most requests accepted and not yet answered. High priority may exceed it by 2 %, at least by one.
        when_full: What `submit` does beyond `max_queued`: "wait", "reject" with `Overloaded`, or "bypass": send the request alone at
            once if a call may start, else `Overloaded`.
        idle: "flush" sends a request at once if its lane has nothing under way, so that batching adds no latency under low traffic;
            "wait" always waits up to `max_wait`.
        merge: "always" combines all requests that may share a prompt. "when-cheaper" sends them alone where that costs less, by the
            model's prices (output at 4 times the input if unknown). Single calls read most of long shared messages from the provider's
            prefix cache: from 1,024 tokens on where cached input has a price, and from the second call on as the endpoint reports.
            "auto" is "when-cheaper" where the price is known and the number of requests is not limited, neither by a `RateLimit` nor
            by an endpoint that has reported less than a fifth of its limit to be left; otherwise "always".
        share: Whether equal requests under way at the same time get one answer, each its own copy, at any temperature. Without it
            they do at temperature 0, and always with a cache.
        low_max_wait: `max_wait` of low-priority requests, which ignore `idle`, in seconds.
        combine_params: Names of further request parameters that may be combined. By themselves only those are that do to each of
            several answers what they do to one, such as `top_p` and `reasoning_effort`; any other sends its request alone.
        max_latency: Seconds within which the last answer of a batch should arrive after the batch leaves; at least 95 % of the
            answers do. Each lane learns from its replies how many requests allow that. If fewer than two do, they go alone, and
            after 40 of them two are tried again. A batch leaves when it has a slot and a permit of the rate limit: waiting for
            those, and asking again after a failure, does not count. None sets no limit.

    Raises:
        ConfigError: A limit is below its minimum, or a value is unknown.
    """

    max_batch_size: Count = 16
    max_wait: Seconds = 0.1
    max_batch_tokens: Count = 8_000
    max_prompt_tokens: Count | None = None
    max_output_tokens: Count = 2_000
    max_concurrent_batches: Count = 64
    max_queued: Count = 10_000
    when_full: WhenFull = "wait"
    idle: Idle = "flush"
    merge: Merge = "always"
    share: bool = False
    low_max_wait: Seconds = 2.0
    combine_params: Collection[str] = ()
    max_latency: Seconds | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "combine_params", tuple(self.combine_params))  # a copy, and hashable


MAX_WAIT: Final = 120.0
"""Longest `Retry-After`, in seconds, that is waited for. The openai SDK has the same limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a failed call is retried.

    Transient failures are retried: connections that fail or break, timeouts, 408, 409, 429 (except quota and billing), 5xx. The
    endpoint's `x-should-retry` overrides the status. A call is retried only before its first token. The endpoint's `Retry-After` is
    respected; beyond two minutes the call fails at once.

    Args:
        max_attempts: Most attempts of one call, the first included. 1 never retries.
        base: Upper end of the first random delay, in seconds; it doubles with each attempt ("full jitter", AWS Architecture Blog,
            "Exponential Backoff And Jitter").
        cap: Upper end of any random delay, in seconds.
        budget: Retries allowed per first attempt, shared by all calls to the same endpoint, model and key, so that retries do not
            multiply the load of an outage. Asking again after a cut stream counts too.
        reserve: Retries allowed beyond the budget, so that a batcher with little traffic can retry.

    Raises:
        ConfigError: A limit is below its minimum.
    """

    max_attempts: Count = 4
    base: Seconds = 0.5
    cap: Seconds = 20.0
    budget: Annotated[float, AtLeast(0)] = 0.2
    reserve: Annotated[int, AtLeast(0)] = 10

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackPolicy:
    """The handling of missing and malformed answers.

    Args:
        resolve: "stream" answers each caller as soon as its answer has arrived in order; "verified" waits for the end of the reply.
            None means "stream", or "verified" with a canary.
        canary: Whether each combined prompt ends with an item whose only right answer is a random word. If the reply has it wrong, all
            its answers are discarded: one item may have instructed the model, or the answers may be shifted. Costs about 35 tokens
            per call and a little schema.
        max_concurrent: Most fallback calls of one batch at once.

    Raises:
        ConfigError: A limit is below its minimum, a value is unknown, or `resolve="stream"` is combined with a canary, which is the
            last answer of a reply.
    """

    resolve: Resolve | None = None
    canary: bool = False
    max_concurrent: Count = 4

    def __post_init__(self) -> None:
        check_fields(self)
        if self.canary and self.resolve == "stream":
            raise ConfigError('canary=True needs resolve="verified": the canary is the last answer of a reply')

    @property
    def early(self) -> bool:
        """True if callers are answered while the reply is still arriving."""
        return not self.canary and self.resolve != "verified"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPolicy:
    """How much of the traffic is audited, and what follows from it.

    An item that was answered in a batch is asked alone later, at low priority, and once more if the two answers differ. The *excess* is
    the share of answers that differ because of combining, beyond the model's disagreement with itself. Callers of `submit` never wait
    for an audit; `map` goes at most eight combined calls ahead of the audits of an undecided size. The tokens of audits are among
    `Stats.unclaimed`. Not audited are repaired answers, answers from the cache, `warm` and provider batches.

    Args:
        rate: The share of items that is audited, at most one of each batch. "auto" is one of each batch until the size is decided,
            within *max_overhead*, and 0.005 after a certificate.
        max_excess: The largest excess that is accepted, above 0 and below 1.
        same: A plain function that takes the output from the batch and the one alone, and returns whether they are the same; it is
            called on the event loop. An error makes them incomparable. None compares typed answers by their values, and texts of at
            most 64 characters but for case and white space; longer texts are not comparable.
        adapt: Whether the size of batches follows: it shrinks where the excess was found to be above *max_excess*, and grows back where
            it was found to be below. False only reports. Either way an audited answer that combining has changed is replaced in the
            cache by the one alone.
        max_overhead: The cost of audits with "auto", as a share of that of the calls of the same kind and size; 50 of each are asked in
            any case.
        audit_own_keys: Whether requests with a credential of their own in `headers` are audited too, at their callers' expense.

    Raises:
        ConfigError: A value is out of range.
    """

    rate: Literal["auto"] | Share = "auto"
    max_excess: Share = 0.02
    same: Callable[[Any, Any], bool] | None = None
    adapt: bool = True
    max_overhead: Annotated[float, AtLeast(0)] = 0.1
    audit_own_keys: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.max_excess < 1:
            raise ConfigError(f"max_excess must be above 0 and below 1, got {self.max_excess}")
        plain_function(self.same, same="True or False")
