"""Faults of a model's reply or of the connection. Pure: no I/O and no state."""

from __future__ import annotations

import random
import re
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias, get_args

from microbatch.checking import AtLeast, Seconds, check_fields, one_of
from microbatch.errors import ConfigError
from microbatch.testing.answers import json_types, resolve
from microbatch.testing.reading import EndpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

ElementKind = Literal[
    "missing",  # one element is left out
    "duplicate",  # one element comes twice
    "previous_id",  # one element k stands under the id of k-1, which so comes twice
    "next_id",  # one element k stands under the id of k+1, which so comes twice
    "shifted_back",  # the model skips an item: from there on element k stands under the id of k-1, and the last id is gone
    "shifted_forward",  # the model skips an id: from there on element k stands under the id of k+1, and the last answer is gone
    "unknown",  # one element more, under an id that was not asked for
    "renamed",  # one element's id is replaced by one that was not asked for, sometimes by its number alone
    "reordered",  # the elements are shuffled
    "empty_results",  # no element at all
    "strange_ids",  # every id is replaced by one that was not asked for
    "rambling",  # the model continues with elements that were not asked for, until a limit stops it
    "wrong_type",  # one answer has a JSON type or a label that its schema does not allow
]
TextKind = Literal[
    "broken_json",  # one element: a stray quote, a raw newline, a bad escape, an unterminated string or a missing brace
    "fenced",  # a Markdown fence around the reply, prose full of brackets around that
    "whitespace",  # nothing but spaces, ended properly
    "truncated",  # cut at some token, finish_reason "length"
    "refusal",  # the model declines: `refusal` instead of `content`
]
WireKind = Literal[
    "filtered",  # a content filter: 400, or a reply cut with finish_reason "content_filter"
    "cut",  # the stream just ends: no finish_reason, no [DONE]; when not streamed, finish_reason null
    "reset",  # the connection breaks in the middle
    "stall",  # the reply stops in the middle and the connection stays open
    "hang",  # nothing is ever answered
    "http_400",
    "http_429",
    "http_500",
]
Kind = Literal[ElementKind, TextKind, WireKind]
On = Literal["combined", "single", "all"]

Element: TypeAlias = "tuple[str, Any]"

_LEAST_ELEMENT_TOKENS = 12

_LETTERS = "bcdfghjkmnpqrstvwxz"
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_UNIT = re.compile(r"\\u[0-9a-fA-F]{4}|\\.|[^\\]", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The selection of replies that go wrong; its fields are described at `Faults`."""

    rate: Annotated[float, AtLeast(0)] = 0.2
    seed: int = 0
    limit: Annotated[int, AtLeast(0)] | None = None
    retry_after: Seconds | None = 0.1

    def check(self, kinds: Sequence[str], known: object) -> None:
        """Raise `ConfigError` if there are no *kinds*, one is not among the *known* ones, or the rate is above 1."""
        if not kinds:
            raise ConfigError("kinds must name at least one fault")
        for kind in kinds:
            one_of(known, kinds=kind)
        if self.rate > 1:
            raise ConfigError(f"rate must be at most 1, got {self.rate!r}")

    def drawn(self, number: int, spoiled: int) -> random.Random | None:
        """Decide about one reply; return what its fault is drawn from, None for no fault. See `Faults.draw`."""
        if self.limit is not None and spoiled >= self.limit:
            return None
        draw = random.Random(f"{self.seed}:{number}")  # noqa: S311 - repeatable, not secret
        return draw if draw.random() < self.rate else None


@dataclass(frozen=True, slots=True)
class Faults(Selection):
    """The selection of replies that go wrong, and their faults.

    The selection depends on the seed and on the number of earlier replies concerned, so a run in the same order repeats.
    A single call has one answer and no ids: the kinds about elements (all of `ElementKind` but "wrong_type") leave it
    "whitespace", and so do the kinds about JSON when its answer is free text.

    Args:
        kinds: One kind or several to draw from.
        rate: Share of the replies that go wrong, from 0 to 1.
        on: Which calls can go wrong.
        seed: Another seed makes other choices.
        limit: Most replies to spoil; None sets no limit.
        retry_after: Seconds that an "http_429" asks to wait, or None to leave that open.

    Raises:
        ConfigError: A kind or word is unknown, there is no kind, or a number is out of range.
    """

    kinds: Kind | Sequence[Kind]
    _: KW_ONLY
    on: On = "combined"

    def __post_init__(self) -> None:
        check_fields(self)
        self.check(self._kinds, Kind)

    @property
    def _kinds(self) -> tuple[Kind, ...]:
        return (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)

    def concern(self, *, combined: bool) -> bool:
        """Return whether such a call can go wrong."""
        return self.on == "all" or (self.on == "combined") == combined

    def draw(self, number: int, spoiled: int) -> Fault | None:
        """Decide about one reply, before which there were *number* of the kind concerned, *spoiled* ones among them."""
        drawn = self.drawn(number, spoiled)
        return None if drawn is None else Fault(drawn.choice(self._kinds), drawn)


def http_error(kind: str, retry_after: float | None, *, param: str) -> EndpointError | None:
    """Return the error response that a fault of *kind* is, of whose request the field *param* holds the texts; None if it is none."""
    match kind:
        case "http_400":
            message = "Invalid prompt: the request could not be processed."
            return EndpointError(400, message, param=param, code="invalid_value")
        case "http_429":
            message = "Rate limit reached for requests. Please slow down."
            return EndpointError(429, message, kind="requests", code="rate_limit_exceeded", retry_after=retry_after)
        case "http_500":
            message = "The server had an error while processing your request. Sorry!"
            return EndpointError(500, message, kind="server_error")
        case _:
            return None


_ABOUT_IDS = frozenset(get_args(ElementKind)) - {"wrong_type"}
_NEIGHBOURLY = frozenset({"shifted_back", "shifted_forward", "previous_id", "next_id"})
_ABOUT_JSON = frozenset({"wrong_type", "broken_json", "fenced"})


class Fault:
    """One fault of one reply.

    Attributes:
        kind: What goes wrong; None for nothing.
        random: Where; each use draws on.
    """

    def __init__(self, kind: Kind | None, draw: random.Random) -> None:
        self.kind = kind
        self.random = draw

    def for_single(self, *, typed: bool) -> Fault:
        """Return this fault as a single call can show it."""
        if self.kind in _ABOUT_IDS or (self.kind in _ABOUT_JSON and not typed):
            return Fault("whitespace", self.random)
        return self

    def error(self, retry_after: float | None) -> EndpointError | None:
        """Return the error response that this fault is, or None if it is none."""
        if self.kind == "filtered" and self.random.random() < 0.5:  # noqa: PLR2004 - a coin
            return EndpointError(400, "The response was filtered.", param="prompt", code="content_filter")
        return None if self.kind is None else http_error(self.kind, retry_after, param="messages")

    def elements(
        self, elements: list[Element], schema: dict[str, Any] | None, words: Collection[str] = ()
    ) -> list[Element]:
        """Return *elements*, those of a combined reply, with this fault.

        *schema* is that of their answers, None for strings; *words* are the ids of those whose answers are strings all the same.
        """
        if self.kind is None:
            return elements
        # These need an element after the one they begin at, or they would only be the last one missing.
        places = len(elements) - (self.kind in _NEIGHBOURLY and len(elements) > 1)
        at = self.random.randrange(places)
        before, (name, answer), after = elements[:at], elements[at], elements[at + 1 :]
        match self.kind:
            case "missing":
                return before + after
            case "duplicate":
                again = self.random.randint(at + 1, len(elements))
                return [*elements[:again], (name, answer), *elements[again:]]
            case "previous_id":
                return [*before, (name, answer), *((name, other) for _, other in after[:1]), *after[1:]]
            case "next_id":
                return [*before, *((following, answer) for following, _ in after[:1]), *after]
            case "shifted_back":
                names = [each for each, _ in elements[:-1]]
                return list(zip(names, [answer for _, answer in before + after], strict=True))
            case "shifted_forward":
                names = [each for each, _ in before + after]
                return list(zip(names, [answer for _, answer in elements[:-1]], strict=True))
            case "unknown":
                return [*before, (self.stranger(name, elements), answer), (name, answer), *after]
            case "renamed":
                return [*before, (self.stranger(name, elements), answer), *after]
            case "reordered":
                return self._shuffled(elements)
            case "empty_results":
                return []
            case "strange_ids":
                return [(self.stranger(each, elements), said) for each, said in elements]
            case "wrong_type":
                fitting = {"type": "string"} if schema is None or name in words else schema
                return [*before, (name, self.wrong(answer, fitting)), *after]
            case _:
                return elements

    def rambling(self, elements: list[Element], tokens: int) -> list[Element]:
        """Return *elements* and as many more as it takes to go beyond *tokens*."""
        more = tokens // _LEAST_ELEMENT_TOKENS + 1
        answers = [answer for _, answer in elements]
        return elements + [
            (self.stranger(f"{len(elements) + 1 + place}", elements), answers[place % len(answers)])
            for place in range(more)
        ]

    def _shuffled(self, elements: list[Element]) -> list[Element]:
        shuffled = self.random.sample(elements, len(elements))
        return shuffled if shuffled != elements else elements[1:] + elements[:1]

    def stranger(self, name: str, elements: list[Element]) -> str:
        """Return an id that was not asked for: other letters, another number, or the number alone."""
        number = name.rstrip(_LETTERS)
        letters = "".join(self.random.choices(_LETTERS, k=5))
        drawn = self.random.choice([number + letters, f"{len(elements) + 1}{letters}", number])
        # A chance of one in millions, but then the fault would be a worse one than it says.
        return drawn if all(drawn != each for each, _ in elements) else f"{len(elements) + 1}{letters}"

    def wrong(self, answer: Any, schema: dict[str, Any]) -> Any:
        """Return a value that *schema* does not admit; *answer* itself if it admits everything."""
        samples: dict[str, Any] = {
            "null": None,
            "boolean": True,
            "number": 4217,
            "string": "none of these",
            "array": [[]],
            "object": {"?": 0},
        }
        allowed = json_types(schema, schema)
        values = [value for name, value in samples.items() if name not in allowed]
        if "string" in allowed and resolve(schema, schema).keys() & {"enum", "const"}:
            values.append(samples["string"])
        return self.random.choice(values) if values else answer

    def broken(self, element: str) -> str:
        """Return the JSON of an element, or of a single answer, damaged so that it is no longer JSON."""
        # The id of an element stays readable: what is damaged is the answer.
        start = element.find('"answer":') + len('"answer":') if '"answer":' in element else 0
        strings = [found for found in _STRING.finditer(element, start) if found.group(1)]
        ways = ["missing brace"]
        if strings:
            ways += ["quote", "newline", "escape", "unterminated"]
        way = self.random.choice(ways)
        if way == "missing brace":
            # A bare number has none to lose, and would only become another number.
            return element[:-1] if element[-1] in '}]"' else element + "}"
        string = self.random.choice(strings)
        if way == "unterminated":
            return element[: string.end() - 1] + element[string.end() :]
        # Between whole units, or the insertion would only change an escape into another.
        edges = [unit.start() for unit in _UNIT.finditer(string.group(1))]
        at = string.start(1) + self.random.choice(edges)
        return element[:at] + {"quote": '"', "newline": "\n", "escape": "\\q"}[way] + element[at:]

    def fenced(self) -> tuple[str, str]:
        """Return what stands before and after the JSON of a fenced reply."""
        before = self.random.choice(
            [
                "Here are the results:\n",
                "Sure! I read [all] of them, {each} on its own:\n\n",
                'As [1] asked, the "results" {"id", "answer"} follow.\n',
            ]
        )
        after = self.random.choice(["", "\n\nLet me know if [anything] is {missing}!", "\n\nNote: ids as in [ID]."])
        return f"{before}```json\n", f"\n```{after}"

    def cut(self, length: int) -> int:
        """Return how much of something *length* long is left when it is cut: not all, and something if there are two."""
        return self.random.randint(min(1, length - 1), length - 1) if length else 0


NO_FAULT: Final = Fault(None, random.Random(0))  # noqa: S311 - never drawn from
WHITESPACE = "  \n "
REFUSAL = "I'm sorry, but I can't help with that."
