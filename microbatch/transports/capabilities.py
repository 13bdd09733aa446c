"""The features that each endpoint supports, learned from its refusals, so that each refusal is paid for once.

Structured output is a ladder of three rungs: a JSON schema that the endpoint enforces, JSON without a schema, plain text. A refusal
about the response format steps down one rung; after an hour one call tries the rung above again. Beside the rung, the optional
fields that an endpoint refuses, its name of `max_tokens` and the place of a hint are remembered.

A refusal that does not say what it is about may be about the form. So a call whose form was never answered is tried one rung lower,
without `stream_options`, without a stream, and at last in the barest form: if the refusal speaks of some field, or if the call
carries one request. A batch is halved first, since one of its requests is the likely cause. If several batches in a row are refused
without a reason while other calls are answered, as its requests are alone, the form is at fault, and the next batch is tried so;
if that was in vain, only after four times as many.
What the endpoint answers is remembered.

The transport asks for a `Plan` before each attempt and reports how it went; an attempt that is cancelled or fails for other reasons
needs no report.
"""

from __future__ import annotations

import enum
import hashlib
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary

import msgspec

from microbatch.errors import BadRequest, ServerError
from microbatch.lru import LRU
from microbatch.transports.bound_refusals import lower, read_refusal
from microbatch.transports.field_refusals import MAX_TOKENS_NAMES, OPTIONAL, STATUSES, names_system, read_fields
from microbatch.transports.first_form import FirstForm

if TYPE_CHECKING:
    from microbatch.errors import StatusError
    from microbatch.messages import TokenLimits
    from microbatch.protocols import ChatCall
    from microbatch.transports.error_parsing import Fault

Endpoint: TypeAlias = tuple[str, str, bytes]
"""Address, model and a digest of the credentials."""

OF_PARAMS: Final = ("temperature", "prompt_cache_key")
"""Optional fields among the parameters of a call."""

CAPACITY: Final = 256
RETRY_RUNG_AFTER: Final = 3600.0  # seconds at a lower rung after which one call tries the rung above
MAX_SCHEMAS: Final = 64
_MAX_BOUNDS: Final = 3  # refusals of a call's bound after which it is sent without one

MAX_DOUBTS: Final = 3  # refusals in a row without a reason, after which a form no longer counts as one that works
_MAX_FRUITLESS: Final = 2


class Rung(enum.IntEnum):
    """The part of the reply's form that the endpoint is asked to enforce; a greater value is a lower rung."""

    JSON_SCHEMA = 0
    JSON_OBJECT = 1
    PLAIN = 2


Structured = Literal["json_schema", "json_object", "none"]
"""The names of the rungs for users."""


class _RungState(msgspec.Struct):
    """The rung in use, since when, the rungs on which an answer came, and refusals since the latest one that gave no reason."""

    rung: Rung = Rung.JSON_SCHEMA
    since: float = 0.0
    works: set[Rung] = msgspec.field(default_factory=set[Rung])
    doubts: int = 0
    doubted_at: int = 0  # answers of the endpoint before the first of them
    patience: int = MAX_DOUBTS

    def down_to(self, rung: Rung, now: float) -> None:
        if self.rung < rung:  # else a concurrent call has stepped there or further
            self.rung = rung
            self.since = now


class _Entry:
    """The features of one endpoint."""

    def __init__(self) -> None:
        self.general: _RungState = _RungState()
        self.schemas: LRU[bytes, _RungState] = LRU(MAX_SCHEMAS)
        self.plain: _RungState = _RungState()  # calls without a schema
        self.unsupported: set[str] = set()
        self.works: set[str] = set()  # fields that were sent with calls that were answered
        self.joins_hint: bool = False
        self.answers: int = 0
        self.fruitless: int = 0  # calls in a row that were refused in every form
        self.max_tokens_name: str = MAX_TOKENS_NAMES[0]
        self.streams_only: bool = False
        self.blameless: bool = False  # whether a call was refused in the same words without its bound as with it
        self.first: FirstForm = FirstForm()

    def schema(self, digest: bytes) -> _RungState:
        """Return the state of one schema, to be changed; that of no schema for b""."""
        return self.schemas.get_or_make(digest, _RungState) if digest else self.plain

    def deciding(self, digest: bytes) -> list[_RungState]:
        """Return the states that decide the rung of a schema: the lowest ones."""
        own = self.schemas.get(digest)
        if own is None or own.rung < self.general.rung:
            return [self.general]
        return [own] if own.rung > self.general.rung else [self.general, own]


_Form: TypeAlias = tuple[Rung, frozenset[str], bool]
"""The highest rung, the fields to leave out, and whether the hint is joined to another message."""

_AS_KNOWN: Final[_Form] = (Rung.JSON_SCHEMA, frozenset(), False)


class _CallHistory(msgspec.Struct):
    """Notes about one call, dropped with it."""

    floor: Rung = Rung.JSON_SCHEMA  # the highest rung to try, after a refusal that did not say why
    without: frozenset[str] = frozenset()  # fields to leave out, likewise
    joins_hint: bool = False  # likewise
    tried: bool = False  # whether another form was tried because of such a refusal
    forms: list[_Form] = []  # further ones to try
    rejected: bool = False  # whether the endpoint has rejected what its model wrote
    unanswered: bool = False
    bounds: int = 0  # refusals of its bound
    renamed: bool = False  # whether a name of `max_tokens` was refused


class Plan(msgspec.Struct, eq=False):
    """The form of one attempt.

    Attributes:
        rung: What to ask of the reply's form; None for a call without a schema.
        sent: The optional fields that are sent, under the endpoint's names: `stream`, `stream_options`, those of `OF_PARAMS` and one of
            `max_tokens` and `max_completion_tokens`.
        may_stream: Whether the reply may be streamed though that is not wanted.
        left_out: Fields that are not sent because the form is on trial.
        hint: How the call's hint is given: not at all, as a system message of its own, or joined to another message.
        live: Whether the same call is planned again after a refusal; else nothing is tried.
        lower: Whether the form is on trial: barer than known to be needed, because a refusal did not say what it is about.
        probe: Whether the rung is one higher than known to work, because an hour has passed.
        bound: The call's bound, if it is sent because the call has no `max_tokens`; else None.
    """

    call: ChatCall
    entry: _Entry
    rung: Rung | None
    sent: frozenset[str]
    digest: bytes = b""
    stream: bool = False
    may_stream: bool = False
    left_out: frozenset[str] = frozenset()
    hint: Literal["", "system", "joined"] = ""
    live: bool = False
    lower: bool = False
    probe: bool = False
    bound: int | None = None


class Capabilities:
    """The capabilities of the most recently used endpoints.

    With *structured* that is the rung of all calls, and nothing is learned about rungs.

    Attributes:
        answered: Whether any call was ever answered, so that the address is right.
    """

    def __init__(self, structured: Structured | None = None) -> None:
        self.answered: bool = False
        self._rung = None if structured is None else Rung(get_args(Structured).index(structured))
        self._entries: LRU[Endpoint, _Entry] = LRU(CAPACITY)
        self._histories: WeakKeyDictionary[ChatCall, _CallHistory] = WeakKeyDictionary()

    def plan(
        self, call: ChatCall, endpoint: Endpoint, now: float, *, stream: bool | None, may_stream: bool = False
    ) -> Plan:
        """Return how to make the next attempt at *call*, in view of how the last one at the same object ended.

        *stream* is None to leave the field out; with *may_stream* the reply may be streamed though it is not wanted.
        """
        entry = self._entries.get_or_make(endpoint, _Entry)
        if stream is False and may_stream and entry.streams_only:
            stream = True
        # False is sent as well: some proxies stream by default.
        wanted = set[str]() if stream is None else {"stream", "stream_options"} if stream else {"stream"}
        wanted.update(name for name in OF_PARAMS if name in call.params)
        history = self._histories.get(call)
        if call.unenforced:
            history = self._histories.setdefault(call, _CallHistory(floor=Rung.JSON_OBJECT))
        wanted -= entry.unsupported
        left_out = frozenset() if history is None else history.without & wanted
        wanted -= left_out
        if "stream" not in wanted:
            wanted.discard("stream_options")  # refused on its own
        bound = call.bound if call.max_tokens is None else None
        if call.max_tokens is not None or bound is not None:
            wanted.add(entry.max_tokens_name)
        plan = Plan(
            call, entry, None, frozenset(wanted), may_stream=may_stream, left_out=left_out, live=True, bound=bound
        )
        plan.stream = bool(stream) and "stream" in wanted
        plan.lower = bool(left_out)
        if call.schema is not None:
            self._choose_rung(plan, history, now)
            if call.hint is not None and plan.rung is not Rung.JSON_SCHEMA:
                on_trial = history is not None and history.joins_hint and not entry.joins_hint
                plan.hint = "joined" if entry.joins_hint or on_trial else "system"
                plan.lower = plan.lower or on_trial
        return plan

    def accepted(self, plan: Plan, now: float) -> None:
        """Note that the endpoint answered *plan*; only now is a form on trial, or a higher rung, remembered."""
        self.answered = True
        rung, entry, own = plan.rung, plan.entry, plan.entry.schema(plan.digest)
        entry.fruitless = own.doubts = 0
        entry.answers += 1
        entry.works |= plan.sent
        entry.unsupported |= plan.left_out - entry.works
        if rung is None:
            return
        if plan.lower:
            entry.joins_hint = entry.joins_hint or (plan.hint == "joined" and rung not in entry.general.works)
            # If other schemas were answered on the rung above, the endpoint does not support this one.
            above_works = any(works < rung for works in entry.general.works)
            (own if above_works else entry.general).down_to(rung, now)
        elif plan.probe:
            for state in (entry.general, own):
                state.rung = min(state.rung, rung)
        own.works.add(rung)
        entry.general.works.add(rung)
        entry.first.end()

    def untried(self, plan: Plan) -> FirstForm | None:
        """Return what *plan* has to wait for because its endpoint has answered no call with a schema yet; None for nothing."""
        first = plan.entry.first
        return None if first.over or plan.rung is None or self._rung is not None else first

    def learn(self, plan: Plan, fault: Fault, error: StatusError, now: float) -> StatusError:
        """Learn from *error*, read from *fault*, what the endpoint does not support.

        Returns:
            The error to raise, with `again` if the next attempt at the same call will be made differently.
        """
        if type(error) is ServerError and error.status == 500:  # noqa: PLR2004
            error.again = plan.hint == "system" and names_system(fault, plan.call) and self._join_hint(plan)
            if not error.again:
                self.failed(plan)
        elif type(error) in (BadRequest, ServerError) and error.status in STATUSES:
            error.again = self.refused(plan, fault, now)
        if error.again or plan.call.max_tokens is not None:
            return error
        limits = read_refusal(fault.text, error.status, plan.bound or 0)
        if limits is None:
            return error
        if not self.bound_refused(plan, limits):
            error.token_limits = limits if plan.bound is not None else None
            return error
        # With a lower bound, a refusal for credit need not stop all calls, nor one for tokens per minute slow them down.
        lowered = BadRequest(str(error))
        vars(lowered).update(vars(error), again=True, token_limits=limits, retry_after=None, should_retry=None)
        return lowered

    def refused(self, plan: Plan, fault: Fault, now: float) -> bool:
        """Learn from a refusal of the request; return whether the next attempt at the same call will be made differently."""
        entry, limit = plan.entry, plan.bound or plan.call.max_tokens or 0
        said = read_fields(fault, plan.sent, plan.call, streams=plan.stream, bound=limit)
        learned = [self._learn_field(plan, name) for name in said.fields]
        if any(learned) or (said.streams_only and self._learn_to_stream(plan)):
            return True
        if plan.hint == "system" and names_system(fault, plan.call):
            return self._join_hint(plan)
        if said.format and plan.rung not in (None, Rung.PLAIN) and self._rung is None:
            its_own = said.format == "schema" and plan.rung is Rung.JSON_SCHEMA
            # Where this schema alone is on a lower rung, nothing is known of the others.
            state = entry.schema(plan.digest) if its_own else entry.deciding(plan.digest)[0]
            self._step_down(plan, state, now)
            return True
        if said.bad_reply and plan.live:
            history = self._history(plan)
            first, history.rejected = not history.rejected, True
            return first  # as it is: the model writes something else the next time
        return plan.live and bool(said.unclear) and self._try_barer(plan, some=said.unclear == "some")

    def bound_refused(self, plan: Plan, limits: TokenLimits) -> bool:
        """Learn from a refusal that is about the length of the reply.

        The bound of *plan*'s call is lowered to what the endpoint allows, or set to None if it does not say how much, or if lowering
        did not help. Once a call was refused without its bound as well, refusals without a number no longer count.

        Returns:
            Whether the next attempt at the same call will be made differently.
        """
        history = self._history(plan)
        if plan.bound is None:
            plan.entry.blameless |= history.bounds > 0
            return False
        history.bounds += 1
        lowered = lower(plan.call, limits)
        if lowered is False or (lowered is None and plan.entry.blameless):
            return False
        if lowered is None or history.bounds >= _MAX_BOUNDS:
            plan.call.bound = None
        return True

    def failed(self, plan: Plan) -> None:
        """Learn from a plain 500, with which llama-cpp-python's server refuses a JSON schema, and SGLang's a system message.

        The next attempt at the same call goes one rung lower, with its hint joined to another message. Each call does so once, and not
        if its very schema has been answered on this rung before: then the endpoint is down, not refusing.
        """
        if plan.rung is None or self._rung is not None:
            return
        history = self._history(plan)
        if plan.lower:
            history.floor, history.without, history.joins_hint = _AS_KNOWN  # it was not the form, so go on as before
            return
        own, lowest = plan.entry.schemas.get(plan.digest), plan.rung is Rung.PLAIN
        if (lowest and plan.hint != "system") or history.tried or (own is not None and plan.rung in own.works):
            return
        history.tried, history.joins_hint = True, plan.hint == "system"
        history.floor = plan.rung if lowest else Rung(plan.rung + 1)

    def _is_doubtful(self, plan: Plan, *, some: bool) -> bool:
        """Note a refusal without a reason, of *some* field or of none; return whether the form may be at fault."""
        entry, own = plan.entry, plan.entry.schema(plan.digest)
        own.doubted_at = own.doubted_at if own.doubts else entry.answers
        own.doubts += 1
        if entry.fruitless >= _MAX_FRUITLESS:
            return False
        if own.doubts > own.patience and entry.answers > own.doubted_at:
            entry.works.clear()
            return True
        if not some and (plan.call.hint is None if plan.rung is not None else not plan.stream):
            return False  # a batch, or a text without anything that the caller has not asked for
        # A field that is not named may be one of this schema; else an answer for any schema shows that the form is sound.
        rungs = own.works if some else entry.general.works
        return not (plan.sent - set(MAX_TOKENS_NAMES) <= entry.works and (plan.rung is None or plan.rung in rungs))

    def _try_barer(self, plan: Plan, *, some: bool) -> bool:
        """Choose a barer form for the next attempt at a call that was refused without a reason; return whether there is one to try."""
        history = self._history(plan)
        if not history.tried:
            if not self._is_doubtful(plan, some=some):
                return False
            forms = _barer_forms(plan, some=some)
            if self._rung is not None:  # a declared rung stays
                forms = [form for form in forms if form[1] or (form[2] and plan.hint == "system")]
            history.tried, history.forms = True, forms
        if history.forms:
            history.floor, history.without, history.joins_hint = history.forms.pop(0)
            return True
        plan.entry.fruitless += plan.lower
        # A lane with many requests that are refused themselves looks like it.
        plan.entry.schema(plan.digest).patience *= 4
        history.floor, history.without, history.joins_hint = _AS_KNOWN
        return False

    def _join_hint(self, plan: Plan) -> bool:
        plan.entry.joins_hint = True
        self._history(plan)  # the next attempt is no probe
        return True

    def unanswered(self, plan: Plan) -> bool:
        """Note a reply without an answer; return whether an earlier attempt at the same call had one too."""
        history = self._history(plan)
        before, history.unanswered = history.unanswered, True
        return before

    def _choose_rung(self, plan: Plan, history: _CallHistory | None, now: float) -> None:
        plan.digest = hashlib.blake2b(msgspec.json.encode(plan.call.schema), digest_size=16).digest()
        if self._rung is not None:
            plan.rung = max(self._rung, Rung.JSON_OBJECT) if plan.call.json_object else self._rung
            return
        if plan.call.json_object:
            # Open objects are refused by strict mode and by Gemini. Never a probe of the rung above.
            plan.digest += b"object"
            plan.entry.schema(plan.digest).down_to(Rung.JSON_OBJECT, float("inf"))
        states = plan.entry.deciding(plan.digest)
        plan.rung = states[0].rung
        if history is not None:
            # Not a probe: a call that is refused for ever must come to an end.
            if history.floor > plan.rung:
                plan.rung, plan.lower = history.floor, True
        elif plan.rung and all(now - state.since >= RETRY_RUNG_AFTER for state in states):
            # The hour starts again here and not at the outcome, so that only one call tries, even if it never comes back.
            for state in states:
                state.since = now
            plan.rung, plan.probe = Rung(plan.rung - 1), True

    def _step_down(self, plan: Plan, state: _RungState, now: float) -> None:
        below = Rung((plan.rung or 0) + 1)
        if plan.lower:
            # Nothing is known yet of the rung above, which only failed; this call goes further down alone.
            self._history(plan).floor = below
            return
        if plan.probe:
            state.since = now
        self._history(plan)  # the next attempt is no probe
        state.down_to(below, now)

    def _learn_field(self, plan: Plan, name: str) -> bool:
        history = self._history(plan)
        if name in OPTIONAL:
            plan.entry.unsupported.add(name)
            plan.entry.works.discard(name)
            return True
        if history.renamed:
            return False  # the endpoint takes neither name
        history.renamed = True
        plan.entry.max_tokens_name = MAX_TOKENS_NAMES[1 - MAX_TOKENS_NAMES.index(name)]
        return True

    @staticmethod
    def _learn_to_stream(plan: Plan) -> bool:
        """Learn from a refusal of replies that are not streamed, such as DashScope's for reasoning models."""
        if plan.stream or not plan.may_stream:
            return False
        plan.entry.streams_only = True
        return "stream" not in plan.entry.unsupported

    def _history(self, plan: Plan) -> _CallHistory:
        return self._histories.setdefault(plan.call, _CallHistory())


def _barer_forms(plan: Plan, *, some: bool) -> list[_Form]:
    """Return the forms to try in place of that of *plan*; the one that lacks most is the last."""
    forms: list[_Form] = []
    ours = frozenset({"stream", "stream_options"}) if plan.stream else frozenset[str]()
    lacking = ours | set(OF_PARAMS) if some else ours  # the caller has asked for a temperature
    has_rung = plan.rung is not None and plan.rung is not Rung.PLAIN
    if plan.rung is not None and has_rung and plan.hint != "system":
        forms.append((Rung(plan.rung + 1), frozenset(), False))
    if ours:
        forms += [(Rung.JSON_SCHEMA, frozenset({"stream_options"}), False), (Rung.JSON_SCHEMA, ours, False)]
    if has_rung or plan.hint == "system" or plan.sent & (lacking - ours):
        forms.append((Rung.PLAIN, lacking, True))
    return forms
