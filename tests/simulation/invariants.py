"""What must be true of every run, whatever happened in it. Each check yields a sentence for each breach it sees."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from simulation.scenario import REFUSALS, REPLY_TROUBLE
from simulation.upstream import ASKING, SLOWEST_SOUND_REPLY, right_output

import microbatch as mb
from microbatch.batching.call_state import USAGE_PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from simulation.upstream import Attempt
    from simulation.world import Item, World

    Check = Callable[[World], Iterator[str]]

GRANT_TURNS = 2
"""Turns of the loop between the step that composes a prompt and its attempt: the batch's task has to start."""


def breaches(world: World) -> list[str]:
    """Return what is wrong with *world*; nothing, if the library keeps its promises."""
    if world.stuck is not None:
        waiting = [item.text for item in world.items.values() if item.arrived is not None and item.ended is None]
        return [f"stuck: {world.stuck}; without an end: {waiting}; closed: {world.closed}"]
    found = [f"event loop: {complaint}" for complaint in world.loop.complaints]
    found += world.bulk_complaints
    return found + [f"{check.__name__}: {breach}" for check in CHECKS for breach in check(world)]


def _carried(world: World) -> dict[str, list[Attempt]]:
    carried: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in world.upstream.attempts:
        for text in attempt.texts:
            carried[text].append(attempt)
    return carried


def every_request_ends_once(world: World) -> Iterator[str]:
    """Whoever was accepted gets an answer, a typed error or its own cancellation; others an error that says why not."""
    for item in world.items.values():
        if item.bulk is not None and item.outcome is None and item.accepted is not None and item.settled is None:
            yield f"{item.text} was accepted from a map and never settled"
        if item.bulk is None and item.outcome is None and item.arrived is not None:
            yield f"{item.text} has no outcome"
        if item.outcome == "cancelled" and item.cancel is None:
            yield f"{item.text} was cancelled by nobody"
        error = item.error
        if item.ask.misuse is not None and (item.accepted is not None or item.reply is not None):
            yield f"{item.text} is misuse and was accepted"
        if error is None or (item.ask.misuse is not None and isinstance(error, mb.ConfigError | ZeroDivisionError)):
            continue
        if item.accepted is not None and not isinstance(error, mb.RequestFailed):
            yield f"{item.text} was accepted and ended with {error!r}"
        if item.accepted is None and not isinstance(error, mb.BatcherClosed | mb.Overloaded | mb.DeadlineExceeded):
            yield f"{item.text} was not accepted and ended with {error!r}"


def errors_are_deserved(world: World) -> Iterator[str]:
    """Each error is explained by the clock, a close, or what happened to the last attempt that carried the request."""
    carried = _carried(world)
    locked_out = {type(attempt.raised) for attempt in world.upstream.attempts}
    for item in world.items.values():
        error = item.error
        if error is None or item.ask.misuse is not None:
            continue
        ended = item.settled if item.settled is not None else item.ended
        attempts = [attempt for attempt in carried[item.text] if attempt.turn <= item.turn_settled]
        surely = sum(attempt.turn < item.turn_settled for attempt in attempts)
        if item.accepted is not None and not surely <= error.attempts <= len(attempts):
            yield f"{item.text}: {error!r} tells of {error.attempts} attempts, but there were {len(attempts)}"
        if isinstance(error, mb.DeadlineExceeded):
            if item.ask.timeout is None or ended != _begun(item) + item.ask.timeout:
                yield f"{item.text} ended by its deadline at {ended}, begun {_begun(item)}, timeout {item.ask.timeout}"
        elif isinstance(error, mb.ShutDown):
            if world.closed is None or world.closed[1] is None or ended < sum(world.closed):
                yield f"{item.text} was shut down at {ended}, but the close was {world.closed}"
        elif isinstance(error, mb.BatcherClosed):
            if world.closed is None or ended < world.closed[0]:
                yield f"{item.text} was sent away from an open batcher"
        elif isinstance(error, mb.Overloaded):
            if world.scenario.policy.get("when_full") not in ("reject", "bypass"):
                yield f"{item.text} was not let in, but may wait"
        elif isinstance(error, mb.BudgetExceeded):
            if not world.scenario.budget:
                yield f"{item.text} ended with {error!r} without a budget"
        elif isinstance(error, mb.AuthFailed | mb.QuotaExhausted) and type(error) in locked_out:
            continue  # known to be hopeless for now, so the endpoint was not asked
        else:
            last = attempts[-1] if attempts else None
            excuses = last.excuses[last.combined] if last is not None else ()
            if type(error) not in excuses:
                known = last and (last.number, last.fault.kind, last.how)
                yield f"{item.text} ended with {error!r}, which its last attempt does not explain: {known}"


def answers_are_ones_own(world: World) -> Iterator[str]:
    """Every answer is the right one to the caller's own text, and its reply describes the call that gave it."""
    carried = _carried(world)
    for item in world.items.values():
        reply = item.reply
        if reply is None:
            continue
        right = right_output(item.text)
        # A single text reply is the caller's as it is: cut short by its own limit, or whatever a request with tools got.
        partly = reply.finish_reason == "length" or item.ask.alone
        if reply.output != right and not (reply.batch_size == 1 and partly and right.startswith(reply.output)):
            yield f"{item.text} was answered {reply.output!r}"
        said = [attempt for attempt in carried[item.text] if attempt.how != "failed" or item.text in attempt.said]
        if not any(len(attempt.texts) == reply.batch_size for attempt in said):
            yield f"{item.text} has an answer, but no attempt gave it"


def errors_are_ones_own(world: World) -> Iterator[str]:
    """No two callers get the same exception object."""
    errors = [item.error for item in world.items.values() if item.error is not None]
    if len({id(error) for error in errors}) != len(errors):
        yield "callers share an exception"


def finished_answers_stand(world: World) -> Iterator[str]:
    """A sound answer is handed out: at once if it comes in order, not after prose, and early answers are wanted, else at the end.

    Early answers are not wanted for calls that carry bulk work only, which are streamed so that they can be cut.
    """
    early = world.scenario.fallback.get("resolve") != "verified" and not world.scenario.fallback.get("canary")
    for attempt in world.upstream.attempts:
        in_order = early and attempt.combined and attempt.call.stream and attempt.fault.kind in _IN_ORDER
        in_order = in_order and any(world.items[text].bulk is None for text in attempt.texts)
        in_order = in_order and not _drafted(world, attempt)
        sound = _SOUND if attempt.canary is None else _SOUND_WITH_CANARY
        at_the_end = attempt.how == "answered" and attempt.fault.kind in sound
        if attempt.call.max_tokens is not None or not (in_order or at_the_end):
            continue
        for text, said in attempt.said.items():
            settled, due = world.items[text].settled, said if in_order else attempt.ended
            if settled is None or settled > due:
                yield f"{text} was answered by attempt {attempt.number}, due at {due}, but settled at {settled}"


def _drafted(world: World, attempt: Attempt) -> bool:
    """Return whether an earlier reply of the lane of *attempt* answered twice, after which none of its answers is given early."""
    lane = world.items[attempt.texts[0]].lane
    return any(
        other.fault.kind == "duplicate" and other.number < attempt.number and world.items[other.texts[0]].lane == lane
        for other in world.upstream.attempts
    )


_IN_ORDER = frozenset({"ok", "truncated", "cut", "reset", "stream_error", "timeout", "hang"})
_SOUND = frozenset({"ok", "prose", "truncated", "short", "reordered", "wrong_type", "foreign"})
"""Kinds of replies whose right answers are all to be trusted, in order or at their end."""
_SOUND_WITH_CANARY = frozenset({"ok", "prose", "reordered", "wrong_type"})
"""Those that are sure to answer the canary, too."""


def canaries_watch(world: World) -> Iterator[str]:
    """Each combined call carries a canary if it is to, and a reply that gets it wrong answers nobody."""
    for attempt in world.upstream.attempts:
        if (attempt.canary is not None) != (attempt.combined and bool(world.scenario.fallback.get("canary"))):
            yield f"attempt {attempt.number} has a canary where none is wanted, or none where one is"


def calls_run_in_no_callers_context(world: World) -> Iterator[str]:
    """The endpoint never sees a caller's context variables."""
    for attempt in world.upstream.attempts:
        if attempt.whose is not None:
            yield f"attempt {attempt.number} ran in the context of {attempt.whose}"


def only_equals_travel_together(world: World) -> Iterator[str]:
    """What shares a prompt is equal in everything but the last message, and the call carries just that."""
    for attempt in world.upstream.attempts:
        items = [world.items[text] for text in attempt.texts]
        if len({item.lane for item in items}) > 1:
            yield f"attempt {attempt.number} mixes {[item.text for item in items]}"
        if len(set(attempt.texts)) != len(attempt.texts):
            yield f"attempt {attempt.number} carries a request twice"
        ask, call = items[0].ask, attempt.call
        if dict(call.headers) != dict(ask.headers) or [dict(part)["content"] for part in call.messages[:-1]] != [
            ask.system
        ]:
            yield f"attempt {attempt.number} has headers or messages that are not its callers'"
        if dict(call.params) != ({"seed": 1} if ask.alone else {}):
            yield f"attempt {attempt.number} has params {call.params}"


def the_gone_are_not_sent(world: World) -> Iterator[str]:
    """A request that was unsent when it ended is in no call composed later; nothing is sent for the gone alone."""
    carried = _carried(world)
    for attempt in world.upstream.attempts:
        items = [world.items[text] for text in attempt.texts]
        for item in items:
            if world.scenario.budget or (carried[item.text][0] is not attempt and _held_up(world)):
                continue  # what asks again is composed first, and may then wait for its permit; any call may wait for its charge
            gone = item.cancel
            late = gone is not None and (attempt.started > gone[0] or attempt.turn > gone[1] + GRANT_TURNS)
            if attempt.first and (late or (item.settled is not None and attempt.started > item.settled)):
                yield f"attempt {attempt.number} carries {item.text}, which had ended before"
        if all(item.settled is not None and item.settled < attempt.started for item in items):
            yield f"attempt {attempt.number} is for nobody"


def calls_for_nobody_are_cancelled(world: World) -> Iterator[str]:
    """When the last caller of a call has gone, the call is cancelled in that instant, or is read on for its usage a moment."""
    for attempt in world.upstream.attempts:
        items = [world.items[text] for text in attempt.texts]
        if any(item.settled is None for item in items):
            continue
        gone = max(item.settled for item in items)
        answered = any(item.settled == gone and item.text in attempt.said for item in items)
        patience = attempt.fault.stubborn + (USAGE_PATIENCE if answered else 0.0)
        if attempt.ended is None or attempt.ended > gone + patience:
            yield f"attempt {attempt.number} went on until {attempt.ended}, but its last caller went at {gone}"


def neighbours_are_unharmed(world: World) -> Iterator[str]:
    """A call with a live caller is cancelled by nothing but a close, or by a reply that goes on past its end."""
    for attempt in world.upstream.attempts:
        if attempt.how != "cancelled" or attempt.past_the_end:
            continue
        alive = [
            text
            for text in attempt.texts
            if world.items[text].settled is None or world.items[text].settled > attempt.ended
        ]
        closing = world.closed is not None and world.closed[1] is not None and attempt.ended >= sum(world.closed)
        if alive and not closing:
            yield f"attempt {attempt.number} was cancelled although {alive} waited"


def refusals_blame_only_the_culprits(world: World) -> Iterator[str]:
    """A refusal that one item may be to blame for ends nobody who was not refused alone, and halves what it splits."""
    carried = _carried(world)
    for text, attempts in carried.items():
        sizes = [
            len(attempt.texts)
            for attempt in attempts
            if attempt.how == "failed" and attempt.fault.kind in REFUSALS and attempt.raised is not None
        ]
        shrunk = pairwise(sizes)
        if any(smaller > (larger + 1) // 2 for larger, smaller in shrunk):
            yield f"{text} was refused in calls of {sizes}, which are no halves"


def closing_ends_everything(world: World) -> Iterator[str]:
    """After `aclose` no task is left, all has ended, and it took no longer than its grace."""
    yield from world.leftover
    if world.closed is None or world.shut_call is None:
        return
    start, grace = world.closed
    begun, returned = world.shut_call
    if grace is not None and returned > max(begun, start + grace):
        yield f"aclose at {begun} returned at {returned}, but the first one was {world.closed}"
    ends = [item.settled for item in world.items.values() if item.settled is not None]
    busy = max([begun, start, *ends, *(attempt.ended for attempt in world.upstream.attempts)])
    if returned > busy:
        yield f"aclose returned at {returned}, but all was quiet from {busy} on"
    for item in world.items.values():
        if item.accepted is not None and (item.settled is None or item.settled > returned):
            yield f"{item.text} ended at {item.settled}, after the close at {returned}"


def deadlines_hold(world: World) -> Iterator[str]:
    """A submit with a timeout ends when it is over at the latest, and its call is told how long somebody will wait."""
    for item in world.items.values():
        limit = item.ask.timeout
        start = _begun(item)
        if limit is None or start is None:
            continue
        ended = item.settled if item.bulk is not None else item.ended
        if ended is not None and ended > start + limit:
            yield f"{item.text} ended at {ended}, begun {start} with timeout {limit}"
    for attempt in world.upstream.attempts:
        items = [world.items[text] for text in attempt.texts]
        ends = [None if item.timeout is None else item.accepted + item.timeout for item in items]
        due = None if None in ends else max(ends) - attempt.started
        if attempt.first and attempt.timeout != due:
            yield f"attempt {attempt.number} may take {attempt.timeout}, but its callers wait {due}"


def _begun(item: Item) -> float | None:
    """Return when the time of *item* began: that of what `map` takes in begins when it is accepted."""
    return item.arrived if item.bulk is None else item.accepted


def lanes_keep_their_order(world: World) -> Iterator[str]:
    """Requests of a lane are sent, and those of one priority and tenant let in, in order of arrival."""
    lanes: dict[object, list[Item]] = defaultdict(list)
    carried = _carried(world)
    # A request that bypasses a full queue, is too long for a batch, or goes alone because combining does not pay, overtakes; so does
    # a call that fits what is left of a budget, where another waits.
    policy = world.scenario.policy
    overtaking = policy.get("when_full") == "bypass" or "max_batch_tokens" in policy or "merge" in policy
    overtaking |= world.stats.lanes_parted > 0 or bool(world.scenario.budget)
    overtaking |= any(attempt.fault.kind in ("too_large", "too_long") for attempt in world.upstream.attempts)
    for item in world.items.values():
        if item.accepted is not None and carried[item.text] and not overtaking:
            lanes[item.lane].append(item)
    for items in lanes.values():
        items.sort(key=lambda item: item.place)
        for earlier, later in pairwise(items):
            if carried[earlier.text][0].started > carried[later.text][0].started:
                yield f"{later.text} was sent before {earlier.text}"
    let_in = [item for item in world.items.values() if item.accepted is not None and item.bulk is None]
    let_in.sort(key=lambda item: item.arrived)
    for _, line in _by(let_in, lambda item: (item.ask.priority, item.ask.tenant)):
        latest = 0.0
        for _, items in _by(line, lambda item: item.arrived):
            if any(item.accepted < latest for item in items):
                yield f"{[item.text for item in items]} were let in before a caller of the same line who came earlier"
            latest = max(latest, *(item.accepted for item in items))


def _by(items: list[Item], key: Callable[[Item], object]) -> Iterator[tuple[object, list[Item]]]:
    groups: dict[object, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    yield from groups.items()


def lanes_wait_for_company(world: World) -> Iterator[str]:
    """With `idle="wait"` a batch that is not full leaves when one of its requests has waited long enough, and not before."""
    policy = world.scenario.policy
    tight = "max_batch_tokens" in policy or any(item.ask.max_tokens for item in world.items.values())
    # A lane makes smaller batches after replies that were damaged or too long.
    shrunk = any(attempt.fault.kind in _SHRINKING for attempt in world.upstream.attempts) or _held_up(world)
    hurried = world.scenario.flushes or world.scenario.bulks or policy.get("when_full") == "bypass"
    if policy["idle"] != "wait" or tight or shrunk or hurried:
        return
    carried = _carried(world)
    sent: set[str] = set()
    for attempt in world.upstream.attempts:
        fresh = not sent.intersection(attempt.texts)
        sent.update(attempt.texts)
        items = [world.items[text] for text in attempt.texts]
        ask = items[0].ask
        if not fresh or ask.alone or ask.priority == "high" or len(items) >= policy["max_batch_size"]:
            continue
        if world.closed is not None and attempt.started >= world.closed[0]:
            continue
        company = [item for item in world.items.values() if item.lane == items[0].lane and item.accepted is not None]
        # A batch that was full when it fell due leaves with fewer if a caller goes in that very moment.
        if any(item.settled == attempt.started for item in company):
            continue
        # A lane that owes a flush and waits for a slot keeps owing it when the one who was due leaves meanwhile.
        owed = [
            item for item in company if attempt.started >= _due(world, item) and _unsent_when_due(world, item, carried)
        ]
        if not owed:
            yield f"attempt {attempt.number} left at {attempt.started}, when nobody in it was due"


def _held_up(world: World) -> bool:
    """Whether requests waited for a permit or a probe, or unsent during an outage, or went alone because combining did not pay."""
    if any(isinstance(attempt.raised, mb.AuthFailed | mb.QuotaExhausted) for attempt in world.upstream.attempts):
        return True
    if sum(attempt.how == "failed" for attempt in world.upstream.attempts) >= _OUTAGE_CALLS:
        return True
    asked = any(attempt.fault.kind in ASKING and attempt.fault.retry_after for attempt in world.upstream.attempts)
    limited = bool(world.scenario.rate_limit or world.scenario.budget)
    return asked or limited or world.stats.lanes_parted > 0 or "merge" in world.scenario.policy


_OUTAGE_CALLS = 8
"""Calls of an account that have to back off for its requests to wait unsent."""

_SHRINKING = frozenset({*REPLY_TROUBLE, "too_large", "too_long"})


def _due(world: World, item: Item) -> float:
    """Return when the lane of *item* must leave for its sake."""
    policy = world.scenario.policy
    if item.ask.alone or item.ask.priority == "high":
        return item.accepted
    wait = policy["low_max_wait"] if item.ask.priority == "low" else policy["max_wait"]
    return item.accepted + (wait if item.timeout is None else min(wait, item.timeout / 2))


def _unsent_when_due(world: World, item: Item, carried: dict[str, list[Attempt]]) -> bool:
    due, attempts = _due(world, item), carried[item.text]
    return attempts[0].started >= due if attempts else item.settled is None or item.settled >= due


def nobody_waits_beside_free_slots(world: World) -> Iterator[str]:
    """Where slots cannot run out, every request is sent when it is due, or, if it may be, when its lane is idle."""
    accepted = [item for item in world.items.values() if item.accepted is not None and item.bulk is None]
    if len(world.items) > world.scenario.policy["max_concurrent_batches"] or _held_up(world):
        return
    carried = _carried(world)
    for item in accepted:
        attempts, due = carried[item.text], _due(world, item)
        # In a lane where bulk work waits too, a submit waits for its time.
        shared = any(other.bulk is not None and other.lane == item.lane for other in world.items.values())
        if world.scenario.policy["idle"] == "flush" and item.ask.priority != "low" and not shared:
            due = min(due, _idle_from(world, item, carried))
        if item.ask.priority == "low":
            due = max(due, _proven(world, item))
        if (attempts and attempts[0].started > due) or (not attempts and (item.settled is None or item.settled > due)):
            yield f"{item.text} was due at {due}, but was sent at {attempts[0].started if attempts else None}"


def no_slot_idles(world: World) -> Iterator[str]:
    """While a slot is free, and its account has not begun as many calls as it may, a request that is due is sent."""
    slots = world.scenario.policy["max_concurrent_batches"]
    if _held_up(world):
        return
    carried, attempts = _carried(world), world.upstream.attempts
    calls: dict[object, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        calls[attempt.key].append(attempt)
    begun: dict[object, list[tuple[float, float]]] = defaultdict(list)
    for own in calls.values():
        # A call is over when its last attempt is, or, if that was to be repeated, when its last caller has left.
        ends = [world.items[text].settled or 0.0 for text in own[-1].texts if carried[text][-1] is own[-1]]
        begun[tuple(own[0].call.headers.items())].append((own[0].started, max([own[-1].ended, *ends])))
    instants = sorted({instant for attempt in attempts for instant in (attempt.started, attempt.ended)})
    for item in world.items.values():
        if item.accepted is None or item.bulk is not None:
            continue
        due = _due(world, item)
        if item.ask.priority == "low" or any(
            other.bulk is not None and other.lane == item.lane for other in world.items.values()
        ):
            due = max(due, _proven(world, item))
        sent = carried[item.text][0].started if carried[item.text] else item.settled
        for begin, end in pairwise(
            [due, *(instant for instant in instants if due < instant < (sent or due)), sent or due]
        ):
            moment = (begin + end) / 2
            on_wire = sum(attempt.started <= moment < attempt.ended for attempt in attempts)
            own = sum(start <= moment < over for start, over in begun[item.ask.headers])
            if begin < end and on_wire < slots and own < slots:
                yield f"{item.text} was due at {due} and sent at {sent}, but at {moment} only {on_wire} calls were on the wire"
                break


def _proven(world: World, item: Item) -> float:
    """Return when the lane of *item* had its first reply of use, until when few of its calls are made at once if it is bulk work."""
    good = [
        attempt.ended
        for attempt in world.upstream.attempts
        if len(attempt.texts) > 1
        and world.items[attempt.texts[0]].lane == item.lane
        and attempt.how == "answered"
        and attempt.fault.kind in _SOUND
    ]
    return min(good, default=math.inf)


def _idle_from(world: World, item: Item, carried: dict[str, list[Attempt]]) -> float:
    """Return the first instant since its acceptance at which nothing else of the lane of *item* is under way."""
    spans: dict[object, tuple[float, float]] = {}
    for attempt in world.upstream.attempts:
        if item.text not in attempt.texts and world.items[attempt.texts[0]].lane == item.lane:
            begun, _ = spans.get(attempt.key, (attempt.started, 0.0))
            # A call that is to be repeated is under way until then, though no attempt may come of it.
            failed = attempt.how == "failed"
            ends = [world.items[text].settled for text in attempt.texts if failed and carried[text][-1] is attempt]
            spans[attempt.key] = (begun, max([attempt.ended, *filter(None, ends)]))
    idle = item.accepted
    for begun, ended in sorted(spans.values()):
        if begun <= idle:
            idle = max(idle, ended)
    return idle


def slots_and_room_are_limits(world: World) -> Iterator[str]:
    """No more calls are on the wire, or begun by one account, nor more requests pending, than the policy allows."""
    policy = world.scenario.policy
    slots = policy["max_concurrent_batches"]
    on_wire = [
        change for attempt in world.upstream.attempts for change in ((attempt.started, 1, 1), (attempt.ended, 0, -1))
    ]
    if peak(on_wire) > slots + slots // 4:
        yield f"{peak(on_wire)} attempts at once"
    calls: dict[object, list[Attempt]] = defaultdict(list)
    for attempt in world.upstream.attempts:
        calls[attempt.key].append(attempt)
    begun: dict[object, list[tuple[float, int, int]]] = defaultdict(list)
    for attempts in calls.values():
        account = tuple(attempts[0].call.headers.items())
        begun[account] += [(attempts[0].started, 1, 1), (attempts[-1].ended, 0, -1)]
    for account, changes in begun.items():
        if peak(changes) > slots + slots // 4:
            yield f"{peak(changes)} calls begun and not finished with {account}"
    pending = [item for item in world.items.values() if item.accepted is not None and item.settled is not None]
    for urgent, most in ((False, policy.get("max_queued", 10_000)), (True, _most_pending(world))):
        changes = [
            change
            for item in pending
            if urgent or item.ask.priority != "high"
            for change in ((item.accepted, 1, 1), (item.settled, 0, -1))
        ]
        if (urgent or policy.get("when_full") != "bypass") and peak(changes) > most:
            yield f"{peak(changes)} requests pending"


def _most_pending(world: World) -> int:
    """Return the most requests that may be pending, the reserve of high priority and those that bypass a full queue included."""
    policy = world.scenario.policy
    most = policy.get("max_queued", 10_000)
    return most + max(1, most // 50) + (policy["max_concurrent_batches"] if policy.get("when_full") == "bypass" else 0)


def the_overdraft_is_for_the_few(world: World) -> Iterator[str]:
    """With all slots in use, only an account with nothing on the wire and one high-priority call per account may start."""
    slots = world.scenario.policy["max_concurrent_batches"]
    attempts = world.upstream.attempts
    for attempt in attempts:
        # What was on the wire before this instant and after it: at one instant, what ends may come before what begins.
        others = [other for other in attempts if other.started < attempt.started < other.ended]
        if len(others) < slots:
            continue
        account = tuple(attempt.call.headers.items())
        own = [other for other in others if tuple(other.call.headers.items()) == account]
        high = [other for other in own if _is_high(world, other)]
        if not _is_high(world, attempt) and len(own) > min(1, len(high)):
            yield f"attempt {attempt.number} started beside {len(others)} others, {len(own)} of its own account"


def _is_high(world: World, attempt: Attempt) -> bool:
    return any(world.items[text].ask.priority == "high" for text in attempt.texts)


def peak(changes: list[tuple[float, int, int]]) -> int:
    """Return the highest sum of *changes*; at one instant, what ends comes before what begins."""
    peak = level = 0
    for _, _, change in sorted(changes):
        level += change
        peak = max(peak, level)
    return peak


def usage_is_conserved(world: World) -> Iterator[str]:
    """The callers' shares and what nobody claims add up to what the endpoint reported."""
    stats, carried = world.stats, _carried(world)
    reported = Counter[str]()
    for attempt in world.upstream.attempts:
        reported.update(tokens_of(attempt.reported))
    if tokens_of(mb.Usage(stats.prompt_tokens, stats.completion_tokens, stats.cached_tokens)) != dict(
        reported or tokens_of(None)
    ):
        yield f"booked were {stats.prompt_tokens} and {stats.completion_tokens}, but reported {dict(reported)}"
    claimed, guessed = Counter(tokens_of(stats.unclaimed)), Counter[str]()
    mixed = False
    for item in world.items.values():
        reply = item.reply
        if reply is None:
            continue
        (guessed if reply.usage.estimated else claimed).update(tokens_of(reply.usage))
        mixed |= reply.usage.estimated and any(attempt.reported is not None for attempt in carried[item.text])
    for name, total in (reported or tokens_of(None)).items():
        # An estimate holds the exact shares of earlier calls, which cannot be told apart from outside.
        if not claimed[name] <= total <= claimed[name] + (guessed[name] if mixed else 0):
            yield f"{name}: {total} reported, {claimed[name]} accounted for, {guessed[name]} estimated"


def tokens_of(usage: mb.Usage | None) -> dict[str, int]:
    usage = usage or mb.Usage()
    return {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens, "cached": usage.cached_tokens}


def counters_balance(world: World) -> Iterator[str]:
    """At the end nothing is pending, every accepted request is counted under its end, and every attempt is counted."""
    stats = world.stats
    accepted = [item for item in world.items.values() if item.accepted is not None]
    # Who is cancelled in the very moment of its error has failed for the batcher, which cannot know.
    gone = [item for item in accepted if item.outcome in ("cancelled", "unfetched") and not _failed(item)]
    figures = {
        "items": (stats.items, len(accepted)),
        "ends": (stats.answered + stats.failed + stats.cancelled, len(accepted)),
        "answered": (stats.answered, sum(item.reply is not None for item in accepted)),
        "cancelled": (stats.cancelled, len(gone)),
        "queued": (stats.queued, 0),
        "in_flight": (stats.in_flight, 0),
        "upstream_calls": (stats.upstream_calls, len(world.upstream.attempts)),
    }
    for name, (is_, should_be) in figures.items():
        if is_ != should_be:
            yield f"{name} is {is_}, but should be {should_be}"


def _failed(item: Item) -> bool:
    return not item.ticket.future.cancelled() and item.ticket.future.exception() is not None


def retries_keep_to_their_budget(world: World) -> Iterator[str]:
    """No call is attempted too often, all retries fit the budget, and none comes sooner than the endpoint asked."""
    calls: dict[object, list[Attempt]] = defaultdict(list)
    for attempt in world.upstream.attempts:
        calls[attempt.key].append(attempt)
    retry = world.scenario.retry
    firsts, retries = Counter[object](), Counter[object]()
    for attempts in calls.values():
        account = tuple(attempts[0].call.headers.items())
        firsts[account] += 1
        retries[account] += len(attempts) - 1
    for account, made in retries.items():
        if made > retry["budget"] * firsts[account] + retry["reserve"]:
            yield f"{made} retries of {firsts[account]} calls"
    for attempts in calls.values():
        if len(attempts) > retry["max_attempts"]:
            yield f"{len(attempts)} attempts of one call"
        for before, after in pairwise(attempts):
            used = [
                text
                for text in before.said
                if world.items[text].reply is not None and world.items[text].turn_settled <= before.turn_ended
            ]
            if used:
                yield f"attempt {after.number} repeats {before.number}, which has answered {used}"
            asked = (before.fault.retry_after or 0.0) if before.fault.kind in ASKING else 0.0
            if after.started < before.ended + asked:
                yield f"attempt {after.number} came at {after.started}, {asked} s were asked for at {before.ended}"


def quotas_are_kept(world: World) -> Iterator[str]:
    """In no minute are there more attempts with one key than the limit allows."""
    most = world.scenario.rate_limit.get("rpm")
    if most is None:
        return
    accounts: dict[object, list[float]] = defaultdict(list)
    for attempt in world.upstream.attempts:
        accounts[tuple(attempt.call.headers.items())].append(attempt.started)
    for starts in accounts.values():
        for first, last in zip(starts, starts[most:], strict=False):
            if last - first < _MINUTE:
                yield f"more than {most} attempts between {first} and {last}"


_MINUTE = 60.0


def budgets_are_kept(world: World) -> Iterator[str]:
    """Every attempt is charged once, within the budget, and corrected once, to what it has cost."""
    yield from world.overspent
    if not world.scenario.budget:
        return
    if len(world.charges) != len(world.upstream.attempts):
        yield f"{len(world.charges)} charges for {len(world.upstream.attempts)} attempts"
        return
    spent = 0
    for charge, attempt in zip(world.charges, world.upstream.attempts, strict=True):
        tenant = world.items[attempt.texts[0]].ask.tenant if world.scenario.budget["per"] == "tenant" else None
        if charge.counter.tenant != tenant:
            yield f"attempt {attempt.number} of {tenant} was charged to {charge.counter.tenant}"
        if attempt.reported is not None:
            spent += attempt.reported.prompt_tokens + attempt.reported.completion_tokens
        elif not isinstance(attempt.raised, _FREE):
            spent += charge.tokens
    if world.stats.budget.spent_tokens != spent:
        yield f"{world.stats.budget.spent_tokens} tokens are counted, but {spent} were spent"
    for counter in {id(charge.counter): charge.counter for charge in world.charges}.values():
        if counter.calls or counter.held_tokens or counter.held_usd or counter.waiting:
            yield f"the budget of {counter.tenant} still holds {counter}"


_FREE = (mb.AuthFailed, mb.BadRequest, mb.ContextTooLong, mb.QuotaExhausted, mb.RateLimited)
"""Refusals, which cost nothing."""


def all_is_well_in_the_end(world: World) -> Iterator[str]:
    """Once the endpoint answers as it should and nobody asks any more, all that is pending ends in bounded time."""
    scenario = world.scenario
    rough = [attempt.ended for attempt in world.upstream.attempts if attempt.number < len(scenario.faults)]
    asks = [ask.at for ask in scenario.asks] + [bulk.at for bulk in scenario.bulks]
    sources = [
        sum(bulk.gaps or ()) + len(bulk.asks) * bulk.pause + scenario.policy["low_max_wait"] for bulk in scenario.bulks
    ]
    quiet = max([0.0, *rough, *asks]) + sum(sources)
    calls = sum(attempt.started > quiet for attempt in world.upstream.attempts)
    retry, pauses = scenario.retry, [fault.retry_after or 0.0 for fault in scenario.faults]
    back_off = min(retry.get("cap", 20.0), retry.get("base", 0.5) * 2.0 ** retry["max_attempts"]) + max([0.0, *pauses])
    # Where room is short, those who are let in late wait for company then.
    rounds = 1 + len(world.items) // scenario.policy.get("max_queued", 10_000)
    waits = rounds * (scenario.policy["low_max_wait"] + scenario.policy["max_wait"])
    if scenario.rate_limit:
        waits += 2 * _MINUTE * (1 + len(world.upstream.attempts) // scenario.rate_limit.get("rpm", 20))
    bound = quiet + waits + back_off + (calls + 1) * (SLOWEST_SOUND_REPLY + USAGE_PATIENCE)
    if world.finished > bound:
        yield f"all was quiet from {quiet} on, but the end came at {world.finished}"


CHECKS: tuple[Check, ...] = (
    every_request_ends_once,
    errors_are_deserved,
    answers_are_ones_own,
    errors_are_ones_own,
    finished_answers_stand,
    canaries_watch,
    calls_run_in_no_callers_context,
    only_equals_travel_together,
    the_gone_are_not_sent,
    calls_for_nobody_are_cancelled,
    neighbours_are_unharmed,
    refusals_blame_only_the_culprits,
    closing_ends_everything,
    deadlines_hold,
    lanes_keep_their_order,
    lanes_wait_for_company,
    nobody_waits_beside_free_slots,
    no_slot_idles,
    slots_and_room_are_limits,
    the_overdraft_is_for_the_few,
    usage_is_conserved,
    counters_balance,
    retries_keep_to_their_budget,
    quotas_are_kept,
    budgets_are_kept,
    all_is_well_in_the_end,
)
