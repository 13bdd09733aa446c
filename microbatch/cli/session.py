"""Sending bulk work: batchers on one endpoint that wait while it does not answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.accounting.stats import OF_THE_CACHE, Stats, together
from microbatch.cli.console import note, plural
from microbatch.cli.logs import call_logs
from microbatch.client import Microbatcher
from microbatch.errors import RequestFailed, TransportError
from microbatch.policy import RetryPolicy
from microbatch.resources import acquire, release
from microbatch.spool.endpoint import Cause, Endpoint, cause_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microbatch.cli.plan import Plan
    from microbatch.policy import AuditPolicy, FlushPolicy
    from microbatch.protocols import ChatCall, Completion, Transport


class PausingTransport:
    """Sends through another transport when *endpoint* allows it, and notes there how each attempt ends.

    During an outage calls wait here, unsent, instead of using up their attempts. Other attributes are those of the inner transport,
    which may be used without this one at the same time.
    """

    def __init__(self, transport: Transport, endpoint: Endpoint) -> None:
        self._transport = transport
        self._endpoint = endpoint

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the inner transport."""
        return getattr(self._transport, name)

    async def open(self) -> None:
        """Open the inner transport, unless it is in use already."""
        await acquire([self._transport])

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Make one attempt at *call* when it is allowed; see `Transport.send`. Raise `ShutDown` if nothing is sent any more."""
        endpoint = self._endpoint
        async with endpoint.attempt() as sent:
            try:
                completion = await self._transport.send(call, on_text)
            except RequestFailed as error:
                if cause_of(error) is Cause.REQUEST:
                    endpoint.succeeded(sent)  # a refusal of this request is an answer
                else:
                    endpoint.failed(error, sent)
                raise
            if completion.finish_reason in (None, "error"):
                endpoint.failed(TransportError("the reply was cut off"), sent)
            else:
                endpoint.succeeded(sent)
            return completion

    async def aclose(self) -> None:
        """Close the inner transport after its last user."""
        await release([self._transport])


class Session:
    """The batchers of a command, which share a transport, a rate limit and a cache; see `Endpoint` for *give_up_after*.

    Attributes:
        prober: A batcher, not open, that makes one attempt per request, without a cache, also while the endpoint does not answer.
    """

    def __init__(self, plan: Plan, *, give_up_after: float | None) -> None:
        self.endpoint: Endpoint = Endpoint("the endpoint is left alone", give_up_after=give_up_after)
        self.prober: Microbatcher = Microbatcher(
            plan.transport, retry=RetryPolicy(max_attempts=1), prices=plan.prices, budget=plan.budget
        )
        self._plan = plan
        self._transport = PausingTransport(plan.transport, self.endpoint)
        self._batchers: list[Microbatcher] = []

    def batcher(
        self, policy: FlushPolicy, *, audit: AuditPolicy | None = None, hooks: Sequence[object] = ()
    ) -> Microbatcher:
        """Return a further batcher, not open."""
        plan = self._plan
        batcher = Microbatcher(
            self._transport,
            policy=policy,
            fallback=plan.fallback,
            rate_limit=plan.rate_limit,
            cache=plan.semantic or plan.cache,
            id_secret=plan.id_seed,
            prices=plan.prices,
            audit=audit,
            hooks=[*hooks, *call_logs()],
            budget=plan.budget,
        )
        self._batchers.append(batcher)
        return batcher

    def stats(self) -> Stats:
        """Return the figures of all batchers. Calls that were never sent are not counted."""
        if not self._batchers:
            return Stats()
        stats = [batcher.stats() for batcher in (*self._batchers, self.prober)]
        return msgspec.structs.replace(
            together(stats),
            upstream_calls=self.endpoint.sent + stats[-1].upstream_calls,
            # Each batcher reports all counts of the shared cache.
            cache_bypassed=stats[0].cache_bypassed,
            cache_evictions=stats[0].cache_evictions,
            **{name: getattr(stats[0], name) for name in OF_THE_CACHE},
        )

    def note_stop(self) -> None:
        """Note the effect of the first signal."""
        calls = plural(self.endpoint.on_wire, "call")
        note(
            f"Stopping: {calls} under way may end, and the answers are kept. Press Ctrl-C again to stop now, without them."
        )
