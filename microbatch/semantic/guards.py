"""Facts in which two questions must be equal before their similarity counts. Pure.

Vectors of questions hardly change with a number, a negation or a swapped name, so the score of a pair cannot forbid an answer. What is
written can: each question has a `Signature`, the sequence of its facts, and two questions may share an answer only if the sequences are
equal and no words contradict each other. In doubt they do not. Doubtful is a text that is long, in another language than English (which
is recognised by its common words), in letters that are not Latin, or a formula or program: it equals only itself.

A token is a word if it consists of letters, and else a fact as a whole, so that no digit or symbol is ever ignored, closing punctuation
excepted. Not seen are names in lower case, and opposites that `microbatch.semantic.words` does not list.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import TYPE_CHECKING, Final, NamedTuple

from microbatch.semantic.words import (
    ABBREVIATIONS,
    AMBIGUOUS,
    DIRECTIONS,
    ENGLISH,
    EXACT,
    FOREIGN,
    FUNCTION,
    HOW,
    MODALS,
    NEGATIVE_PREFIXES,
    OPPOSED,
    POLES,
    STARTERS,
    degree,
    stem,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

LONGEST: Final = 2_000
"""Characters of the longest text that is compared by its facts."""

Fact = tuple[str, str]
"""A kind and a value."""


class Signature(NamedTuple):
    """The facts that a text states, as far as it can be compared with that of another text.

    Attributes:
        facts: Its facts in order. A text that cannot be judged has one, of itself.
        words: The stems of its words with content, in order.
        poles: The poles of opposites in it, in order: an axis and one of its sides.
        openings: The stems of capitalised words at the beginning of sentences that may be names.
        directed: True if a word such as "from" or "than" gives the order of words a meaning.
    """

    facts: tuple[Fact, ...]
    words: tuple[str, ...] = ()
    poles: tuple[tuple[int, int], ...] = ()
    openings: frozenset[str] = frozenset()
    directed: bool = False


def refusal(asked: Signature, kept: Signature) -> str | None:
    """Return why the answer to the text *kept* may not be given to the text *asked*, as a kind of fact; None if nothing forbids it.

    It is symmetric, and None for equal texts. The kinds are "script", "language", "length", "formula", "urls", "codes", "quotes",
    "names", "numbers", "units", "dates", "negation", "quantities", "questions", "conditions", "comparison", "opposites" and "order".
    """
    if asked.facts != kept.facts:
        return _differing(asked.facts, kept.facts)
    if asked.words == kept.words and asked.poles == kept.poles:
        return None
    here, there = set(asked.words), set(kept.words)
    # A word that may be a name in one text has to be in the other one as well, in any case, and in the same order.
    if _reordered(asked.words, kept.words, asked.openings | kept.openings):
        return "names"
    if _turned(here - there, there) or _turned(there - here, here):
        return "negation"
    if asked.poles != kept.poles and _opposed(_by_axis(asked.poles), _by_axis(kept.poles)):
        return "opposites"
    if (here == there or (asked.directed and kept.directed)) and _reordered(asked.words, kept.words, here & there):
        return "order"
    return None


def _differing(asked: Sequence[Fact], kept: Sequence[Fact]) -> str:
    """Return the first kind, in the order of the alphabet, of which two sequences of facts have others; "order" if there is none."""
    for kind in sorted({kind for kind, _ in asked} | {kind for kind, _ in kept}):
        if [fact for fact in asked if fact[0] == kind] != [fact for fact in kept if fact[0] == kind]:
            return kind
    return "order"


def _turned(words: AbstractSet[str], others: AbstractSet[str]) -> bool:
    """Return whether one of *words* is one of *others* with a beginning or an ending that turns it around."""
    return any(
        (word.startswith(prefix) and word[len(prefix) :] in others) for word in words for prefix in NEGATIVE_PREFIXES
    ) or any(
        not others.isdisjoint((stem(word.removesuffix("less")), word.removesuffix("less") + "ful"))
        for word in words
        if word.endswith("less")
    )


def _by_axis(poles: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    sides: dict[int, list[int]] = {}
    for axis, pole in poles:
        sides.setdefault(axis, []).append(pole)
    return sides


def _opposed(asked: Mapping[int, Sequence[int]], kept: Mapping[int, Sequence[int]]) -> bool:
    """Return whether two texts have other poles of an axis that both have, or, with several poles of it, others in their order."""
    return any(
        set(asked[axis]) != set(kept[axis]) or (len(set(asked[axis])) > 1 and asked[axis] != kept[axis])
        for axis in asked.keys() & kept.keys()
    )


def _reordered(asked: Sequence[str], kept: Sequence[str], shared: AbstractSet[str]) -> bool:
    """Return whether the *shared* words are in another order, or another number of times."""
    return [word for word in asked if word in shared] != [word for word in kept if word in shared]


# --- what a text states


def signature(text: str) -> Signature:
    """Return the signature of *text*, in a time proportional to its length, up to `LONGEST` characters."""
    if len(text) > LONGEST:
        return _only_itself("length", text)
    text = unicodedata.normalize("NFC", text)
    if any(character.isalpha() and not _is_latin(character) for character in text):
        return _only_itself("script", text)
    plain = text.translate(_PLAIN)
    if _FORMULA.search(plain):
        return _only_itself("formula", text)
    reader = _Reader()
    for token in _tokens(plain):
        reader.read(token)
    if not reader.is_english:
        return _only_itself("language", text)
    return reader.signature([("quotes", found) for found in _quoted(plain)])


def _only_itself(kind: str, text: str) -> Signature:
    digest = hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return Signature(((kind, digest),))


def _is_latin(character: str) -> bool:
    return character <= "\u024f" or "\u1e00" <= character <= "\u1eff"


_PLAIN: Final = str.maketrans({
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\uff02", '"'),
    **dict.fromkeys("\u2018\u2019\u201b\u02bc", "'"),
    **dict.fromkeys("\u2014\u2015", " - "),
    "\u2026": "... ",
})  # fmt: skip
"""Quotation marks, apostrophes, long dashes and the ellipsis in one form each."""

_FORMULA: Final = re.compile(r"[={}<>|\\^]|\n[ \t]+\S")
_QUOTED: Final = re.compile(
    r"""```(.*?)(?:```|\Z)|`([^`]*)(?:`|\Z)|"([^"]*)(?:"|\Z)|(?<![^\W_])'([^']*)'(?![^\W_])""", re.DOTALL
)


def _quoted(text: str) -> Iterator[str]:
    """Yield the texts in quotation marks and backquotes; one that is not closed reaches to the end."""
    for found in _QUOTED.finditer(text):
        yield next(group for group in found.groups() if group is not None)


class _Token(NamedTuple):
    """A word: the text between white space, without punctuation around it.

    Attributes:
        opens: True if a sentence begins with it.
        closes: True if punctuation follows.
    """

    text: str
    opens: bool
    closes: bool


_SHORT_DASHES: Final = "-\u2013"
_AROUND: Final = "\"'`(["
_AFTER: Final = "\"'`)].,;:!?"
_AFTER_NUMBER: Final = frozenset("!'\"")
"""Punctuation that may be a part of the number before it: a factorial, feet or minutes, inches or seconds."""


def _tokens(text: str) -> Iterator[_Token]:
    opens = True
    for line in text.splitlines():
        opens = True
        for part in line.split():
            core = part.lstrip(_AROUND)
            bare = core.rstrip(_AFTER)
            tail = core[len(bare) :]
            if not bare:
                opens = opens or any(mark in part for mark in ".!?:")
                continue
            if tail[:1] in _AFTER_NUMBER and bare[-1].isdigit() and part[0] not in _AFTER_NUMBER:
                bare += tail[:1]
            yield _Token(bare, opens, closes=bool(tail))
            ends = any(mark in tail for mark in ".!?:;")
            opens = ends and not (tail == "." and (bare.lower() in ABBREVIATIONS or (len(bare) == 1 and bare != "I")))


_WORD: Final = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_DASHES: Final = re.compile(r"[-\u2010\u2011]")
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://|www\.|[^@]*[a-z0-9-]\.[a-z]{2,}(?:[/:?#]|$)", re.IGNORECASE)
_DATE: Final = re.compile(
    r"\d{1,4}([./-])\d{1,2}\1\d{1,4}|\d{1,2}/\d{1,2}|\d{1,2}(:\d{2})+([ap]\.?m)?|\d{1,2}[ap]\.?m|\d+(st|nd|rd|th)|(19|20)\d\d",
    re.IGNORECASE,
)
_NUMBER: Final = re.compile(r"[^\w\s]*\d[\d.,'_]*(?:[-\u2013]\d[\d.,'_]*)?[^\w\s]*")

_UNQUALIFIED: Final = frozenset(
    {"a", "an", "the", "my", "your", "our", "is", "was", "are", "were", "of", "i", "have", "has", "had", "and", "or"}
)
"""Words before a number that say nothing about it."""

_UNQUALIFYING: Final = frozenset({"please", "thanks", "thank", "is", "was"})
"""Words after a number that say nothing about it."""

_VOWEL: Final = re.compile("[aeiouy]")
"""A word without any is an abbreviation or a code."""

_SHORTENED: Final = re.compile(r"'(?:m|re|ve|ll|d)$")
_CONTRACTED: Final = {"can't": "can", "won't": "will", "shan't": "shall", "ain't": "is"}


class _Reader:
    """Collects what the tokens of one text state."""

    def __init__(self) -> None:
        self._facts: list[Fact] = []
        self._words: list[str] = []
        self._poles: list[tuple[int, int]] = []
        self._openings: set[str] = set()
        self._directed = False
        self._negations: list[int] = []
        """Places of negations, among the facts, whose next word with content is still to come."""
        self._number: int | None = None
        """Place of a number whose next word is still to come."""
        self._before = ""
        self._after_name = self._after_how = False
        self._count = self._known = self._english = 0
        self._foreign = False

    @property
    def is_english(self) -> bool:
        """True if the words read so far are English ones, as far as that can be told."""
        if self._foreign:
            return False
        if self._english:
            return self._known * 5 >= self._count
        return self._known * 5 >= self._count * 2 and (self._known > 1 or not self._count)

    def signature(self, quotes: list[Fact]) -> Signature:
        facts, words = tuple(self._facts + quotes), tuple(self._words)
        return Signature(facts, words, tuple(self._poles), frozenset(self._openings), self._directed)

    def read(self, token: _Token) -> None:
        parts = _DASHES.split(token.text)
        if all(_is_word(part) and not _is_code(part) for part in parts):
            opens = token.opens
            for part in parts:
                self._word(part, opens=opens)
                opens = False
        elif token.text.strip(_SHORT_DASHES) or self._before[-1:].isdigit():
            self._other(token.text)
        if token.closes:
            self._number = None
            self._after_name = False

    def _other(self, text: str) -> None:
        """Read a token that is no word."""
        lower = text.lower()
        self._qualify(lower)
        if _URL.match(text) and not _NUMBER.fullmatch(text):
            self._facts.append(("urls", text))
        elif _DATE.fullmatch(text):
            self._facts.append(("dates", f"{self._qualifier()}{lower}"))
        elif _NUMBER.fullmatch(text) or text.isnumeric():
            self._facts.append(("numbers", f"{self._qualifier()}{text}"))
        else:
            self._facts.append(("codes", text))
        self._number = len(self._facts) - 1 if self._facts[-1][0] in {"dates", "numbers"} else None
        self._before, self._after_name, self._after_how = lower, False, False

    def _qualifier(self) -> str:
        return "" if self._before in _UNQUALIFIED else f"{self._before} "

    def _qualify(self, word: str) -> None:
        """Add the word after a number to it."""
        if self._number is not None and word not in _UNQUALIFYING:
            kind, value = self._facts[self._number]
            self._facts[self._number] = (kind, f"{value} {word}")
        self._number = None

    def _word(self, word: str, *, opens: bool) -> None:
        negated = word.lower().endswith("n't")
        lower = word.lower().removesuffix("'s")
        self._count += 1
        self._known += negated or lower in ENGLISH or lower in FUNCTION or lower in EXACT
        self._english += negated or (lower in ENGLISH and lower not in AMBIGUOUS)
        # "La Paz" is a name in English texts as well.
        self._foreign = self._foreign or (lower in FOREIGN and lower not in EXACT and (opens or not word.istitle()))
        self._qualify(lower)
        self._name(word.removesuffix("'s"), lower, opens=opens)
        if negated:
            lower = _CONTRACTED.get(lower, lower.removesuffix("n't"))
            self._negate(f"{MODALS.get(lower, '')}not")
        elif lower in EXACT:
            kind, value = EXACT[lower]
            if kind == "negation":
                self._negate(f"{MODALS.get(self._before, '')}{value}" if value == "not" else value)
            else:
                self._facts.append((kind, value))
        elif self._after_how and lower in HOW:
            self._facts.append(("questions", f"how {lower}"))
        elif lower.isascii() and (len(lower) == 1 or not _VOWEL.search(lower)) and lower not in {"a", "i"}:
            self._facts.append(("codes", lower))
        self._content(_SHORTENED.sub("", lower))
        self._before, self._after_how = lower, lower == "how"

    def _negate(self, value: str) -> None:
        self._negations.append(len(self._facts))
        self._facts.append(("negation", value))
        self._words.append(value)  # its place among the words is the order of what it negates

    def _content(self, lower: str) -> None:
        root = stem(lower)
        if lower in OPPOSED or lower not in FUNCTION:  # "here" has the stem of "her"
            self._poles.extend(POLES.get(root, ()))
        self._directed = self._directed or lower in DIRECTIONS
        if ending := degree(lower):
            self._facts.append(("comparison", ending))
        if lower in FUNCTION or EXACT.get(lower, ("", ""))[0] == "negation":
            return
        self._words.append(root)
        for place in self._negations:
            kind, value = self._facts[place]
            self._facts[place] = (kind, f"{value} {root}")
        self._negations.clear()

    def _name(self, word: str, lower: str, *, opens: bool) -> None:
        capital = word[:1].isupper()
        if word == "I" or word.startswith("I'"):
            # The pronoun, unless it is a number: "Henry I".
            if self._after_name and word == "I":
                self._facts.append(("names", word))
            self._after_name = False
        elif capital and (not opens or (len(word) > 1 and word.isupper())):
            self._facts.append(("names", word))
            self._after_name = True
        else:
            if capital and lower not in STARTERS:
                self._openings.add(stem(lower))
            self._after_name = capital and lower not in STARTERS


def _is_word(part: str) -> bool:
    """Return whether *part* consists of letters, with apostrophes between them: "½" and the last of "km²" are none."""
    return _WORD.fullmatch(part) is not None and part.replace("'", "").isalpha()


def _is_code(word: str) -> bool:
    """Return whether capitals inside a word make it one to be compared as it is written: "iPhone", "ATMs"."""
    inner = word.replace("'", "")[1:].removesuffix("s") if word.endswith("'s") else word[1:]
    return any(character.isupper() for character in inner) and not word.isupper()
