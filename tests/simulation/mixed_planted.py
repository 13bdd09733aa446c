"""Bugs to plant in the library for a while, as in `simulation.planted`: in the parts that runs of several parts have."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from simulation.planted import all_of, replaced

import microbatch.batching.audits as audits_module
import microbatch.embedding.codec as embedding_codec
import microbatch.forwarding as forwarding_module
import microbatch.semantic.look_ups as look_ups_module
import microbatch.spending.spending as spending_module
from microbatch.batching.attribution import UsageAttribution
from microbatch.batching.dispatch import Dispatcher
from microbatch.batching.engine import Engine
from microbatch.batching.intake import Intake
from microbatch.batching.lane_table import LaneTable
from microbatch.batching.ticket import SlotLease
from microbatch.caching.key import Keys
from microbatch.embedding.vectors import VectorAnswer
from microbatch.schema.answer_type import AnswerType
from microbatch.spool.worker import Worker
from microbatch.transports.accounts import Account
from microbatch.transports.rate_limit import Bucket, RateLimit

if TYPE_CHECKING:
    from collections.abc import Callable

# --- equal texts


def nothing_shared():
    """Equal requests under way do not join each other."""
    return replaced(Intake, "_join", lambda _: lambda intake, *args: False)


def one_value_for_all():
    """Callers that share an answer get one object."""

    def same(_again):
        return lambda answer, output, text: (output, text)

    return all_of(replaced(AnswerType, "again", same), replaced(VectorAnswer, "again", same))


# --- relayed requests


def relayed_without_a_slot():
    """What is relayed waits for neither a slot nor a permit."""

    def free(_paid_slot):
        async def wrapper(parts, relayed, lease_slot, expense):
            charge = None if parts.spending is None or expense is None else await parts.spending.charge(expense)
            return SimpleNamespace(used=False), None if isinstance(charge, asyncio.Future) else charge

        return wrapper

    return replaced(forwarding_module, "_paid_slot", free)


def slot_kept_by_the_relayed():
    """What is relayed and given up keeps its slot."""

    def keep(lease_slot):
        @asynccontextmanager
        async def wrapper(engine, *args, **options):
            async with AsyncExitStack() as stack:
                lease = await stack.enter_async_context(lease_slot(engine, *args, **options))
                try:
                    yield lease
                except asyncio.CancelledError:
                    lease.granted = asyncio.Future()
                    raise

        return wrapper

    return replaced(Engine, "lease_slot", keep)


# --- limits


def tokens_not_asked_for():
    """Tokens are charged, but a call with many does not wait for them."""
    return replaced(Bucket, "wait", lambda wait: lambda bucket, tokens, now, who=None: wait(bucket, 0, now, who))


def permit_never_asked_for_again():
    """A call that waits for a permit is not told when there is one."""
    return replaced(Account, "_ask_again_at", lambda _: lambda account, when: None)


def limits_of_ones_own():
    """Batchers that share a limit have each the whole of it."""
    return replaced(RateLimit, "bucket", lambda _: lambda limit, key, now, *name: Bucket(limit))


def lanes_in_common():
    """Batchers on one transport have one table of lanes."""

    def shared(init):
        latest: list[LaneTable] = []

        def wrapper(table, scheduler, idle):
            init(table, scheduler, idle)
            if latest and not latest[0]._by_key:  # made one after the other
                table._by_key = latest.pop()._by_key
            latest[:] = [table]

        return wrapper

    return replaced(LaneTable, "__init__", shared)


def budget_not_looked_at():
    """Calls are charged, but leave whatever is left."""
    return replaced(spending_module, "_fits", lambda _: lambda *amounts: True)


# --- audits


def lost_audit_usage():
    """What calls for no caller cost is forgotten."""
    return replaced(UsageAttribution, "attribute_beside", lambda _: lambda attribution, what, cost: None)


class _Kept(SlotLease):
    def give_back(self):
        self.returned.set()


def slot_kept_by_an_audit():
    """An audit keeps its slot."""
    return replaced(audits_module, "SlotLease", lambda _: _Kept)


def asked_twice_as_often():
    """Each answer that is asked for again is asked for twice."""

    def twice(ask_again):
        async def wrapper(*args, **options):
            await ask_again(*args, **options)
            return await ask_again(*args, **options)

        return wrapper

    return replaced(Dispatcher, "ask_again", twice)


# --- embeddings


def vectors_by_place():
    """Vectors are taken in the order of the reply, whatever their indices are."""

    def by_place(read):
        def wrapper(completion, asked, length):
            completion.vectors = [(place, vector) for place, (_, vector) in enumerate(completion.vectors)]
            return read(completion, asked, length)

        return wrapper

    return replaced(embedding_codec, "read", by_place)


def lost_list_usage():
    """What the texts of callers that have left have cost is forgotten."""

    def lost(attribute_list):
        def wrapper(attribution, tickets, completion, cost, *, again):
            if cost is not None:
                unclaimed = attribution._ledger.unclaimed
                alone = attribute_list(attribution, tickets, completion, cost, again=again)
                attribution._ledger.unclaimed = unclaimed
                return alone
            return attribute_list(attribution, tickets, completion, cost, again=again)

        return wrapper

    return replaced(UsageAttribution, "attribute_list", lost)


# --- the semantic cache


def no_walls():
    """Questions of different tenants are compared."""

    def open_(without_last_text):
        def wrapper(keys, messages, options):
            content = (*options.content[:-1], None)
            return without_last_text(keys, messages, SimpleNamespace(content=content, params=options.params))

        return wrapper

    return replaced(Keys, "without_last_text", open_)


def held_for_ever():
    """A request that a look-up holds is not released."""
    return replaced(look_ups_module, "_release", lambda _: lambda tickets: None)


# --- the spool


def half_forgotten():
    """A worker asks for every second request that it holds."""

    def half(requests):
        async def wrapper(worker, stage, most):
            number = 0
            async for request in requests(worker, stage, most):
                number += 1
                if number % 2:
                    yield request

        return wrapper

    return replaced(Worker, "_requests", half)


def answers_mixed_up():
    """Answers that are stored together go to each other's requests."""

    def mixed(store):
        async def wrapper(worker, results):
            deliveries, answers = [each for each, _ in results], [each for _, each in results]
            return await store(worker, list(zip(deliveries, answers[1:] + answers[:1], strict=True)))

        return wrapper

    return replaced(Worker, "_store", mixed)


BUGS: tuple[Callable[[], Any], ...] = (
    nothing_shared,
    one_value_for_all,
    relayed_without_a_slot,
    slot_kept_by_the_relayed,
    tokens_not_asked_for,
    permit_never_asked_for_again,
    limits_of_ones_own,
    lanes_in_common,
    budget_not_looked_at,
    lost_audit_usage,
    slot_kept_by_an_audit,
    asked_twice_as_often,
    vectors_by_place,
    lost_list_usage,
    no_walls,
    held_for_ever,
    half_forgotten,
    answers_mixed_up,
)
"""The simulation finds each of them."""
