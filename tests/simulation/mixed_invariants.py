"""What must be true of every run of several parts. Each check yields a sentence for each breach it sees."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from simulation.invariants import peak, tokens_of
from simulation.mixed_endpoint import right_vector
from simulation.mixed_scenario import FILLERS
from simulation.upstream import TRANSIENT, right_output

import microbatch as mb
from microbatch.spool.payload import Answer
from microbatch.spool.records import MAX_ALONE, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from simulation.mixed_endpoint import Other
    from simulation.mixed_world import Caller, MixedWorld
    from simulation.upstream import Attempt

    Check = Callable[[MixedWorld], Iterator[str]]

_MINUTE = 60.0
_SPOOLED = " spooled "


def breaches(world: MixedWorld) -> list[str]:
    """Return what is wrong with *world*; nothing, if the library keeps its promises."""
    if world.stuck is not None:
        waiting = [caller.number for caller in world.callers if caller.arrived is not None and caller.ended is None]
        return [f"stuck: {world.stuck}; without an end: {waiting}; closed: {world.closed}"]
    found = [f"event loop: {complaint}" for complaint in world.loop.complaints] + world.leftover
    return found + [f"{check.__name__}: {breach}" for check in CHECKS for breach in check(world)]


# --- what was sent


def _attempts(world: MixedWorld) -> list[Attempt]:
    """Return the chat calls of the callers' batchers."""
    return [attempt for attempt in world.upstream.attempts if _SPOOLED not in attempt.texts[0]]


def _sent(world: MixedWorld) -> list[Attempt | Other]:
    """Return all calls of the callers' batchers, in order."""
    return sorted([*_attempts(world), *world.upstream.others], key=lambda sent: sent.started)


def _batcher_of(world: MixedWorld, sent: Any) -> int:
    if getattr(sent, "caller", None) is not None:
        return world.callers[sent.caller].call.batcher
    return world.by_text[sent.texts[0]][0].call.batcher


def _account_of(world: MixedWorld, sent: Any) -> tuple[Any, ...]:
    """Return what the limits of *sent* are counted by: model, headers, and the batcher if each has its own limits."""
    headers = sent.headers if hasattr(sent, "headers") else sent.call.headers
    what = getattr(sent, "what", "chat")
    model = "vec" if what in ("embed", "look_up") else "sim"
    return model, tuple(sorted(headers.items())), None if world.scenario.together else _batcher_of(world, sent)


def _carried(world: MixedWorld) -> dict[str, list[Any]]:
    """Return the calls that carried each text for its callers."""
    carried: dict[str, list[Any]] = defaultdict(list)
    for sent in [*world.upstream.attempts, *world.upstream.others]:
        if getattr(sent, "beside", None) is None and getattr(sent, "what", "") != "look_up":
            for text in sent.texts:
                carried[text].append(sent)
    return carried


# --- the callers


def every_caller_ends(world: MixedWorld) -> Iterator[str]:
    """Each caller gets an answer, a typed error or its own cancellation."""
    for caller in world.callers:
        error = caller.error
        if caller.outcome is None and caller.arrived is not None:
            yield f"{caller.number} has no outcome"
        if caller.outcome == "cancelled" and caller.cancel is None:
            yield f"{caller.number} was cancelled by nobody"
        if error is not None and not isinstance(error, mb.RequestFailed | mb.BatcherClosed | mb.Overloaded):
            yield f"{caller.number} ended with {error!r}"
        if caller.accepted is not None and caller.settled is None:
            yield f"{caller.number} was accepted and never settled"


def errors_are_deserved(world: MixedWorld) -> Iterator[str]:
    """Each error is explained by the clock, a close, a limit, or what happened to a call for the request."""
    carried, scenario = _carried(world), world.scenario
    locked_out = {type(sent.raised) for sent in _sent(world)}
    for caller in world.callers:
        error, call = caller.error, caller.call
        if error is None:
            continue
        own = [sent for text in call.texts for sent in carried[text]]
        own += [other for other in world.upstream.others if other.caller == caller.number]
        if isinstance(error, mb.DeadlineExceeded):
            # The time of a spooled request runs from the first look at it, and before it was put.
            late = call.what == "enqueue" or caller.ended == caller.arrived + (call.timeout or 0.0)
            fair = call.timeout is not None and late
        elif isinstance(error, mb.ShutDown | mb.BatcherClosed):
            fair = world.closed is not None and call.batcher == 0
        elif isinstance(error, mb.Overloaded):
            fair = scenario.policy.get("when_full") in ("reject", "bypass")
        elif isinstance(error, mb.BudgetExceeded):
            fair = bool(scenario.budget)
        elif isinstance(error, mb.AuthFailed | mb.QuotaExhausted):
            fair = type(error) in locked_out
        else:
            fair = any(sent.fault.kind != "ok" for sent in own) or any(map(world.is_poison, call.texts))
            fair |= any(text in world.deaths for text in call.texts)
            # Once a vector of another length was the first of its lane, sound ones are odd.
            odd = any(other.fault.kind == "wrong_dimensions" for other in world.upstream.others)
            fair |= odd and isinstance(error, mb.MalformedAnswer) and call.what in ("embed", "embed_many")
        if not fair:
            yield f"{caller.number} ended with {error!r}, for which there is no reason"


def answers_are_ones_own(world: MixedWorld) -> Iterator[str]:
    """Every answer is the right one to the caller's own text, or to a similar one of its own tenant."""
    carried = _carried(world)
    for caller in world.callers:
        call = caller.call
        if isinstance(caller.outcome, list) and len(caller.outcome) != len(call.texts):
            yield f"{caller.number} got {len(caller.outcome)} vectors for {len(call.texts)} texts"
        if isinstance(caller.outcome, bytes) and caller.name != "whole":
            yield f"{caller.number} was relayed {caller.outcome!r}"
        for text, reply in zip(call.texts, caller.replies, strict=False):
            if isinstance(reply, mb.Embedding):
                right = right_vector(text)
                # The length of the vectors of a model is learned: that of the first cannot be known to be wrong.
                cut = any(sent.fault.kind == "wrong_dimensions" for sent in carried[text])
                if reply.vector != right and not (cut and reply.vector == right[:-1]):
                    yield f"{caller.number} got the vector of another text than {text}"
                continue
            allowed = [right_output(text)]
            if reply.route == "similar":
                topic = text
                for filler in sorted(FILLERS[call.tenant], key=len, reverse=True):
                    topic = topic.removesuffix(filler) if filler else topic
                allowed = [right_output(topic + filler) for filler in FILLERS[call.tenant]]
            if reply.output not in allowed and not _is_cut(reply, text):
                yield f"{caller.number}, {text}, was answered {reply.output!r} by the way {reply.route}"
            if (reply.route == "similar") > ("similar" in world.scenario.parts):
                yield f"{caller.number} was answered by the way {reply.route}"


def _is_cut(reply: mb.Reply[Any], text: str) -> bool:
    """Return whether *reply* is the beginning of the right one, cut short by its limit."""
    alone = reply.finish_reason == "length" and reply.batch_size == 1
    return alone and isinstance(reply.output, str) and right_output(text).startswith(reply.output)


def outcomes_are_ones_own(world: MixedWorld) -> Iterator[str]:
    """No two callers get the same reply, error, or value that could be changed."""
    errors = [caller.error for caller in world.callers if caller.error is not None]
    replies = [reply for caller in world.callers for reply in caller.replies]
    values = [reply.vector if isinstance(reply, mb.Embedding) else reply.output for reply in replies]
    for what, things in (("a reply", replies), ("an exception", errors), ("a value", values)):
        changeable = [thing for thing in things if not isinstance(thing, str | int)]
        if len({id(thing) for thing in changeable}) != len(changeable):
            yield f"callers share {what}"


def deadlines_hold(world: MixedWorld) -> Iterator[str]:
    """Who has a timeout ends when it is over at the latest."""
    for caller in world.callers:
        timeout = caller.call.timeout if caller.call.what in ("submit", "embed") else None
        if timeout is not None and caller.ended is not None and caller.ended > caller.arrived + timeout:
            yield f"{caller.number} ended at {caller.ended}, begun {caller.arrived} with timeout {timeout}"


# --- the calls


def only_equals_travel_together(world: MixedWorld) -> Iterator[str]:
    """What shares a call has the same batcher, kind, instructions, tenant and headers; look-ups the same tenant and headers."""
    for sent in _sent(world):
        if not sent.texts:
            continue
        lanes = [{caller.content for caller in world.by_text[text]} for text in sent.texts]
        if getattr(sent, "what", "") == "look_up":
            lanes = [{(batcher, *rest[-2:]) for batcher, *rest in lane} for lane in lanes]
        if not set.intersection(*lanes):
            yield f"{sent.number} mixes {sent.texts}"
        if len(set(sent.texts)) != len(sent.texts) and _shares(world):
            yield f"{sent.number} carries a text twice: {sent.texts}"


def calls_run_in_no_callers_context(world: MixedWorld) -> Iterator[str]:
    """The endpoint never sees a caller's context variables, but for what is relayed for it."""
    for sent in [*world.upstream.attempts, *world.upstream.others]:
        if sent.whose is not None and getattr(sent, "what", "") != "forward":
            yield f"{sent.number} ran in the context of {sent.whose}"


def equal_texts_share(world: MixedWorld) -> Iterator[str]:
    """While a caller waits for the answer to a text that is under way, nobody else has the same asked."""
    if not _shares(world):
        return
    spans: dict[Any, list[Any]] = defaultdict(list)
    for sent in _sent(world):
        if getattr(sent, "beside", None) is None and getattr(sent, "what", "") not in ("look_up", "forward"):
            for text in sent.texts:
                spans[text].append(sent)
    for text, attempts in spans.items():
        callers = world.by_text[text]
        # Of one text there may be several flights if what is asked differs in anything, or one is more urgent or has more time.
        kinds = {(caller.content, caller.call.priority, caller.call.timeout) for caller in callers}
        if len(kinds) > 1 or callers[0].call.timeout is not None:
            continue
        for before, after in pairwise(attempts):
            waiting = [
                caller
                for caller in callers
                if caller.accepted is not None and caller.accepted < before.started and _left(caller) > after.started
            ]
            if waiting and after.started < before.ended:
                yield f"{text} was sent at {after.started}, though it was under way for {waiting[0].number}"


def _shares(world: MixedWorld) -> bool:
    """Return whether equal texts under way share an answer; what bypasses a full queue does not."""
    policy = world.scenario.policy
    return bool(policy.get("share")) and policy.get("when_full") != "bypass"


def _left(caller: Caller) -> float:
    """Return when *caller* ended; before, if its first text did."""
    return min(each for each in (caller.settled, caller.ended, caller.cancel) if each is not None)


def slots_are_limits(world: MixedWorld) -> Iterator[str]:
    """No more calls of a batcher are on the wire than its policy allows; what is relayed, looked up and audited is among them."""
    slots = world.scenario.policy["max_concurrent_batches"]
    changes: dict[int, list[tuple[float, int, int]]] = defaultdict(list)
    for sent in _sent(world):
        changes[_batcher_of(world, sent)] += [(sent.started, 1, 1), (sent.ended, 0, -1)]
    for batcher, each in changes.items():
        if peak(each) > slots + slots // 4:
            yield f"{peak(each)} calls of batcher {batcher} at once"


def quotas_are_kept(world: MixedWorld) -> Iterator[str]:
    """In no minute does an account make more requests than the limit allows, or is charged more tokens, whoever makes them."""
    yield from world.overcharged
    most = world.scenario.rate_limit.get("rpm")
    if most is None:
        return
    accounts: dict[Any, list[float]] = defaultdict(list)
    for sent in _sent(world):
        accounts[_account_of(world, sent)].append(sent.started)
    for starts in accounts.values():
        for first, last in zip(starts, starts[most:], strict=False):
            if last - first < _MINUTE:
                yield f"more than {most} calls between {first} and {last}"


def nothing_starves(world: MixedWorld) -> Iterator[str]:
    """Nothing waits for longer than two minutes while its batcher makes no call at all, whatever another one makes."""
    if not world.scenario.rate_limit:
        return
    carried = _carried(world)
    starts: dict[Any, list[float]] = defaultdict(list)
    for sent in _sent(world):
        starts[_batcher_of(world, sent)] += [sent.started, sent.ended]
    for caller in world.callers:
        if caller.accepted is None or caller.call.what not in ("submit", "embed"):
            continue
        sent = [each.started for each in carried[caller.call.texts[0]]]
        until = min([_left(caller), *(each for each in sent if each >= caller.accepted)])
        events = [each for each in sorted(starts[caller.call.batcher]) if caller.accepted < each < until]
        for before, after in pairwise([caller.accepted, *events, until]):
            if after - before > 2 * _MINUTE + 5.0:
                yield f"{caller.number} waited from {before} to {after}, and nothing was sent"


def budgets_are_kept(world: MixedWorld) -> Iterator[str]:
    """No call is charged beyond the budget or leaves when it is spent, and in the end nothing is held."""
    yield from world.overspent
    limits = world.scenario.budget
    if not limits:
        return
    sent = [
        each
        for each in _sent(world)
        if getattr(each, "caller", None) is None or world.callers[each.caller].call.charged
    ]
    if len(world.charges) != len(sent):
        yield f"{len(world.charges)} charges for {len(sent)} calls"
    most = limits.get("tokens")
    if most is not None and limits["per"] == "batcher" and world.scenario.together:
        for call in sent:
            before = sum(_cost(other) for other in sent if other.ended is not None and other.ended < call.started)
            if before > most:
                yield f"{call.number} left when {before} of {most} tokens were spent"
    for counter in {id(charge.counter): charge.counter for charge in world.charges}.values():
        if counter.calls or counter.held_tokens or abs(counter.held_usd) > 1e-9 or counter.waiting:
            yield f"the budget of {counter.tenant} still holds {counter}"


def _cost(sent: Any) -> int:
    return 0 if sent.reported is None else sent.reported.prompt_tokens + sent.reported.completion_tokens


def audits_come_after(world: MixedWorld) -> Iterator[str]:
    """No caller waits for an audit: what a sound reply answers is settled when it ends, and audited later, three times at most."""
    for attempt in _attempts(world):
        callers = [caller for text in attempt.texts for caller in world.by_text[text]]
        if attempt.beside is not None:
            if all(caller.settled is None or caller.settled > attempt.started for caller in callers):
                yield f"{attempt.number} asks again for {attempt.texts}, which is not answered yet"
        elif attempt.how == "answered" and attempt.fault.kind == "ok":
            late = [caller for caller in callers if _waits_for(world, caller, attempt)]
            if late:
                yield f"{attempt.number} answered at {attempt.ended}, but {late[0].number} waited until {late[0].settled}"
    yield from _asked_too_often(world)


_ASKED_AGAIN = 3
"""Calls that ask again for an answer: two that can be compared with each other, and one more where one of these brings no answer."""


def _asked_too_often(world: MixedWorld) -> Iterator[str]:
    """Yield what was asked again more often than allowed, or again though an attempt of the same call had ended it."""
    calls: dict[Any, list[Attempt]] = defaultdict(list)
    reasons = Counter[tuple[str | None, str]]()
    for attempt in _attempts(world):
        if attempt.beside is not None:
            calls[attempt.beside, attempt.texts[0], attempt.key].append(attempt)
        elif attempt.combined:
            reasons.update(("audit", text) for text in attempt.texts)
    reasons.update(("check", text) for caller in world.callers for text in caller.call.texts)
    asked = Counter((route, text) for route, text, _ in calls)
    for (route, text), times in asked.items():
        if times > _ASKED_AGAIN * reasons[route, text]:
            yield f"{text} was asked again {times} times by {route}"
    for (_, text, _), attempts in calls.items():
        if len(attempts) > world.scenario.retry["max_attempts"]:
            yield f"a call that asked again for {text} made {len(attempts)} attempts"
        for attempt in attempts[:-1]:
            if attempt.fault.kind not in TRANSIENT | {"cut"}:
                yield f"{attempt.number}, which asked again for {text}, was {attempt.how}, and repeated"


def _waits_for(world: MixedWorld, caller: Caller, attempt: Attempt) -> bool:
    """Return whether *caller*, the only one to ask this, went on waiting when *attempt* had answered."""
    if caller.accepted is None or caller.settled is None or len(world.by_text[caller.call.texts[0]]) > 1:
        return False
    return caller.accepted < attempt.started and caller.settled > attempt.ended


def look_ups_hold_briefly(world: MixedWorld) -> Iterator[str]:
    """Where nothing else holds a request up, it is sent when its time and that of a look-up are over."""
    scenario = world.scenario
    policy = scenario.policy
    undisturbed = not (scenario.rate_limit or scenario.budget or "max_queued" in policy)
    undisturbed &= all(sent.fault.kind == "ok" for sent in _sent(world))
    if "similar" not in scenario.parts or not undisturbed or policy["max_concurrent_batches"] < len(world.callers):
        return
    carried = _carried(world)
    for caller in world.callers:
        if caller.call.what != "submit" or caller.accepted is None:
            continue
        wait = policy["low_max_wait"] if caller.call.priority == "low" else policy["max_wait"]
        due = caller.accepted + max(wait, _LOOK_UP)
        sent = [each for each in carried[caller.call.texts[0]] if each.ended > caller.accepted]
        if _left(caller) > due and not any(each.started <= due for each in sent):
            yield f"{caller.number} was accepted at {caller.accepted} and due at {due}, but was not sent then"


_LOOK_UP = 0.5 + 1 / 64
"""Seconds for which a look-up may hold a request."""


# --- the end


def usage_is_conserved(world: MixedWorld) -> Iterator[str]:
    """The callers' shares and what nobody claims add up to what the endpoint reported to each batcher."""
    carried = _carried(world)
    for number, stats in enumerate(world.stats):
        reported, claimed, guessed = Counter[str](), Counter(tokens_of(stats.unclaimed)), Counter[str]()
        for sent in _sent(world):
            if _batcher_of(world, sent) == number and getattr(sent, "what", "") != "forward":
                reported.update(tokens_of(sent.reported))
        booked = tokens_of(mb.Usage(stats.prompt_tokens, stats.completion_tokens, stats.cached_tokens))
        if any(booked[name] != reported[name] for name in booked):
            yield f"batcher {number} booked {booked}, but {dict(reported)} were reported"
        mixed = False
        for caller in world.callers:
            if caller.call.batcher != number or caller.call.what == "enqueue":
                continue
            for reply in caller.replies:
                (guessed if reply.usage.estimated else claimed).update(tokens_of(reply.usage))
                own = [sent for text in caller.call.texts for sent in carried[text]]
                mixed |= reply.usage.estimated and any(sent.reported is not None for sent in own)
        for name in booked:
            if not claimed[name] <= reported[name] <= claimed[name] + (guessed[name] if mixed else 0):
                yield f"batcher {number}, {name}: {reported[name]} reported, {claimed[name]} claimed, {guessed[name]} guessed"


def counters_balance(world: MixedWorld) -> Iterator[str]:
    """At the end nothing is pending, every request is counted under its end, and every call is counted."""
    for number, stats in enumerate(world.stats):
        sent = [each for each in _sent(world) if _batcher_of(world, each) == number]
        callers = [caller for caller in world.callers if caller.call.batcher == number]
        replies = [reply for caller in callers if caller.call.what != "enqueue" for reply in caller.replies]
        relayed = sum(getattr(each, "what", "") == "forward" for each in sent)
        figures = {
            "ends": (stats.answered + stats.failed + stats.cancelled, stats.items),
            "queued": (stats.queued, 0),
            "in_flight": (stats.in_flight, 0),
            "upstream_calls": (stats.upstream_calls, len(sent)),
            "forwarded": (stats.forwarded, relayed),
        }
        if not any(caller.call.what == "embed_many" for caller in callers):
            figures["answered"] = (stats.answered, len(replies))
        for name, (is_, should_be) in figures.items():
            if is_ != should_be:
                yield f"{name} of batcher {number} is {is_}, but should be {should_be}"


def all_is_returned(world: MixedWorld) -> Iterator[str]:
    """No slot, permit or place is kept in the end."""
    for number, batcher in enumerate(world.batchers):
        parts = batcher._parts
        kept = {"slots": parts.scheduler.in_use, "places": parts.admission.occupied, "flights": len(parts.in_flight)}
        for account in parts.accounts._kept.values():
            kept["on_wire"] = kept.get("on_wire", 0) + account.on_wire
            kept["begun"] = kept.get("begun", 0) + account.begun + account.backing_off
        if any(kept.values()):
            yield f"batcher {number} keeps {kept}"


def what_is_spooled_ends_once(world: MixedWorld) -> Iterator[str]:
    """Each request in the spool is answered rightly in the end, or a dead letter for good reasons."""
    carried = _carried(world)
    rows = {} if world.spool is None else world.spool.rows
    asked = {caller.name: caller for caller in world.callers if caller.call.what == "enqueue" and caller.name}
    for name in asked.keys() - {row.item.name.id for row in rows.values()}:
        yield f"{name} was put and is not there"
    for row in rows.values():
        name, caller = row.item.name.id, world.callers[int(row.item.name.id.split(" ")[1])]
        text = caller.call.texts[0]
        if row.state not in ("done", "dead"):
            yield f"{name} is {row.state}"
        if row.state == "done" and not row.answers:
            yield f"{name} is done without an answer"
        for answer in row.answers[:1]:
            try:
                reply = Answer.decode(answer).reply(str if caller.call.kind == "text" else type(right_output(text)))
            except mb.MalformedAnswer:
                yield f"{name} was answered {answer!r}"
                continue
            if reply.output != right_output(text) and not _is_cut(reply, text):
                yield f"{name} was answered {reply.output!r}"
        bad = row.lost + sum(attempt.how != "answered" or attempt.fault.kind != "ok" for attempt in carried[text])
        if row.state == "dead" and bad < Stage.ALONE + MAX_ALONE:
            yield f"{name} is dead, though it failed or was lost {bad} times only"


CHECKS: tuple[Check, ...] = (
    every_caller_ends,
    errors_are_deserved,
    answers_are_ones_own,
    outcomes_are_ones_own,
    deadlines_hold,
    only_equals_travel_together,
    calls_run_in_no_callers_context,
    equal_texts_share,
    slots_are_limits,
    quotas_are_kept,
    nothing_starves,
    budgets_are_kept,
    audits_come_after,
    look_ups_hold_briefly,
    usage_is_conserved,
    counters_balance,
    all_is_returned,
    what_is_spooled_ends_once,
)
