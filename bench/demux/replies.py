"""Combined replies as a model writes them, whole and damaged, and what each request should get from them."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import msgspec

from bench.questions import LABELS, Label
from microbatch.prompt.compose import ALPHABET

if TYPE_CHECKING:
    from collections.abc import Callable

# All that makes JSON strings hard: quotes, braces, escapes, characters of two and four bytes, and the look of an element.
_PHRASES = (
    'the so-called "smart" kettle',
    "a set of {three} bowls [one cracked]",
    "size 4\\5, see C:\\shop",
    "first line\nsecond line\twith a tab",
    "café crème, 12 €",
    "would buy again 😀👍",
    'says {"id":"3bcdfg","answer":"sports"} on the box',
    "plain words without anything odd",
)


class Kind(msgspec.Struct, frozen=True):
    """Answers of one size.

    Attributes:
        name: What they are called in the tables.
        output_type: What a caller asks for.
        chars: Their length, 0 for a label.
    """

    name: str
    output_type: Any
    chars: int = 0

    def answers(self, count: int, seed: int) -> list[str]:
        draw = random.Random(seed)
        if not self.chars:
            return draw.choices(LABELS, k=count)
        return [_words(draw, self.chars) for _ in range(count)]


LABEL = Kind("label", Label)
KINDS = (LABEL, Kind("text of 200", str, 200), Kind("text of 2,000", str, 2_000))


def _words(draw: random.Random, chars: int) -> str:
    text = ""
    while len(text) < chars:
        text += draw.choice(_PHRASES) + ", "
    return text[:chars]


class Reply(msgspec.Struct, frozen=True):
    """What was asked, what came, and what is right.

    Attributes:
        ids: Asked for, in order.
        text: The reply.
        answers: The right answer to each id.
        output_type: What the callers asked for.
    """

    ids: list[str]
    text: str
    answers: list[str]
    output_type: Any


def reply(kind: Kind, count: int, seed: int) -> Reply:
    """Return a sound reply to *count* requests."""
    ids, answers = _ids(count, seed), kind.answers(count, seed)
    return Reply(ids, _whole([_element(*pair) for pair in zip(ids, answers, strict=True)]), answers, kind.output_type)


def _ids(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f"{number}{''.join(draw.choices(ALPHABET, k=5))}" for number in range(1, count + 1)]


def _element(name: str, answer: Any) -> str:
    return json.dumps({"id": name, "answer": answer}, separators=(",", ":"), ensure_ascii=False)


def _whole(elements: list[str]) -> str:
    return '{"results":[' + ",".join(elements) + "]}"


Pairs = list[tuple[str, Any]]

ITEMS = 10
"""Requests behind a damaged reply; small enough to count on one's fingers."""

_BROKEN = {
    "unescaped quotes": '"he said "no" to it"',
    "raw newline": '"one line\nand another"',
    "bad escape": r'"C:\shop"',
    "unterminated string": '"and so on',
}


def damaged(seed: int) -> dict[str, Reply]:
    """Return replies of `ITEMS` elements, by what is wrong with them."""
    ids = _ids(ITEMS, seed)
    answers = [f"answer to request {number}" for number in range(1, ITEMS + 1)]
    pairs: Pairs = list(zip(ids, answers, strict=True))
    whole = _whole([_element(*pair) for pair in pairs])
    inner = whole.removeprefix('{"results":').removesuffix("}")
    texts = {
        "nothing": whole,
        "code fence": f"```json\n{whole}\n```",
        "prose with brackets before": f"Here are the [{ITEMS}] results, as {{asked}}:\n{whole}",
        "bare array": inner,
        "cut in element 8": whole[: whole.index(ids[7]) + 20],
        "trailing comma": whole.replace("]}", ",]}"),
        **{f"5: {what}": whole.replace('"answer to request 5"', said) for what, said in _BROKEN.items()},
    }
    texts |= {what: _whole([_element(*pair) for pair in change(pairs)]) for what, change in _MIXED_UP.items()}
    return {what: Reply(ids, text, answers, str) for what, text in texts.items()}


def _replaced(at: int, name: Callable[[Pairs], str]) -> Callable[[Pairs], Pairs]:
    """Return what puts another id on the element at *at*."""
    return lambda pairs: [*pairs[:at], (name(pairs), pairs[at][1]), *pairs[at + 1 :]]


_MIXED_UP: dict[str, Callable[[Pairs], Pairs]] = {
    "5: wrong type": lambda pairs: [*pairs[:4], (pairs[4][0], 5), *pairs[5:]],
    "5 missing": lambda pairs: pairs[:4] + pairs[5:],
    "4 and 5 change places": lambda pairs: [*pairs[:3], pairs[4], pairs[3], *pairs[5:]],
    "5: unknown id": _replaced(4, lambda _: "5zzzzz"),
    "5: the number alone": _replaced(4, lambda _: "5"),
    "5: id of 4 again": _replaced(4, lambda pairs: pairs[3][0]),
    "4: id of 5": _replaced(3, lambda pairs: pairs[4][0]),
    "2 said anew at the end": lambda pairs: [*pairs, (pairs[1][0], "another answer")],
    "4 and 5: each other's ids": lambda pairs: [
        *pairs[:3],
        (pairs[4][0], pairs[3][1]),
        (pairs[3][0], pairs[4][1]),
        *pairs[5:],
    ],
}
