"""The questions of the benchmark: messages to a bank with their gold labels, other writings of them, and pairs that differ in a fact.

Everything that is not in the data set is made by rule, so that the right answer is known: another writing of a question has its label,
and a question that was changed in a fact has another answer.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import TYPE_CHECKING, NamedTuple

from bench.integrity.tasks import FILLS, INTENTS, _rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEPARTMENTS = {
    "account": "identity|source_of_funds|passcode|personal_details|terminate|age_limit|phone|country",
    "top-up": "top_up|topping_up|transfer_into|cheque",
    "transfers": "transfer|beneficiary|receiving_money",
    "cash": "cash|atm",
    "currency": "exchange|currency|currencies",
    "payments": "fee|charge|payment|refund|debit",
    "cards": "",
}
"""The departments that a label belongs to: the first of which the expression is found in it."""


def department(label: str) -> str:
    return next(name for name, words in DEPARTMENTS.items() if re.search(words, label, re.IGNORECASE))


TASKS: dict[str, Callable[[str], str]] = {"intents": str, "departments": department}
"""The answers that the model is asked for, from the gold label: the label itself, or the department that it belongs to."""


def labelled(folder: Path | None) -> dict[str, str]:
    """Return the label of each question, from banking77 in *folder*, or of generated ones with None."""
    if folder is not None:
        return {row["text"]: row["label"] for row in _rows(folder / "banking77_test.jsonl")}
    return {
        form.format(thing=thing, money=money): label
        for label, forms in INTENTS.items()
        for form, thing, money in itertools.product(forms, *FILLS.values())
    }


# --- other writings


CONTRACTIONS = {"I'm": "I am", "can't": "cannot", "n't": " not", "I've": "I have", "'ll": " will", "it's": "it is"}


def _plain(text: str) -> str:
    return text.lower().rstrip("?.! ")


def _expanded(text: str) -> str:
    for short, full in CONTRACTIONS.items():
        text = text.replace(short, full)
    return text


def _inner(text: str) -> str:
    """Return *text* as it stands inside a sentence."""
    return text if re.match(r"I\b|[A-Z]{2}", text) else text[:1].lower() + text[1:]


WRITINGS: tuple[Callable[[str], str], ...] = (
    str,
    str.lower,
    _plain,
    _expanded,
    lambda text: f"Hi, {_inner(text)}",
    lambda text: f"Hello! {text}",
    lambda text: f"{text} Thanks",
    lambda text: f"{text} Please help.",
    lambda text: f"{text.rstrip('?.! ')} please",
    lambda text: f"Good morning. {text}",
    lambda text: f"hey {_plain(text)}",
    lambda text: f"I have a question: {_inner(text)}",
)
"""Ways to write the same question."""


def written(gold: dict[str, str], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield *count* different texts with their labels: questions in the order and frequency of a popularity, in any of the writings."""
    draw, seen = random.Random(seed), set[str]()
    texts = draw.sample(list(gold), len(gold))
    weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(texts))))
    if count > len(texts) * len(WRITINGS) // 2:
        raise SystemExit(f"bench semantic: --requests {count} are too many for {len(texts)} questions")
    while len(seen) < count:
        (question,) = draw.choices(texts, cum_weights=weights)
        text = draw.choice(WRITINGS)(question)
        if text not in seen:
            seen.add(text)
            yield text, gold[question]


# --- pairs that differ in a fact


class Pair(NamedTuple):
    """A text with a question, what it is changed to in a fact, and the question alone."""

    text: str
    changed: str
    question: str


OPPOSITES = (
    *(("before", "after"), ("first", "last"), ("with", "without"), ("on", "off"), ("in", "out"), ("up", "down"), ("more", "less")),
    *(("always", "never"), ("all", "none"), ("open", "close"), ("lost", "found"), ("send", "receive"), ("deposit", "withdraw")),
    *(("activate", "deactivate"), ("block", "unblock"), ("debit", "credit"), ("virtual", "physical"), ("accepted", "declined")),
    *(("can", "must"), ("yesterday", "tomorrow"), ("increase", "decrease"), ("buy", "sell"), ("cheap", "expensive")),
    *(("add", "remove"), ("enable", "disable"), ("and", "or"), ("start", "stop"), ("new", "old"), ("right", "wrong")),
    *(("correct", "incorrect"), ("authorized", "unauthorized"), ("able", "unable"), ("my", "his"), ("my son", "my daughter")),
)  # fmt: skip
NAMES = ("Anna", "Bob", "Carla", "David", "Tesco", "Amazon", "Lidl", "Paris", "London", "Berlin")


def _opposite(text: str, draw: random.Random) -> str | None:
    swaps = dict([*OPPOSITES, *((other, one) for one, other in OPPOSITES)])
    found = [one for one in swaps if re.search(rf"\b{one}\b", text)]
    if not found:
        return None
    one = draw.choice(found)
    return re.sub(rf"\b{one}\b", swaps[one], text, count=1)


def _negation(text: str, _: random.Random) -> str | None:
    """Return *text* with a negation taken away, or else one put after its first auxiliary verb."""
    for negation, positive in (("can't", "can"), ("cannot", "can"), ("n't", ""), (" not ", " ")):
        if negation in text:
            return text.replace(negation, positive, 1)
    changed = re.sub(r"\b(is|are|was|were|can|do|does|did|has|have|will|would|should)( I| you| it| my \w+| there)?\b", r"\1\2 not", text, count=1, flags=re.IGNORECASE)  # fmt: skip
    return changed if changed != text else None


def _number(text: str, draw: random.Random) -> Pair:
    """Return a pair with another number: in the question if it has one, else in a remark."""
    found = re.search(r"\d", text)
    if found is not None:
        other = draw.choice([digit for digit in "123456789" if digit != found[0]])
        return Pair(text, text[: found.start()] + other + text[found.end() :], text)
    form = draw.choice(
        ("{} It was about {}0 euros.", "{} I have {} cards.", "{} It was {} days ago.", "{} It is for {} %.")
    )
    return Pair(form.format(text, draw.choice("1234")), form.format(text, draw.choice("56789")), text)


def _filled(*forms: str, fills: tuple[str, ...]) -> Callable[[str, random.Random], Pair]:
    """Return a rule that puts one of the first half of *fills* into a form, and then one of the second half; where two go, both in turn."""
    first, second = fills[: len(fills) // 2], fills[len(fills) // 2 :]

    def rule(text: str, draw: random.Random) -> Pair:
        form, one, other = draw.choice(forms), draw.choice(first), draw.choice(second)
        return Pair(form.format(text, one, other), form.format(text, other, one), text)

    return rule


def _changed(rule: Callable[[str, random.Random], str | None]) -> Callable[[str, random.Random], Pair | None]:
    def pair(text: str, draw: random.Random) -> Pair | None:
        changed = rule(text, draw)
        return None if changed is None else Pair(text, changed, text)

    return pair


CHANGES: dict[str, Callable[[str, random.Random], Pair | None]] = {
    "negations": _changed(_negation),
    "opposites": _changed(_opposite),
    "numbers": _number,
    "names": _filled("{} It is about {}.", "{} I was at {} then.", "{} My friend {} says so.", fills=NAMES),
    "order of names": _filled("{} It went from {} to {}.", "{} {} paid {} for it.", fills=NAMES),
    "order": _filled("{} It went from {} to {}.", fills=("euros", "pounds", "dollars", "savings", "checking", "yen")),
    "codes": _filled(
        "{} My reference is {}.", "{} See order {}.", fills=("AB-1234", "X77f", "a@b.org", "AB-1243", "x77f", "b@a.org")
    ),
    "quotations": _filled(
        '{} The app says "{}".', "{} It says '{}' there.", fills=("pending", "failed", "Pending", "done")
    ),
    "URLs": _filled("{} I was at https://{} for it.", "{} It is on www.{}", fills=("bank.org/a", "bank.org/b")),
    "dates": _filled(
        "{} It was on {}.",
        "{} I need it by {}.",
        fills=("Monday", "5 May", "2024-05-06", "Tuesday", "6 May", "2024-05-16"),
    ),
}
"""Functions that make a pair from a question, or return None if it has nothing to be changed."""


def changes(gold: dict[str, str], count: int, seed: int) -> dict[str, list[Pair]]:
    """Return up to *count* pairs of each kind of change."""
    draw = random.Random(seed)
    made = {}
    for kind, rule in CHANGES.items():
        pairs = (rule(text, draw) for text in draw.sample(list(gold), len(gold)))
        made[kind] = list(itertools.islice((pair for pair in pairs if pair is not None), count))
    return made
