"""What each endpoint turned out to support, so that a refusal is paid for once.

Structured output is a ladder: a JSON schema that the endpoint enforces, JSON without a schema, plain text. A refusal that is
about the response format steps down one rung; after an hour one call tries the rung above again. Beside the rung, it is
remembered which optional fields an endpoint refuses and how it calls `max_tokens`.

Plain values and rules: no clock, no sockets. The transport asks for a `Plan` before each attempt and reports how it went.
Nothing here waits, so an attempt that fails otherwise, or is cancelled, needs no report.
"""

from __future__ import annotations

import enum
import hashlib
import re
import secrets
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import msgspec

from microbatch.lru import LRU
from microbatch.transports.bound_refusals import lower

if TYPE_CHECKING:
    from collections.abc import Iterable

    from microbatch.messages import TokenLimits
    from microbatch.protocols import ChatCall

CAPACITY: Final = 256
PATIENCE: Final = 3600.0
MAX_SCHEMAS: Final = 64

_MAX_BOUNDS: Final = 3
"""Refusals of a call's bound after which it goes without."""

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
# OpenAI: "Invalid schema for response_format 'answers': ..."; llama-server: "JSON schema conversion failed"; Groq: "minItems is
# not supported". They say that formats are fine and this schema is not.
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
    """How much of the reply's form the endpoint is asked to enforce; a greater value is a lower rung."""

    JSON_SCHEMA = 0
    JSON_OBJECT = 1
    PLAIN = 2


class _RungState(msgspec.Struct):
    """The rung that is stood on, and since when."""

    rung: Rung = Rung.JSON_SCHEMA
    since: float = 0.0
    works: set[Rung] = msgspec.field(default_factory=set[Rung])  # rungs on which an answer came

    def down_to(self, rung: Rung, now: float) -> None:
        """Step down to *rung*, unless somebody already went there or further."""
        if self.rung < rung:
            self.rung = rung
            self.since = now


class _Entry:
    """What is known of one (base_url, model, credentials)."""

    def __init__(self) -> None:
        self.general = _RungState()
        self.schemas: LRU[bytes, _RungState] = LRU(MAX_SCHEMAS)
        self.unsupported: set[str] = set()
        self.max_tokens_name = _MAX_TOKENS_NAMES[0]
        self.streams_only = False
        self.blameless = False  # whether a call was refused in the same words without its bound as with it

    def schema(self, digest: bytes) -> _RungState:
        """Return what is known of one schema, to be written to."""
        return self.schemas.get_or_make(digest, _RungState)

    def stand(self, digest: bytes) -> list[_RungState]:
        """Return the footholds that decide the rung of a schema: those furthest down."""
        own = self.schemas.get(digest)
        if own is None or own.rung < self.general.rung:
            return [self.general]
        return [own] if own.rung > self.general.rung else [self.general, own]


class _CallHistory:
    """What one call has been through; gone with the call."""

    def __init__(self) -> None:
        self.floor = Rung.JSON_SCHEMA  # after a 500: try this rung at least
        self.tried_lower = False
        self.unanswered = False
        self.bounds = 0  # how often the bound was refused
        self.refused: set[str] = set()  # fields; a call learns once from each, so sending again comes to an end


class Plan(msgspec.Struct, eq=False):
    """How one attempt is to be made.

    Attributes:
        rung: What to ask of the reply's form, or None when the call has no schema.
        sent: The optional fields that go out, under the names they have here: `stream`, `stream_options`, `temperature` and
            one of `max_tokens` and `max_completion_tokens`.
        stream: Whether the reply is to be streamed.
        bound: The call's bound, if it is sent because the call has no `max_tokens`; else None.
    """

    call: ChatCall
    entry: _Entry
    rung: Rung | None
    sent: frozenset[str]
    digest: bytes = b""
    stream: bool = False
    may_stream: bool = False
    lower: bool = False  # one rung lower than known to be needed, because of a 500
    probe: bool = False  # one rung higher than known to work, because an hour has passed
    bound: int | None = None

    def __repr__(self) -> str:
        """Tell what is sent, without the call's words."""
        return f"Plan(rung={self.rung!r}, sent={sorted(self.sent)}, lower={self.lower}, probe={self.probe})"


class Ladder:
    """What was learned about the most recently used endpoints.

    Args:
        capacity: Most (base_url, model, credentials) remembered.
        patience: Seconds at a lower rung after which one call tries the rung above.

    Attributes:
        answered: Whether any call was ever answered properly, so that the address is right.
    """

    def __init__(self, *, capacity: int = CAPACITY, patience: float = PATIENCE) -> None:
        self.answered = False
        self._patience = patience
        self._entries: LRU[tuple[str, str, bytes], _Entry] = LRU(capacity)
        self._notes: WeakKeyDictionary[ChatCall, _CallHistory] = WeakKeyDictionary()
        # Credentials are kept as digests only; the key makes them useless to whoever reads a dump and guesses.
        self._salt = secrets.token_bytes(16)

    def __repr__(self) -> str:
        """Tell how much is remembered."""
        return f"Ladder(endpoints={len(self._entries)})"

    def plan(
        self,
        call: ChatCall,
        *,
        base_url: str,
        model: str,
        credentials: Iterable[tuple[str, str]],
        stream: bool | None,
        now: float,
        may_stream: bool = False,
    ) -> Plan:
        """Return how to make the next attempt at *call*.

        Args:
            call: The call; a further attempt at the same object takes into account how the last one ended.
            base_url: With *model* and *credentials*, whose experience counts. Credentials are not kept in clear.
            model: The model asked.
            credentials: The headers that say who asks.
            stream: Whether a stream is wanted; None where the request is to say nothing of it.
            now: The loop's time.
            may_stream: Whether the reply may be streamed, though it is not wanted.
        """
        key = (base_url, model, self._digest_of(credentials))
        entry = self._entries.get_or_make(key, _Entry)
        if stream is False and may_stream and entry.streams_only:
            stream = True
        # Said in words where it is not wanted: some proxies stream unless they are told not to.
        wanted = set() if stream is None else {"stream", "stream_options"} if stream else {"stream"}
        if "temperature" in call.params:
            wanted.add("temperature")
        wanted -= entry.unsupported
        if "stream" not in wanted:
            wanted.discard("stream_options")  # refused on its own
        bound = call.bound if call.max_tokens is None else None
        if call.max_tokens is not None or bound is not None:
            wanted.add(entry.max_tokens_name)
        streamed = bool(stream) and "stream" in wanted
        plan = Plan(call, entry, None, frozenset(wanted), stream=streamed, may_stream=may_stream, bound=bound)
        if call.schema is not None:
            self._choose_rung(plan, now)
        return plan

    def accepted(self, plan: Plan, now: float) -> None:
        """Note that the endpoint answered *plan*; only now a lower rung tried after a 500, or a higher one, is remembered."""
        self.answered = True
        rung = plan.rung
        if rung is None:
            return
        entry, own = plan.entry, plan.entry.schema(plan.digest)
        if plan.lower:
            # Where other schemas were answered on the rung above, it is this schema that the endpoint cannot take.
            above_works = any(works < rung for works in entry.general.works)
            (own if above_works else entry.general).down_to(rung, now)
        elif plan.probe:
            for foothold in (entry.general, own):
                foothold.rung = min(foothold.rung, rung)
        own.works.add(rung)
        entry.general.works.add(rung)

    def refused(self, plan: Plan, *, code: str | None, param: str | None, message: str, now: float) -> bool:
        """Learn from a 400 or 422.

        Args:
            plan: The attempt that was refused.
            code: The endpoint's word for the error, or None.
            param: The field it complains of, or None.
            message: What it says. It is looked at, not kept.
            now: The loop's time.

        Returns:
            Whether the next attempt at the same call will be made differently.
        """
        names = _unsupported(code, param, message)
        history = [self._learn_field(plan, name) for name in names & plan.sent]
        if any(history) or self._learn_to_stream(plan, message):
            return True
        if plan.rung is None or plan.rung is Rung.PLAIN:
            return False
        if plan.rung is Rung.JSON_SCHEMA and _SCHEMA.search(message):
            self._step_down(plan, plan.entry.schema(plan.digest), now)
            return True
        if "response_format" in names or _FORMAT.search(f"{param} {message}"):
            self._step_down(plan, plan.entry.general, now)
            return True
        return False

    def bound_refused(self, plan: Plan, said: TokenLimits) -> bool:
        """Learn from a refusal that is about the length of the reply.

        The bound of *plan*'s call is lowered to what the endpoint says it allows, or set to None: if it does not say how much,
        or if lowering did not help. Where a call was refused without its bound as well, refusals without a number are no longer
        taken to be about it.

        Args:
            plan: The attempt that was refused.
            said: What the endpoint says of tokens.

        Returns:
            Whether the next attempt at the same call will be made differently.
        """
        notes = self._notes.setdefault(plan.call, _CallHistory())
        if plan.bound is None:
            plan.entry.blameless |= notes.bounds > 0
            return False
        notes.bounds += 1
        lowered = lower(plan.call, said)
        if lowered is False or (lowered is None and plan.entry.blameless):
            return False
        if lowered is None or notes.bounds >= _MAX_BOUNDS:
            plan.call.bound = None
        return True

    def failed(self, plan: Plan) -> None:
        """Learn from a plain 500, as which llama-cpp-python's server refuses a JSON schema.

        The next attempt at the same call goes one rung lower. Each call does so once, and not when its very schema has been
        answered on this rung before: then the endpoint is down, not refusing.
        """
        if plan.rung is None:
            return
        notes = self._notes.setdefault(plan.call, _CallHistory())
        if plan.lower:
            notes.floor = Rung.JSON_SCHEMA  # it was not the format, so go on as before
            return
        own = plan.entry.schemas.get(plan.digest)
        if plan.rung is Rung.PLAIN or notes.tried_lower or (own is not None and plan.rung in own.works):
            return
        notes.tried_lower = True
        notes.floor = Rung(plan.rung + 1)

    def unanswered(self, plan: Plan) -> bool:
        """Note that *plan* brought a reply without an answer in it; return whether an earlier attempt at the same call did so."""
        notes = self._notes.setdefault(plan.call, _CallHistory())
        before, notes.unanswered = notes.unanswered, True
        return before

    def _choose_rung(self, plan: Plan, now: float) -> None:
        plan.digest = hashlib.blake2b(msgspec.json.encode(plan.call.schema), digest_size=16).digest()
        stand = plan.entry.stand(plan.digest)
        plan.rung = stand[0].rung
        notes = self._notes.get(plan.call)
        if notes is not None:
            # A call that was refused or failed is no probe; else one that is refused for ever could go on for ever.
            if notes.floor > plan.rung:
                plan.rung, plan.lower = notes.floor, True
        elif plan.rung and all(now - foothold.since >= self._patience for foothold in stand):
            # The hour starts again here and not at the outcome: so only one call tries, even if it never comes back.
            for foothold in stand:
                foothold.since = now
            plan.rung, plan.probe = Rung(plan.rung - 1), True

    def _step_down(self, plan: Plan, foothold: _RungState, now: float) -> None:
        below = Rung((plan.rung or 0) + 1)
        notes = self._notes.setdefault(plan.call, _CallHistory())
        if plan.lower:
            # Nothing is known yet of the rung above, which only failed; this call goes on downwards alone.
            notes.floor = below
            return
        if plan.probe:
            foothold.since = now
        foothold.down_to(below, now)  # no further step if a concurrent refusal was first

    def _learn_field(self, plan: Plan, name: str) -> bool:
        notes = self._notes.setdefault(plan.call, _CallHistory())
        if name in notes.refused:
            return False
        notes.refused.add(name)
        if name in _OPTIONAL:
            plan.entry.unsupported.add(name)
            return True
        other = _MAX_TOKENS_NAMES[1 - _MAX_TOKENS_NAMES.index(name)]
        if other in notes.refused:
            return False  # the endpoint takes neither name; going round in circles will not help
        plan.entry.max_tokens_name = other
        return True

    @staticmethod
    def _learn_to_stream(plan: Plan, message: str) -> bool:
        """Learn from words that say that there are streams only, such as DashScope's for models that reason."""
        if plan.stream or not plan.may_stream or _STREAMS_ONLY.search(message) is None:
            return False
        plan.entry.streams_only = True
        return "stream" not in plan.entry.unsupported

    def _digest_of(self, credentials: Iterable[tuple[str, str]]) -> bytes:
        digest = hashlib.blake2b(key=self._salt, digest_size=16)
        digest.update(msgspec.json.encode(sorted((name.lower(), value) for name, value in credentials)))
        return digest.digest()


def _unsupported(code: str | None, param: str | None, message: str) -> set[str]:
    """Return the request fields that a refusal says the endpoint does not know or does not take."""
    names = set(_UNSUPPORTED_ONE.findall(message))
    for group in _UNSUPPORTED_LIST.findall(message):
        names.update(re.findall(r"\w+", group))
    if code in _UNSUPPORTED_CODES and param:
        names.add(param)
    return names
