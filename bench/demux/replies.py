"""Combined replies as a model writes them, sound and damaged, with the right answers."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

from bench.questions import Label
from microbatch.demo import LABELS
from microbatch.prompt.compose import ALPHABET

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


class Kind(NamedTuple):
    """Answers of one size: labels, or texts of *chars* characters."""

    name: str
    output_type: Any
    chars: int = 0


LABEL = Kind("label", Label)
KINDS = (LABEL, Kind("text of 200", str, 200), Kind("text of 2,000", str, 2_000))


class Reply(NamedTuple):
    """A reply, the ids that were asked for in order, and the right answer to each."""

    ids: list[str]
    text: str
    answers: list[str]
    output_type: Any


def reply(kind: Kind, count: int, seed: int) -> Reply:
    """Return a sound reply to *count* requests."""
    draw = random.Random(seed)
    if kind.chars:
        words = [", ".join(draw.choices(_PHRASES, k=kind.chars // 10)) for _ in range(count)]
        answers = [text[: kind.chars] for text in words]
    else:
        answers = draw.choices(LABELS, k=count)
    ids = _ids(count, draw)
    return Reply(ids, _text(list(zip(ids, answers, strict=True))), answers, kind.output_type)


def _ids(count: int, draw: random.Random) -> list[str]:
    return [f"{number}{''.join(draw.choices(ALPHABET, k=5))}" for number in range(1, count + 1)]


def _text(pairs: list[tuple[str, Any]]) -> str:
    results = [{"id": name, "answer": answer} for name, answer in pairs]
    return json.dumps({"results": results}, separators=(",", ":"), ensure_ascii=False)


def damaged(seed: int) -> dict[str, Reply]:
    """Return replies to 10 requests, by what is wrong with them."""
    ids = _ids(10, random.Random(seed))
    answers = [f"answer to request {number}" for number in range(1, 11)]
    pairs: list[tuple[str, Any]] = list(zip(ids, answers, strict=True))
    whole = _text(pairs)

    def changed(at: int, name: str | None = None, answer: Any = None) -> str:
        """Return the reply with another id or answer at element *at*."""
        return _text([*pairs[: at - 1], (name or ids[at - 1], answer or answers[at - 1]), *pairs[at:]])

    texts = {
        "nothing": whole,
        "code fence": f"```json\n{whole}\n```",
        "prose with brackets before": f"Here are the [10] results, as {{asked}}:\n{whole}",
        "bare array": whole.removeprefix('{"results":').removesuffix("}"),
        "cut in element 8": whole[: whole.index(ids[7]) + 20],
        "trailing comma": whole.replace("]}", ",]}"),
        "5: unescaped quotes": whole.replace('"answer to request 5"', '"he said "no" to it"'),
        "5: raw newline": whole.replace('"answer to request 5"', '"one line\nand another"'),
        "5: bad escape": whole.replace('"answer to request 5"', r'"C:\shop"'),
        "5: unterminated string": whole.replace('"answer to request 5"', '"and so on'),
        "5: wrong type": changed(5, answer=5),
        "5 missing": _text(pairs[:4] + pairs[5:]),
        "4 and 5 change places": _text([*pairs[:3], pairs[4], pairs[3], *pairs[5:]]),
        "5: unknown id": changed(5, "5zzzzz"),
        "5: the number alone": changed(5, "5"),
        "5: id of 4 again": changed(5, ids[3]),
        "4: id of 5": changed(4, ids[4]),
        "2 said anew at the end": _text([*pairs, (ids[1], "another answer")]),
        "4 and 5: each other's ids": _text([*pairs[:3], (ids[4], answers[3]), (ids[3], answers[4]), *pairs[5:]]),
    }
    return {what: Reply(ids, text, answers, str) for what, text in texts.items()}
