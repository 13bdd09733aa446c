r"""Demultiplexing of a combined reply while it streams in.

Theory of operation
-------------------
The reply is searched for *elements*, objects that begin `{"id":`. Text between them (the array around them, fences,
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

The number in front of an id is never accepted alone, because a model that has lost count continues counting.

*Thoughts* hold drafts: objects under the right ids, in the right form. A mark that ends a thought, outside of the elements, makes
drafts of all elements before it, as soon as an element follows; those between the two marks of a thought are drafts in any case. A
thought need not have an opening mark, and a delivered answer cannot be taken back. So answers are delivered early only while nothing
but JSON syntax and fences stands before and between them, or after the end of a thought; prose could be a thought. No held answer is
delivered of a reply that ends at the token limit in such prose, or before an element has followed a thought.

Cost is linear in the reply. Elements of the common shape are matched by one regular expression; all others go through
`ObjectScanner`, which accepts exactly the same grammar, so the pieces in which a reply arrives never change the outcome.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from microbatch.containment import contained
from microbatch.prompt.scanner import BROKEN, MORE, SCALAR, SPACE, STRING, ObjectScanner
from microbatch.thoughts import MARK, MARK_CHARS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

Fault = Literal["missing", "malformed", "repeated"]
Answer = tuple[int, Any]
"""An item's position among those asked for, and its decoded answer."""

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
# Text around elements that cannot be a thought: brackets, names of members, fences, a byte order mark.
_is_scaffolding = re.compile(r'(?:[\[\]{}:\ufeff]|"[^"\\]{0,64}"|```\w{0,16})*+').fullmatch
_MAX_SCAFFOLDING = 200

# An unfinished element up to this length is kept as it is and matched whole when a brace arrives; a longer one is scanned
# piece by piece, so that no character is looked at more than a few times.
_WINDOW = 512

_ASTRAY = 2
"""Useless elements past those asked for after which nothing more is expected of a reply."""


class _Element(msgspec.Struct):
    id: str
    answer: msgspec.Raw


_decode_element = msgspec.json.Decoder(_Element).decode


class _Part(msgspec.Struct):
    """The elements found in one part of a reply: before, within or after a thought.

    Attributes:
        elements: Elements that are sound JSON, whatever their id.
        held: The JSON of answers that wait for the end of the reply, by item.
        copies: Elements seen for an item that were not delivered at once.
        malformed: The beginning of the latest unusable element of an item.
        damaged: Whether anything but the elements asked for, in order, was found.
        prefaced: Whether prose stands before the first element.
        astray: Elements at the end that were not asked for, or not once more.
        latest: The furthest item that has had an element outside the common shape; -1 for none.
        disordered: Whether an element was not asked for, repeated, or out of order.
    """

    next: int = 0
    elements: int = 0
    held: dict[int, str] = msgspec.field(default_factory=dict)
    copies: dict[int, int] = msgspec.field(default_factory=dict)
    malformed: dict[int, str] = msgspec.field(default_factory=dict)
    unknown_ids: int = 0
    damaged: bool = False
    prefaced: bool = False
    astray: int = 0
    latest: int = -1
    disordered: bool = False


def _same(one: str, other: str) -> bool:
    """Return whether two pieces of JSON have the same value."""
    try:
        return one == other or msgspec.json.decode(one) == msgspec.json.decode(other)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return False


class Demultiplexer:
    """Assigns the elements of one combined reply to the items asked for.

    Args:
        ids: The ids asked for, in order.
        decoders: For each id, the decoder of its answer's JSON; an exception means that the answer does not fit.
        early: Deliver in-order answers at once; otherwise all are held to the end of the reply.

    Attributes:
        late_duplicates: Copies of delivered answers that were dropped.
        thought: Whether the reply holds a thought.
        drafts: Whether a delivered answer may have been a draft: a thought ended after it, or a different answer followed.
        errors: For an item whose answer did not decode, the error.
    """

    def __init__(self, ids: Sequence[str], decoders: Sequence[Callable[[str], Any]], *, early: bool = True) -> None:
        self._ids = ids
        self._index: dict[str, int] = {}  # filled when an element comes that is not the next one in the common shape
        self._decoders = decoders
        self._early = early
        self._eager = early  # whether answers in order are delivered at once while nothing is damaged
        self._given: list[str] = []  # the JSON of the answers delivered so, which are the first ones
        self._part = _Part()
        self._before: _Part | None = None  # the part before a thought that has begun and not ended
        self._ended = False  # a thought has ended, and no element has followed yet
        self._kept: list[str] = []  # undecided text, in pieces
        self._kept_chars = 0
        self._scanner: ObjectScanner | None = None  # at work on the element that `_kept` begins with
        self._gap = ""  # the text between the last element or mark and the next, without separators
        self.thought: bool = False
        self.drafts: bool = False
        self.late_duplicates: int = 0
        self.errors: dict[int, BaseException | None] = {}

    @property
    def damaged(self) -> bool:
        """True if anything but the elements asked for, in order, was found."""
        return self._part.damaged

    @property
    def unknown_ids(self) -> int:
        """Elements whose id was not asked for."""
        return self._part.unknown_ids

    @property
    def disordered(self) -> bool:
        """True if an element was not asked for, repeated, or out of order."""
        return self._part.disordered

    @property
    def past_the_end(self) -> bool:
        """True if there are two elements more than were asked for, and the last two are of no use."""
        return self._part.astray >= _ASTRAY and self._part.elements >= len(self._ids) + _ASTRAY

    def feed(self, text: str) -> list[Answer]:
        """Take the next piece of the reply; return the answers that can be delivered now."""
        self._kept.append(text)
        self._kept_chars += len(text)
        if self._scanner is not None:
            end = self._scanner.feed(text)
            if end == MORE:
                return []
            if end != BROKEN:
                end += self._kept_chars - len(text)
            return self._resume(self._take_kept(), end)
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
        while text := self._take_kept():
            if self._scanner is not None or _marker(text):
                # An unfinished element will not end now. Look inside it, as after any damage.
                delivered += self._resume(text, BROKEN)
            else:
                self._outside(text, 0, len(text))
        before = self._before
        if before is not None and (before.copies or before.next or before.damaged or not complete):
            self._part = before
        if not complete and (self._ended or self._part.prefaced):
            ended = False  # the end of a thought, or what follows it, was still to come
        if ended:
            for index, raw in sorted(self._part.held.items()):
                self._deliver(index, raw, delivered)
        else:
            self._part.held.clear()  # so that `faults` names them
        return delivered

    def faults(self) -> Iterator[tuple[int, Fault, str]]:
        """Yield each item without an answer, the reason, and the beginning of what the reply held for it. Valid after `close`."""
        for index in range(len(self._given), len(self._ids)):
            if self._part.copies.get(index, 0) > 1:
                yield index, "repeated", ""
            elif index in self._part.malformed:
                yield index, "malformed", self._part.malformed[index]
            elif index not in self._part.held:
                yield index, "missing", ""

    def _outside(self, text: str, pos: int, end: int, *, rest: int = 0) -> int:
        """Note the text from *pos* to *end*, in which no element begins; return the position up to which it was noted.

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
        """Judge the text before an element that begins."""
        if self._before is None:
            if self._ended:
                # A thought has ended before it, so all elements found so far were drafts.
                self._part = self._fresh_part()
                self.drafts = self.drafts or bool(self._given)
                self._eager = self._early
                self._ended = False
            if len(self._gap) > _MAX_SCAFFOLDING or not _is_scaffolding(self._gap):
                part = self._part
                self._eager = False
                part.prefaced = part.prefaced or not (part.copies or self._given or part.damaged)
        self._gap = ""

    def _thought_begins(self) -> None:
        self.thought = True
        self._eager = False
        self._gap = ""
        if self._before is None:
            self._before, self._part = self._part, self._fresh_part()

    def _thought_ends(self) -> None:
        self.thought = self._ended = True
        self._gap = ""
        if self._before is not None:
            self._part, self._before = self._before, None

    def _fresh_part(self) -> _Part:
        """Return a part without elements; delivered answers stay delivered."""
        return _Part(len(self._given), len(self._given))

    def _take_kept(self) -> str:
        text = "".join(self._kept)
        self._kept, self._kept_chars = [], 0
        return text

    def _keep(self, text: str) -> None:
        if text:
            self._kept, self._kept_chars = [text], len(text)

    def _resume(self, text: str, end: int) -> list[Answer]:
        """Decide the element that *text* begins with, which ended at *end* or is BROKEN, and search on behind it."""
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
            if self._eager and not self._part.damaged:
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
        part, decoders, ids, given = self._part, self._decoders, self._ids, self._given.append
        index, count, raw = part.next, len(ids), ""
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
        except BaseException as error:  # noqa: BLE001 as in _deliver, but for all the elements of a piece at once
            self._unfit(index, raw, error)
            part.copies[index] = 1
            part.elements += 1
        part.elements += index - part.next
        part.next = index
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
        self._part.damaged = True
        # Not beyond the window, where pieces and the whole reply could read different things.
        found = _readable_id(text, start, start + _WINDOW)
        index = self._find(found[1]) if found else None
        if index is not None:
            following = _marker(text, start + 1, start + _WINDOW)  # the answer to another item
            self._note(index, None, text[start : following.start() if following else start + _WINDOW])

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
        index, part = self._find(name), self._part
        if self._before is None:  # a thought may hold any number of drafts
            part.elements += 1
            fresh = index is not None and index >= part.next and index not in part.copies
            part.astray = 0 if fresh else part.astray + 1
        if index is None or index <= max(part.latest, part.next - 1):
            part.disordered = True
        else:
            part.latest = index
        if index == part.next and not part.damaged:
            if not self._eager:
                part.copies[index] = 1
                part.held[index] = raw
            elif self._deliver(index, raw, delivered):
                self._given.append(raw)
            else:
                part.copies[index] = 1
                return
            part.next = index + 1
        elif index is None:
            part.damaged = True
            part.unknown_ids += 1
        else:
            part.damaged = True
            self._note(index, raw, raw)

    def _note(self, index: int, raw: str | None, said: str) -> None:
        """Count a copy of an item's answer that cannot be delivered now; hold it if it is the only one."""
        part = self._part
        if index < len(self._given):
            if self._before is None:
                self.late_duplicates += 1
                self.drafts = self.drafts or not _same(said if raw is None else raw, self._given[index])
            return
        copies = part.copies[index] = part.copies.get(index, 0) + 1
        if copies > 1:
            part.held.pop(index, None)
        elif raw is None:
            part.malformed[index] = said[:_WINDOW]
        else:
            part.held[index] = raw

    def _deliver(self, index: int, raw: str, delivered: list[Answer]) -> bool:
        with contained() as decoding:  # a user's validator may raise anything
            delivered.append((index, self._decoders[index](raw)))
            return True
        self._unfit(index, raw, decoding.error)
        return False

    def _unfit(self, index: int, raw: str, error: BaseException | None) -> None:
        self.errors[index] = error
        self._part.damaged = True
        self._part.malformed[index] = raw[:_WINDOW]
