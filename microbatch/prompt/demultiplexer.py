r"""Takes a combined reply apart as it streams in, and says which answer belongs to which item.

Theory of operation
-------------------
The reply is searched for *elements*, objects that begin `{"id":`. All that stands between them (the array around them, fences,
prose) is skipped. An element ends where its JSON object ends. While nothing is damaged, an element whose id is the next one
asked for is decoded and *delivered at once*; these deliveries are a prefix of the items, in order.

*Damage* is an element that is not JSON, an answer that does not decode, an unknown, a repeated or an out-of-order id (which a
gap also shows as). After damage nothing is delivered early: answers are *held* until the end of the reply, because only then is
it known that no second copy of an id comes. An id seen twice is distrusted in all its copies that were not delivered yet,
since neither the first nor the last is known to be right; a copy of a delivered one is dropped and counted.

After an element that is not JSON, the search resumes one character behind its opening brace, so that damage costs only the
element itself; objects inside it that it had not closed are broken with it and are not scanned again. Resuming can take a
look-alike inside a broken answer for an element. It does no harm: its author would have had to know the unguessable id of
another item, and even then the true element makes it an id seen twice.

The number in front of an id is never accepted alone: a model that has lost count counts on.

*Thoughts* hold drafts: objects under the right ids, in the right form. A mark that ends a thought, outside of the elements, makes
drafts of all elements before it, as soon as an element follows; those between the two marks of a thought are drafts in any case. A
thought need not have a first mark, and what was delivered cannot be taken back. So answers are delivered early only as long as
nothing but the scaffolding of JSON and fences stands before and between them, or after the end of a thought: prose might be one.
And a reply that ends at the token limit in such prose, or before an element has followed a thought, has given none of what it holds.

Cost is linear in the reply. Elements of the common shape are matched by one regular expression; all others go through
`ObjectScanner`, which accepts exactly the same grammar, so the pieces in which a reply arrives never change the outcome.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from microbatch.prompt.scanner import BROKEN, MORE, SCALAR, SPACE, STRING, ObjectScanner
from microbatch.thoughts import MARK, MARK_CHARS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

Fault = Literal["missing", "malformed", "repeated"]
Answer = tuple[int, Any]
"""An item's position among those asked for, and what its decoder made of the answer."""

_PAIR = f"{STRING}{SPACE}:{SPACE}(?:{STRING}|{SCALAR})"
_FLAT_OBJECT = rf"\{{{SPACE}(?:{_PAIR}(?:{SPACE},{SPACE}{_PAIR})*+)?{SPACE}\}}"
_OPENING = r'\{[ \t\n\r]{0,16}+"id"[ \t\n\r]{0,16}+:'

_element = re.compile(
    rf"[ \t\n\r,]*+({_OPENING}{SPACE}"
    r'"([^"\\\x00-\x1f]*+)"'
    rf'{SPACE},{SPACE}"answer"{SPACE}:{SPACE}({STRING}|{SCALAR}|{_FLAT_OBJECT}){SPACE}\}})'
).match
_marker = re.compile(_OPENING).search
_text_answer = re.compile(rf'{_OPENING}{SPACE}"[^"\\\x00-\x1f]*+"{SPACE},{SPACE}"answer"{SPACE}:{SPACE}"').match
_readable_id = re.compile(rf'{_OPENING}{SPACE}"([^"\\\x00-\x1f]*+)"').match

_marks = MARK.finditer
_separators = re.compile(r"[ \t\n\r,]++").sub
# Text that may stand around elements that are no draft: brackets, names of members, fences, a byte order mark.
_is_scaffolding = re.compile(r'(?:[\[\]{}:\ufeff]|"[^"\\]{0,64}"|```\w{0,16})*+').fullmatch
_MAX_SCAFFOLDING = 200

# An unfinished element up to this length is kept as it is and matched whole when a brace arrives; a longer one is scanned
# piece by piece, so that no character is looked at more than a few times.
_WINDOW = 512


_ASTRAY = 2
"""Elements past those asked for after which a reply is taken to go on for nothing."""


class _Element(msgspec.Struct):
    id: str
    answer: msgspec.Raw


_decode_element = msgspec.json.Decoder(_Element).decode


class _Elements(msgspec.Struct):
    """Elements found in one part of a reply, before, within or after a thought."""

    held: dict[int, str]
    copies: dict[int, int]
    malformed: dict[int, str]
    next: int
    unknown_ids: int
    damaged: bool
    prefaced: bool
    elements: int
    astray: int = 0
    latest: int = -1
    disordered: bool = False

    @property
    def found(self) -> bool:
        """True if there was any element."""
        return bool(self.copies) or self.next > 0 or self.damaged


def _same(one: str, other: str) -> bool:
    """Return whether two pieces of JSON have the same value."""
    try:
        return one == other or msgspec.json.decode(one) == msgspec.json.decode(other)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return False


class Demultiplexer:
    """Feeds on the text of one combined reply.

    Args:
        ids: The ids asked for, in order.
        decoders: For each id, what turns the JSON text of an answer into a result; raising means the answer does not fit.
        early: Deliver in-order answers at once; otherwise all are held to the end of the reply.

    Attributes:
        damaged: Whether anything but the asked-for elements in order has been seen.
        late_duplicates: Copies of delivered answers that were dropped.
        unknown_ids: Elements whose id was not asked for.
        thought: Whether a thought was in the reply.
        drafts: Whether something was delivered that may have been a draft: a thought ended after it, or another answer followed.
        disordered: Whether one of them was not asked for, or came after one that was asked for later, or came twice.
    """

    __slots__ = (
        "_astray",
        "_copies",
        "_decoders",
        "_eager",
        "_early",
        "_elements",
        "_ended",
        "_gap",
        "_given",
        "_held",
        "_ids",
        "_index",
        "_kept",
        "_kept_chars",
        "_latest",
        "_malformed",
        "_next",
        "_prefaced",
        "_scanner",
        "_thinking",
        "damaged",
        "disordered",
        "drafts",
        "late_duplicates",
        "thought",
        "unknown_ids",
    )

    def __init__(self, ids: Sequence[str], decoders: Sequence[Callable[[str], Any]], *, early: bool = True) -> None:
        self._ids = ids
        self._index: dict[str, int] = {}  # made when an element comes that is not the next one in the common shape
        self._decoders = decoders
        self._early = early
        self._eager = early  # answers in order are delivered at once as long as this is so and nothing is damaged
        self._given: list[str] = []  # the JSON of the answers delivered so, which are the first ones
        self._next = 0  # the id expected next
        self._kept: list[str] = []  # text that is not decided on, in pieces
        self._kept_chars = 0
        self._scanner: ObjectScanner | None = None  # at work on the element that `_kept` begins with
        self._copies: dict[int, int] = {}
        self._held: dict[int, str] = {}
        self._malformed: dict[int, str] = {}
        self._gap = ""  # what stands between the last element or mark and the next, less separators
        self._prefaced = False  # prose stands before the first element
        self._thinking: _Elements | None = None  # what was found before the thought that has begun and not ended
        self._ended = False  # a thought has ended, and no element has followed yet
        self._latest = (
            -1
        )  # the furthest item that an element was for, once one has come that is not in the common shape
        self.thought = self.drafts = False
        self.damaged = False
        self.late_duplicates = 0
        self.unknown_ids = 0
        self.disordered = False
        self._elements = 0  # those that are sound JSON, whatever their id, less those in thoughts
        self._astray = 0  # those of them that came last and were not asked for, or not once more

    @property
    def past_the_end(self) -> bool:
        """True if there were two elements more than were asked for, and the last two were of no use."""
        return self._astray >= _ASTRAY and self._elements >= len(self._ids) + _ASTRAY

    def feed(self, text: str) -> list[Answer]:
        """Take the next piece of the reply; return the answers that can be delivered now."""
        self._kept.append(text)
        self._kept_chars += len(text)
        if self._scanner is not None:
            end = self._scanner.feed(text)
            if end == MORE:
                return []
            return self._resume(end if end == BROKEN else self._kept_chars - len(text) + end)
        if self._kept_chars <= _WINDOW and "}" not in text:
            return []  # nothing can have ended
        return self._search(self._take_kept(), 0)

    def close(self, *, ended: bool = True, complete: bool = True) -> list[Answer]:
        """End the reply; return the held answers that can be trusted.

        Args:
            ended: Whether the reply came to its own end (the token limit counts). If it was cut off, held answers are
                not trusted, because second copies may have been on their way.
            complete: Whether it was not the token limit that ended it.
        """
        delivered: list[Answer] = []
        while self._kept:
            # What is unfinished never ends now. Look inside it, as after any damage.
            unfinished = self._scanner is not None or _marker(self._peek_kept()) is not None
            if not unfinished:
                text = self._take_kept()
                self._outside(text, 0, len(text))
                break
            delivered += self._resume(BROKEN)
        if self._thinking is not None and (self._thinking.found or not complete):
            self._restore(self._thinking)
        if not complete and (self._ended or self._prefaced):
            ended = False  # the end of a thought, or what follows it, was still to come
        if ended:
            for index, raw in sorted(self._held.items()):
                self._deliver(index, raw, delivered)
        else:
            self._held.clear()  # so that `faults` names them
        return delivered

    def faults(self) -> Iterator[tuple[int, Fault, str]]:
        """Yield each item that got no answer, with the reason and what the reply said to it. Valid after `close`."""
        for index in range(len(self._given), len(self._ids)):
            if self._copies.get(index, 0) > 1:
                yield index, "repeated", ""
            elif index in self._malformed:
                yield index, "malformed", self._malformed[index]
            elif index not in self._held:
                yield index, "missing", ""

    def _outside(self, text: str, pos: int, end: int, *, rest: int = 0) -> int:
        """Take note of *text* from *pos* to *end*, where no element begins; return the place up to which that was done.

        The last *rest* characters are left for later, since a mark or an element may begin in them, unless a mark ends there.
        """
        if end - pos <= rest:
            return pos
        for mark in _marks(text, pos, end):
            self._note_gap(text[pos : mark.start()])
            if mark[1]:
                self._thought_begins()
            else:
                self._thought_ends()
            pos = mark.end()
        if end - rest > pos:
            self._note_gap(text[pos : end - rest])
            pos = end - rest
        return pos

    def _note_gap(self, text: str) -> None:
        if len(self._gap) <= _MAX_SCAFFOLDING:
            self._gap += _separators("", text)[: _MAX_SCAFFOLDING + 1]

    def _enter(self) -> None:
        """An element begins: judge what stands before it."""
        if self._thinking is not None:
            self._gap = ""
            return
        if self._ended:
            # A thought has ended before it, so all that was found so far were drafts.
            self._restore(self._nothing())
            self.drafts = self.drafts or bool(self._given)
            self._eager = self._early
            self._ended = False
        if len(self._gap) > _MAX_SCAFFOLDING or not _is_scaffolding(self._gap):
            self._eager = False
            self._prefaced = self._prefaced or not (self._copies or self._given or self.damaged)
        self._gap = ""

    def _thought_begins(self) -> None:
        self.thought = True
        self._eager = False
        self._gap = ""
        if self._thinking is None:
            self._thinking = _Elements(
                *(self._held, self._copies, self._malformed, self._next, self.unknown_ids),
                damaged=self.damaged,
                prefaced=self._prefaced,
                elements=self._elements,
                astray=self._astray,
                latest=self._latest,
                disordered=self.disordered,
            )
            self._restore(self._nothing())

    def _thought_ends(self) -> None:
        self.thought = self._ended = True
        self._gap = ""
        if self._thinking is not None:
            self._restore(self._thinking)
            self._thinking = None

    def _restore(self, found: _Elements) -> None:
        """Have found what *found* tells and no more; what was delivered stays delivered."""
        self._held, self._copies, self._malformed, self._next = found.held, found.copies, found.malformed, found.next
        self.unknown_ids, self.damaged, self._prefaced = found.unknown_ids, found.damaged, found.prefaced
        self._elements, self._astray = found.elements, found.astray
        self._latest, self.disordered = found.latest, found.disordered

    def _nothing(self) -> _Elements:
        """Return what is found before the first element of a part: nothing but what was delivered."""
        given = len(self._given)
        return _Elements({}, {}, {}, given, 0, damaged=False, prefaced=False, elements=given)

    def _peek_kept(self) -> str:
        if len(self._kept) > 1:
            self._kept = ["".join(self._kept)]
        return self._kept[0] if self._kept else ""

    def _take_kept(self) -> str:
        text = self._peek_kept()
        self._kept, self._kept_chars = [], 0
        return text

    def _keep(self, text: str) -> None:
        if text:
            self._kept, self._kept_chars = [text], len(text)

    def _resume(self, end: int) -> list[Answer]:
        """The kept text begins with an element that ended at *end*, or is BROKEN: decide it and search on behind it."""
        text = self._take_kept()
        scanner, self._scanner = self._scanner, None
        delivered: list[Answer] = []
        if end == BROKEN:
            found = _marker(text)
            start = self._outside(text, 0, found.start() if found else 0)
            self._broken(text, start)
            return self._search(text, start + 1, frozenset(scanner.opened if scanner is not None else ()))
        self._scanned(text[:end], delivered)
        return delivered + self._search(text, end)

    def _search(self, text: str, pos: int, broken: AbstractSet[int] = frozenset()) -> list[Answer]:
        """Decide all elements in *text* from *pos* on, those at *broken* as such; keep what is unfinished."""
        delivered: list[Answer] = []
        while True:
            if (self._gap or self._ended) and _element(text, pos):
                self._enter()
            if self._eager and not self.damaged:
                pos = self._in_order(text, pos, delivered)
            found = _element(text, pos)
            if found is not None and (not broken or found.start(1) not in broken):
                _, name, raw = found.groups()
                self._place(name, raw, delivered)
                pos = found.end()
                continue
            marker = _marker(text, pos)
            if marker is None:
                pos = self._outside(text, pos, len(text), rest=MARK_CHARS)
                self._keep(text[pos:])
                return delivered
            start = marker.start()
            moved = start > pos
            if moved:
                pos = self._outside(text, pos, start)
            if start in broken:
                self._broken(text, start)
                pos = start + 1
                continue
            if moved and _element(text, start):
                continue
            if len(text) - start <= _WINDOW and text.find("}", start) < 0:
                self._keep(text[start:])
                return delivered
            scanner, head = ObjectScanner(), _text_answer(text, start)
            end = scanner.feed(text, start) if head is None else scanner.feed_answer(text, start, head.end())
            if end == MORE:
                self._keep(text[start:])
                self._scanner = scanner
                return delivered
            if end == BROKEN:
                self._broken(text, start)
                broken = {start + place for place in scanner.opened}
                pos = start + 1
            else:
                self._scanned(text[start:end], delivered)
                pos = end

    def _in_order(self, text: str, pos: int, delivered: list[Answer]) -> int:
        """Deliver the elements from *pos* on as long as each is the next one asked for; return the place behind them."""
        index, decoders, ids, given = self._next, self._decoders, self._ids, self._given.append
        count, raw = len(ids), ""
        try:
            while index < count and (found := _element(text, pos)) is not None:
                _, name, raw = found.groups()
                if name != ids[index]:
                    break
                pos = found.end()
                delivered.append((index, decoders[index](raw)))
                given(raw)
                index += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001 see _deliver
            self._unfit(index, raw)
            self._copies[index] = 1
            self._elements += 1
        self._elements += index - self._next
        self._next = index
        return pos

    def _scanned(self, element: str, delivered: list[Answer]) -> None:
        """Decide an element that is sound JSON but not of the common shape."""
        try:
            decoded = _decode_element(element)
        except (msgspec.DecodeError, RecursionError, UnicodeError):
            self._broken(element, 0)
        else:
            self._place(decoded.id, bytes(decoded.answer).decode(), delivered)

    def _broken(self, text: str, start: int) -> None:
        """Note an element without a usable answer, at *start* in *text*; its id, if it can be read, counts as seen."""
        if self._gap or self._ended:
            self._enter()
        self.damaged = True
        # Not beyond the window, where pieces and the whole reply could read different things.
        found = _readable_id(text, start, start + _WINDOW)
        index = self._find(found[1]) if found else None
        if index is not None:
            self._note(index, None, text[start : start + _WINDOW])

    def _find(self, name: str) -> int | None:
        if not self._index:
            self._index = {each: index for index, each in enumerate(self._ids)}
        index = self._index.get(name)
        # Models copy the brackets or change the case; the letters still make the id unmistakable.
        return self._index.get(name.strip(" \t\r\n[]").lower()) if index is None else index

    def _place(self, name: str, raw: str, delivered: list[Answer]) -> None:
        """Decide an element with an id and an answer."""
        if self._gap or self._ended:
            self._enter()
        index = self._find(name)
        if self._thinking is None:  # a thought may hold any number of drafts
            self._elements += 1
            fresh = index is not None and index >= self._next and index not in self._copies
            self._astray = 0 if fresh else self._astray + 1
        if index is None or index <= max(self._latest, self._next - 1):
            self.disordered = True
        else:
            self._latest = index
        if index == self._next and not self.damaged:
            if not self._eager:
                self._copies[index] = 1
                self._held[index] = raw
            elif self._deliver(index, raw, delivered):
                self._given.append(raw)
            else:
                self._copies[index] = 1
                return
            self._next = index + 1
        elif index is None:
            self.damaged = True
            self.unknown_ids += 1
        else:
            self.damaged = True
            self._note(index, raw, raw)

    def _note(self, index: int, raw: str | None, said: str) -> None:
        """Count a copy of an item's answer that cannot be delivered now; hold it if it is the only one."""
        if index < len(self._given):
            if self._thinking is None:
                self.late_duplicates += 1
                self.drafts = self.drafts or not _same(said if raw is None else raw, self._given[index])
            return
        copies = self._copies[index] = self._copies.get(index, 0) + 1
        if copies > 1:
            self._held.pop(index, None)
        elif raw is None:
            self._malformed[index] = said[:_WINDOW]
        else:
            self._held[index] = raw

    def _deliver(self, index: int, raw: str, delivered: list[Answer]) -> bool:
        try:
            answer = self._decoders[index](raw)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001 a user's validator may raise anything; a Rust panic is no Exception
            self._unfit(index, raw)
            return False
        delivered.append((index, answer))
        return True

    def _unfit(self, index: int, raw: str) -> None:
        self.damaged = True
        self._malformed[index] = raw[:_WINDOW]
