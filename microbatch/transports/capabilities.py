"""The features that each endpoint supports, learned from its refusals, so that each refusal is paid for once.

Structured output is a ladder of three rungs: a JSON schema that the endpoint enforces, JSON without a schema, plain text. A refusal
about the response format steps down one rung; after an hour one call tries the rung above again. Beside the rung, the optional
fields that an endpoint refuses and its name of `max_tokens` are remembered.

The transport asks for a `Plan` before each attempt and reports how it went; an attempt that is cancelled or fails for other reasons
needs no report.
"""

from __future__ import annotations

import enum
import hashlib
import re
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary

import msgspec

from microbatch.errors import BadRequest, ServerError
from microbatch.lru import LRU
from microbatch.transports.bound_refusals import lower, read_refusal, words_of

if TYPE_CHECKING:
    from microbatch.errors import StatusError
    from microbatch.messages import TokenLimits
    from microbatch.protocols import ChatCall
    from microbatch.transports.error_parsing import Fault

Endpoint: TypeAlias = tuple[str, str, bytes]
"""Address, model and a digest of the credentials."""

CAPACITY: Final = 256
RETRY_RUNG_AFTER: Final = 3600.0  # seconds at a lower rung after which one call tries the rung above
MAX_SCHEMAS: Final = 64
_MAX_BOUNDS: Final = 3  # refusals of a call's bound after which it is sent without one

_MAX_TOKENS_NAMES: Final = ("max_tokens", "max_completion_tokens")
_OPTIONAL: Final = frozenset({"stream", "stream_options", "temperature"})
_UNSUPPORTED_CODES: Final = frozenset(
    {"unsupported_parameter", "unsupported_value", "unknown_parameter", "extra_forbidden", "UnsupportedParamsError"}
)
# LiteLLM passes OpenAI's words on without the fields: "...OpenAIException - Unsupported parameter: 'max_tokens' is not..." and
# has its own: "...UnsupportedParamsError: openai does not support parameters: ['temperature'], for model=..."
_UNSUPPORTED_ONE: Final = re.compile(r"(?i)unsupported (?:parameter|value): [`'\"](\w+)")
_UNSUPPORTED_LIST: Final = re.compile(r"does not support parameters: \[?([^\]\n]{1,200})")
_FORMAT: Final = re.compile(r"(?i)response_format|json_schema|json_object|\bgrammar\b|structured.outputs?\b")
# Response formats are supported and this schema is not. OpenAI: "Invalid schema for response_format 'answers': ..."; llama-server:
# "JSON schema conversion failed"; Groq: "minItems is not supported".
_SCHEMA: Final = re.compile(
    r"(?i)\binvalid (?:json )?schema\b|\bschema (?:is )?(?:invalid|not valid|too )|schema conversion failed|"
    r"\b(?:(?:min|max)(?:Items|Length|Properties|imum)|exclusiveM(?:in|ax)imum|multipleOf|uniqueItems|prefixItems|pattern|"
    r"patternProperties|additionalProperties|anyOf|allOf|oneOf|\$ref|\$defs|const|enum)\b[`'\"]?:? (?:is|are) not "
    r"(?:supported|permitted|allowed)"
)

# DashScope: "This model only support stream mode, please enable the stream parameter", "parameter.enable_thinking must be set to
# false for non-streaming calls"; ChatGPT's backend: "Stream must be set to true".
_STREAMS_ONLY: Final = re.compile(
    r"(?i)\bnon[- ]?stream|\bonly (?:supports? |available (?:in|with|as) )?(?:the )?stream|"
    r"\bstream(?:ing)?[`'\"]?(?: mode| output| parameter)? (?:only|(?:is )?required|must be)|"
    r"\bstream[`'\"]? ?(?:=|to|as) ?[`'\"]?true|\b(?:enable|requires?|use|set) (?:the )?[`'\"]?stream"
)


class Rung(enum.IntEnum):
    """The part of the reply's form that the endpoint is asked to enforce; a greater value is a lower rung."""

    JSON_SCHEMA = 0
    JSON_OBJECT = 1
    PLAIN = 2


Structured = Literal["json_schema", "json_object", "none"]
"""The names of the rungs for users."""


class _RungState(msgspec.Struct):
    """The rung in use, since when, and the rungs on which an answer came."""

    rung: Rung = Rung.JSON_SCHEMA
    since: float = 0.0
    works: set[Rung] = msgspec.field(default_factory=set[Rung])

    def down_to(self, rung: Rung, now: float) -> None:
        if self.rung < rung:  # else a concurrent call has stepped there or further
            self.rung = rung
            self.since = now


class _Entry:
    """The features of one endpoint."""

    def __init__(self) -> None:
        self.general: _RungState = _RungState()
        self.schemas: LRU[bytes, _RungState] = LRU(MAX_SCHEMAS)
        self.unsupported: set[str] = set()
        self.max_tokens_name: str = _MAX_TOKENS_NAMES[0]
        self.streams_only: bool = False
        self.blameless: bool = False  # whether a call was refused in the same words without its bound as with it

    def schema(self, digest: bytes) -> _RungState:
        """Return the state of one schema, to be changed."""
        return self.schemas.get_or_make(digest, _RungState)

    def deciding(self, digest: bytes) -> list[_RungState]:
        """Return the states that decide the rung of a schema: the lowest ones."""
        own = self.schemas.get(digest)
        if own is None or own.rung < self.general.rung:
            return [self.general]
        return [own] if own.rung > self.general.rung else [self.general, own]


class _CallHistory(msgspec.Struct):
    """Notes about one call, dropped with it."""

    floor: Rung = Rung.JSON_SCHEMA  # the highest rung to try, after a 500
    tried_lower: bool = False
    unanswered: bool = False
    bounds: int = 0  # refusals of its bound
    renamed: bool = False  # whether a name of `max_tokens` was refused


class Plan(msgspec.Struct, eq=False):
    """The form of one attempt.

    Attributes:
        rung: What to ask of the reply's form; None for a call without a schema.
        sent: The optional fields that are sent, under the endpoint's names: `stream`, `stream_options`, `temperature` and one of
            `max_tokens` and `max_completion_tokens`.
        may_stream: Whether the reply may be streamed though that is not wanted.
        lower: Whether the rung is one lower than known to be needed, because of a 500.
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
        if "temperature" in call.params:
            wanted.add("temperature")
        wanted -= entry.unsupported
        if "stream" not in wanted:
            wanted.discard("stream_options")  # refused on its own
        bound = call.bound if call.max_tokens is None else None
        if call.max_tokens is not None or bound is not None:
            wanted.add(entry.max_tokens_name)
        plan = Plan(call, entry, None, frozenset(wanted), may_stream=may_stream, bound=bound)
        plan.stream = bool(stream) and "stream" in wanted
        if call.schema is not None:
            self._choose_rung(plan, now)
        return plan

    def accepted(self, plan: Plan, now: float) -> None:
        """Note that the endpoint answered *plan*; only now is a lower rung tried after a 500, or a higher one, remembered."""
        self.answered = True
        rung = plan.rung
        if rung is None:
            return
        entry, own = plan.entry, plan.entry.schema(plan.digest)
        if plan.lower:
            # If other schemas were answered on the rung above, the endpoint does not support this one.
            above_works = any(works < rung for works in entry.general.works)
            (own if above_works else entry.general).down_to(rung, now)
        elif plan.probe:
            for state in (entry.general, own):
                state.rung = min(state.rung, rung)
        own.works.add(rung)
        entry.general.works.add(rung)

    def learn(self, plan: Plan, fault: Fault, error: StatusError, now: float) -> StatusError:
        """Learn from *error*, read from *fault*, what the endpoint does not support.

        Returns:
            The error to raise, with `again` if the next attempt at the same call will be made differently.
        """
        if type(error) is BadRequest and error.status in (400, 422):
            error.again = self.refused(plan, fault, now)
        elif type(error) is ServerError and error.status == 500:  # noqa: PLR2004
            self.failed(plan)
        if error.again or plan.call.max_tokens is not None:
            return error
        limits = read_refusal(f"{fault.message} {words_of(fault.raw)}", error.status, plan.bound or 0)
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
        """Learn from a 400 or 422; return whether the next attempt at the same call will be made differently."""
        names = _unsupported(fault)
        learned = [self._learn_field(plan, name) for name in names & plan.sent]
        if any(learned) or self._learn_to_stream(plan, fault.message):
            return True
        if plan.rung is None or plan.rung is Rung.PLAIN or self._rung is not None:
            return False
        if plan.rung is Rung.JSON_SCHEMA and _SCHEMA.search(fault.message):
            self._step_down(plan, plan.entry.schema(plan.digest), now)
        elif "response_format" in names or _FORMAT.search(f"{fault.param} {fault.message}"):
            # Where this schema alone is on a lower rung, nothing is known of the others.
            self._step_down(plan, plan.entry.deciding(plan.digest)[0], now)
        else:
            return False
        return True

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
        """Learn from a plain 500, with which llama-cpp-python's server refuses a JSON schema.

        The next attempt at the same call goes one rung lower. Each call does so once, and not if its very schema has been answered
        on this rung before: then the endpoint is down, not refusing.
        """
        if plan.rung is None or self._rung is not None:
            return
        history = self._history(plan)
        if plan.lower:
            history.floor = Rung.JSON_SCHEMA  # it was not the format, so go on as before
            return
        own = plan.entry.schemas.get(plan.digest)
        if plan.rung is Rung.PLAIN or history.tried_lower or (own is not None and plan.rung in own.works):
            return
        history.tried_lower = True
        history.floor = Rung(plan.rung + 1)

    def unanswered(self, plan: Plan) -> bool:
        """Note a reply without an answer; return whether an earlier attempt at the same call had one too."""
        history = self._history(plan)
        before, history.unanswered = history.unanswered, True
        return before

    def _choose_rung(self, plan: Plan, now: float) -> None:
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
        history = self._histories.get(plan.call)
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
        if name in _OPTIONAL:
            plan.entry.unsupported.add(name)
            return True
        if history.renamed:
            return False  # the endpoint takes neither name
        history.renamed = True
        plan.entry.max_tokens_name = _MAX_TOKENS_NAMES[1 - _MAX_TOKENS_NAMES.index(name)]
        return True

    @staticmethod
    def _learn_to_stream(plan: Plan, message: str) -> bool:
        """Learn from a refusal of replies that are not streamed, such as DashScope's for reasoning models."""
        if plan.stream or not plan.may_stream or _STREAMS_ONLY.search(message) is None:
            return False
        plan.entry.streams_only = True
        return "stream" not in plan.entry.unsupported

    def _history(self, plan: Plan) -> _CallHistory:
        return self._histories.setdefault(plan.call, _CallHistory())


def _unsupported(fault: Fault) -> set[str]:
    """Return the request fields that the endpoint says it does not know or does not take."""
    names = set(_UNSUPPORTED_ONE.findall(fault.message))
    for group in _UNSUPPORTED_LIST.findall(fault.message):
        names.update(re.findall(r"\w+", group))
    if fault.code in _UNSUPPORTED_CODES and fault.param:
        names.add(fault.param)
    return names
