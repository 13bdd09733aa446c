"""A simulated endpoint behind the `Transport` protocol, with a fault for each attempt and a ledger of what it did.

It answers every text by a function of that text, so that an answer that went to the wrong caller shows.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec
from simulation.scenario import REFUSALS, TICK, Fault

import microbatch as mb
from microbatch.testing import ScriptedCall

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulation.world import World

CANARY = "Reply with exactly: "
"""How the text of a canary begins."""

LIMIT = 60.0
"""Seconds an attempt may take when its call sets no limit of its own: the transport's."""


WHOSE: ContextVar[str | None] = ContextVar("WHOSE", default=None)
"""Whose context this is; every caller sets it in its own."""


BESIDE: ContextVar[str | None] = ContextVar("BESIDE", default=None)
"""What asks again; set by what watches the library."""


class Fact(msgspec.Struct):
    """An answer of several fields."""

    of: str
    length: int


OUTPUT_TYPES: dict[str, Any] = {"text": str, "fact": Fact, "number": int}


def right_answer(text: str) -> Any:
    """Return the JSON value that answers *text*, which begins with its kind."""
    kind = text.split(" ", 1)[0]
    if kind == "fact":
        return {"of": text, "length": len(text)}
    return zlib.crc32(text.encode()) if kind == "number" else f"A:{text}"


def right_output(text: str) -> Any:
    """Return what a caller who asked *text* must get."""
    return msgspec.convert(right_answer(text), OUTPUT_TYPES[text.split(" ", 1)[0]])


@dataclass
class Attempt:
    """What the ledger holds of one attempt.

    Attributes:
        texts: The items' texts, in order.
        ids: Their ids; "" for a single call.
        canary: The id of the canary, or None.
        key: Equal for the attempts of one call: a combined prompt is never composed twice alike.
        first: Whether the call had not been sent before.
        started: When it came, in virtual seconds; `turn` the loop's turn and `moment` the place in the trace.
        ended: When it was over, None while it is not; `turn_ended` the loop's turn.
        how: "answered", "failed", "cancelled"; None while it is under way.
        said: Texts whose right answers have gone out, and when.
        past: Length from which on the reply goes on for nothing: two elements more than were asked for, the last two of no use.
        past_the_end: Whether so much has gone out.
        reported: Usage it reported.
        timeout: What the call may take, as it was told then.
        excuses: Errors that this attempt may mean for an item it carried alone, and for one of several.
        raised: What it raised.
        whose: The caller whose context it ran in; None, as it should be.
        beside: "audit" or "check" for a call that no caller waits for, else None.
    """

    number: int
    call: mb.ChatCall
    texts: list[str]
    ids: list[str]
    canary: str | None
    combined: bool
    key: object
    first: bool
    fault: Fault
    started: float
    turn: int
    moment: int
    timeout: float | None = None
    ended: float | None = None
    turn_ended: int = 0
    how: str | None = None
    said: dict[str, float] = field(default_factory=dict)
    past: int | None = None
    past_the_end: bool = False
    reported: mb.Usage | None = None
    excuses: tuple[tuple[type, ...], tuple[type, ...]] = ((), ())
    raised: BaseException | None = None
    whose: str | None = None
    beside: str | None = None


STATUS: dict[str, Callable[[Fault], BaseException]] = {
    "bad_request": lambda fault: mb.BadRequest("no", status=400),
    "unprocessable": lambda fault: mb.BadRequest("no", status=422),
    "too_large": lambda fault: mb.BadRequest("too large", status=413),
    "not_found": lambda fault: mb.BadRequest("no such model", status=404),
    "too_long": lambda fault: mb.ContextTooLong("too long", status=400),
    "filtered": lambda fault: mb.Filtered("filtered", status=400),
    "auth": lambda fault: mb.AuthFailed("who?", status=401),
    "forbidden": lambda fault: mb.AuthFailed("no", status=403),
    "quota": lambda fault: mb.QuotaExhausted("broke", status=429),
    "rate_limited": lambda fault: mb.RateLimited("slow", status=429, retry_after=fault.retry_after),
    "server_error": lambda fault: mb.ServerError("oops", status=500),
    "overloaded": lambda fault: mb.ServerError("busy", status=529, retry_after=fault.retry_after),
    "no_connection": lambda fault: mb.ConnectFailed("refused"),
    "alien": lambda fault: KeyError("a bug in the transport"),
    "reset": lambda fault: mb.ConnectFailed("reset"),
    "stream_error": lambda fault: mb.ServerError("oops in the stream", status=200),
    "timeout": lambda fault: mb.TransportTimeout("silent"),
}

_BROKEN_OFF = frozenset({"reset", "stream_error", "timeout", "hang"})
"""Errors that may come when some of the reply is out already."""

ASKING = frozenset({"rate_limited", "overloaded"})
"""Errors that may ask to wait."""

TRANSIENT = frozenset(
    {"rate_limited", "server_error", "overloaded", "no_connection", "reset", "stream_error", "timeout", "hang"}
)
"""Errors that a retry may heal."""


class Upstream:
    """The endpoint.

    Args:
        world: Told of everything that happens here, and knows which texts are poison.
        faults: One for each attempt, in order of arrival.
        poison: The kind of refusal that poison gets.
    """

    def __init__(self, world: World, faults: list[Fault], poison: str) -> None:
        self.attempts: list[Attempt] = []
        self.closed = 0
        self._world = world
        self._faults = faults
        self._poison = poison
        self._seen: set[object] = set()
        self._calls: list[mb.ChatCall] = []  # kept, so that no address is used twice

    async def send(self, call: mb.ChatCall, on_text: Callable[[str], None]) -> mb.Completion:
        """Make one attempt, as its fault says."""
        world = self._world
        received = ScriptedCall(call, world.now())
        items = [(name, text) for name, text in received.items if not text.startswith(CANARY)]
        canary = received.items[-1][0] if len(items) < len(received.items) else None
        number = len(self.attempts)
        fault = self._fault_of(number)
        if any(world.is_poison(text) for _, text in items):
            fault = Fault(self._poison, fault.latency, fault.pieces, fault.gap, fault.usage, dice=fault.dice)
        key = call.messages[-1]["content"] if received.combined else id(call)
        attempt = Attempt(
            number=number,
            call=call,
            texts=[text for _, text in items],
            ids=[name for name, _ in items],
            canary=canary,
            combined=received.combined,
            key=key,
            first=key not in self._seen,
            fault=fault,
            started=world.now(),
            turn=world.loop.turns,
            moment=world.moment(),
            timeout=call.timeout,
            whose=WHOSE.get(),
            beside=BESIDE.get(),
        )
        self._seen.add(key)
        self._calls.append(call)
        self.attempts.append(attempt)
        world.note("attempt", number, fault.kind, *attempt.texts)
        world.attempt_came(attempt)
        try:
            completion = await _Sending(self, world, attempt, received, on_text).run()
        except asyncio.CancelledError:
            attempt.how = "cancelled"
            if fault.stubborn:
                await asyncio.sleep(fault.stubborn)  # saying goodbye to the server
            raise
        except BaseException as error:
            attempt.how, attempt.raised = "failed", error
            if not isinstance(error, mb.RequestFailed):
                attempt.excuses = ((mb.TransportError,), (mb.TransportError,))
            elif not attempt.excuses[0]:
                attempt.excuses = ((type(error),), () if fault.kind in REFUSALS else (type(error),))
            raise
        else:
            attempt.how, attempt.reported = "answered", completion.usage
            return completion
        finally:
            attempt.ended, attempt.turn_ended = world.now(), world.loop.turns
            world.note("attempt ends", number, attempt.how)

    def _fault_of(self, number: int) -> Fault:
        return self._faults[number] if number < len(self._faults) else Fault(dice=number)

    async def aclose(self) -> None:
        """Count the closing."""
        self.closed += 1


class _Sending:
    """One attempt under way."""

    def __init__(
        self, upstream: Upstream, world: World, attempt: Attempt, received: ScriptedCall, on_text: Callable[[str], None]
    ) -> None:
        self._upstream = upstream
        self._world = world
        self._attempt = attempt
        self._received = received
        self._on_text = on_text
        self._dice = Random(attempt.fault.dice)
        limit = attempt.call.timeout
        self._until = attempt.started + (LIMIT if limit is None else min(limit, LIMIT))

    async def run(self) -> mb.Completion:
        """Answer or fail, as the fault says."""
        attempt, fault, dice = self._attempt, self._attempt.fault, self._dice
        await self._pause(fault.latency)
        kind = fault.kind if attempt.combined or fault.kind not in _COMBINED_ONLY else "ok"
        if not attempt.combined and attempt.call.schema is None and kind in ("nonsense", "prose", "wrong_type"):
            kind = "ok"  # whatever a model says is a plain text answer, so this would be one too
        if kind in STATUS and kind not in _BROKEN_OFF:
            raise STATUS[kind](fault)
        text, marks = self._compose(kind)
        if kind in _BROKEN_OFF:
            if attempt.call.stream and dice.random() < 0.6:
                await self._say(text[: dice.randint(0, len(text))], marks)
            if kind == "hang":
                await self._pause(LIMIT)
            raise STATUS[kind](fault)
        finish, refusal = "stop", None
        if kind == "truncated":
            text, finish = text[: dice.randint(0, len(text) - 1)], "length"
            if not attempt.combined:
                attempt.excuses = ((mb.TruncatedReply, mb.MalformedAnswer), ())
        elif kind == "cut":
            text, finish = text[: dice.randint(0, len(text))], dice.choice((None, "error"))
            attempt.excuses = ((mb.TransportError,), (mb.TransportError,))
        elif kind == "filtered_answer":
            text, finish = text[: dice.randint(0, len(text))], "content_filter"
            attempt.excuses = ((mb.Filtered,), ())
        elif kind == "refusal":
            text, refusal = "", "I would rather not."
            attempt.excuses = ((mb.Refused,), ())
        elif not attempt.combined and kind in ("nonsense", "empty", "wrong_type"):
            attempt.excuses = ((mb.MalformedAnswer,), ())
        await self._say(text, marks)
        prompt = sum(len(str(message["content"])) for message in attempt.call.messages)
        usage = mb.Usage(prompt, len(text), prompt // 3 if dice.random() < 0.5 else 0) if fault.usage else None
        return mb.Completion(finish, usage=usage, refusal=refusal, body={} if not attempt.combined else None)

    async def _pause(self, seconds: float) -> None:
        rest = self._until - self._world.now()
        if seconds >= rest:
            await asyncio.sleep(max(0.0, rest))
            self._attempt.excuses = ((mb.TransportTimeout,), (mb.TransportTimeout,))
            raise mb.TransportTimeout("took too long")
        if seconds:
            await asyncio.sleep(seconds)

    async def _say(self, text: str, marks: list[tuple[int, str]]) -> None:
        """Send *text*, in pieces if it is streamed; *marks* tell where each right answer is complete."""
        attempt, fault = self._attempt, self._attempt.fault
        cuts = [0, len(text)]
        if attempt.call.stream:
            cuts = sorted([*cuts, *(self._dice.randint(0, len(text)) for _ in range(fault.pieces - 1))])
        for start, end in pairwise(cuts):
            if start == end:
                continue
            if start and fault.gap:
                await self._pause(fault.gap)
            said = [name for place, name in marks if start < place <= end]
            attempt.said.update((name, self._world.now()) for name in said)
            attempt.past_the_end = attempt.past is not None and end >= attempt.past
            self._world.answers_come(said, "before")
            self._on_text(text[start:end])
            self._world.answers_come(said, "after")

    def _compose(self, kind: str) -> tuple[str, list[tuple[int, str]]]:
        """Return the reply and where in it each right answer is complete."""
        attempt = self._attempt
        if not attempt.combined:
            return self._compose_alone(kind)
        elements = [(name, right_answer(text), text) for name, text in zip(attempt.ids, attempt.texts, strict=True)]
        if attempt.canary is not None:
            elements.append((attempt.canary, self._received.items[-1][1].removeprefix(CANARY), None))
        if kind in _SPOIL:
            elements = _SPOIL[kind](self, elements)
        if kind == "nonsense":
            return "I am sorry, I cannot answer that.", []
        if kind == "empty":
            return "", []
        reply, marks = '{"results":[', []
        if kind == "prose":
            reply = f"Here you are:\n```json\n{reply}"
        open_, astray = {*attempt.ids, attempt.canary}, 0
        for index, (name, answer, text) in enumerate(elements):
            reply += ("," if index else "") + (
                answer if name is None else json.dumps({"id": name, "answer": answer}, separators=(",", ":"))
            )
            if text is not None:
                marks.append((len(reply), text))
            astray = 0 if name in open_ else astray + 1
            open_.discard(name)
            if (
                astray >= 2
                and index + 1 >= len(attempt.texts) + (attempt.canary is not None) + 2
                and attempt.past is None
            ):
                attempt.past = len(reply)
        reply += "]}"
        return (f"{reply}\n```\nAnything else?" if kind == "prose" else reply), marks

    def _compose_alone(self, kind: str) -> tuple[str, list[tuple[int, str]]]:
        call, text = self._attempt.call, self._attempt.texts[0]
        answer = right_answer(text)
        if kind == "empty":
            return "", []
        if call.schema is None:
            return answer, [(len(answer), text)]
        if kind == "nonsense":
            return "I am sorry, I cannot answer that.", []
        if kind == "wrong_type":
            answer = ["what?"]
        wrapped = list(call.schema.get("properties", {})) == ["answer"]
        reply = json.dumps({"answer": answer} if wrapped else answer)
        if kind == "prose":
            reply = f"Sure!\n```json\n{reply}\n```"
        return reply, [(len(reply), text)] if kind != "wrong_type" else []

    # --- how combined replies are spoiled: an element is (id, answer, the text it is right for or None); (None, raw JSON, None)

    def _short(self, elements: list[Any]) -> list[Any]:
        missing = self._dice.sample(range(len(elements)), self._dice.randint(1, len(elements)))
        return [element for index, element in enumerate(elements) if index not in missing]

    def _reordered(self, elements: list[Any]) -> list[Any]:
        self._dice.shuffle(elements)
        return elements

    def _duplicate(self, elements: list[Any]) -> list[Any]:
        # The wrong copy comes after the right one, or behind an unknown id, where nothing is handed out before the end.
        index = self._dice.randrange(len(elements))
        wrong = (elements[index][0], _wrong(elements[index][1]), None)
        if self._dice.random() < 0.5:
            return [("999zzzzz", "?", None), wrong, *elements]
        place = self._dice.randint(index + 1, len(elements))
        return [*elements[:place], wrong, *elements[place:]]

    def _foreign(self, elements: list[Any]) -> list[Any]:
        dice, others = self._dice, []
        for attempt in self._upstream.attempts:
            if attempt.key != self._attempt.key:
                others += [
                    (name, right_answer(text), None)
                    for name, text in zip(attempt.ids, attempt.texts, strict=True)
                    if name
                ]
        for name, answer, _ in list(elements):
            others.append((name[:-1] + ("b" if name[-1] != "b" else "c"), _wrong(answer), None))
        chosen = dice.sample(others, min(len(others), dice.randint(1, 3)))
        if dice.random() < 0.5:
            elements = self._short(elements)
        for element in chosen:
            elements.insert(dice.randint(0, len(elements)), element)
        return elements

    def _broken(self, elements: list[Any]) -> list[Any]:
        index = self._dice.randrange(len(elements))
        name = elements[index][0]
        raw = self._dice.choice(
            (f'{{"id":"{name}","answer":}}', f'{{"id":"{name}"', f'{{"id":"{name}","answer":"never ends', "null")
        )
        elements[index] = (None, raw, None)
        return elements

    def _hijacked(self, elements: list[Any]) -> list[Any]:
        if self._attempt.canary is None:
            return elements
        return [(name, _wrong(answer), None) for name, answer, _ in elements]

    def _wrong_type(self, elements: list[Any]) -> list[Any]:
        if self._attempt.texts[0].startswith("text"):
            return elements
        index = self._dice.randrange(len(self._attempt.texts))
        elements[index] = (elements[index][0], ["what?"], None)
        return elements


_SPOIL = {
    "short": _Sending._short,
    "reordered": _Sending._reordered,
    "duplicate": _Sending._duplicate,
    "foreign": _Sending._foreign,
    "broken": _Sending._broken,
    "hijacked": _Sending._hijacked,
    "wrong_type": _Sending._wrong_type,
}
_COMBINED_ONLY = frozenset({"short", "reordered", "duplicate", "foreign", "broken", "hijacked"})

SLOWEST_SOUND_REPLY = 2.0 + 12 * 8 * TICK
"""Seconds that the slowest reply that is as it should be takes."""


def _wrong(answer: Any) -> Any:
    """Return an answer of the same type to another question."""
    if isinstance(answer, dict):
        return {"of": "something else", "length": 0}
    return 0 if isinstance(answer, int) else "something else"
