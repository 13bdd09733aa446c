"""The ways to take a combined reply apart, each as one would write it with that library.

All are told the ids asked for and the output type, are fed the text as an event stream hands it over, as `str`, and settle
futures by position. What keeps ids in a dict settles the first answer that an id gets and leaves out ids nobody asked for.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import ijson
import jiter
import msgspec
import partial_json_parser

from microbatch.prompt.demultiplexer import Demultiplexer
from microbatch.schema.answer_type import answer_type

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.demux.replies import Reply

    Settle = Callable[[int, Any], object]
    """Takes a request's position and its answer, once."""

T = TypeVar("T")


class Reader(Protocol):
    """Takes one reply apart."""

    def __init__(self, reply: Reply, settle: Settle) -> None: ...

    def feed(self, piece: str) -> None:
        """Take the next piece."""

    def close(self) -> None:
        """The reply is over."""


class Microbatch:
    """The demultiplexer, driven as `microbatch.batching.dispatch` drives it: ids in order, answers decoded to their type."""

    def __init__(self, reply: Reply, settle: Settle) -> None:
        decode = answer_type(reply.output_type).decode
        self._demultiplexer = Demultiplexer(reply.ids, [decode] * len(reply.ids))
        self._settle = settle

    def feed(self, piece: str) -> None:
        answers = self._demultiplexer.feed(piece)
        if answers:
            self._deliver(answers)

    def close(self) -> None:
        self._deliver(self._demultiplexer.close())

    def _deliver(self, answers) -> None:
        settle = self._settle
        for index, (output, _) in answers:
            settle(index, output)


class _ById:
    """What the others share: a dict of those that still wait, by id."""

    def __init__(self, reply: Reply, settle: Settle) -> None:
        self._waiting = dict(zip(reply.ids, range(len(reply.ids)), strict=True))
        self._settle = settle

    def _deliver(self, elements) -> None:
        waiting, settle = self._waiting, self._settle
        for element in elements:
            index = waiting.pop(element["id"], None)
            if index is not None:
                settle(index, element["answer"])


class Ijson(_ById):
    """Pushed into ijson's C backend, which hands over each element as it closes."""

    def __init__(self, reply: Reply, settle: Settle) -> None:
        super().__init__(reply, settle)
        self._ended = ijson.sendable_list()
        self._parser = ijson.get_backend("yajl2_c").items_coro(self._ended, "results.item")

    def feed(self, piece: str) -> None:
        try:
            self._parser.send(piece.encode())
        finally:  # what ended before the damage counts
            if self._ended:
                self._deliver(self._ended)
                self._ended.clear()

    def close(self) -> None:
        self._parser.close()


class IjsonTyped(Ijson):
    """The same, and every answer is checked against its type, as the demultiplexer does it."""

    def __init__(self, reply: Reply, settle: Settle) -> None:
        output_type, convert = reply.output_type, msgspec.convert

        def checked(index: int, answer: Any) -> None:
            try:
                output = convert(answer, output_type)
            except msgspec.ValidationError:
                return
            settle(index, output)

        super().__init__(reply, checked)


class _Reparsed(_ById):
    """Parse all that has come anew; every element but the last has ended, and the last when the reply is over."""

    def __init__(self, reply: Reply, settle: Settle) -> None:
        super().__init__(reply, settle)
        self._seen = 0

    def _deliver_ended(self, parsed: Any, *, over: bool) -> None:
        elements = parsed.get("results") or []
        ended = len(elements) if over else len(elements) - 1
        if ended > self._seen:
            self._deliver(elements[self._seen : ended])
            self._seen = ended


class Jiter(_Reparsed):
    """jiter's partial mode on every piece."""

    def __init__(self, reply: Reply, settle: Settle) -> None:
        super().__init__(reply, settle)
        self._text = bytearray()

    def feed(self, piece: str) -> None:
        self._text += piece.encode()
        self._deliver_ended(jiter.from_json(bytes(self._text), partial_mode=True), over=False)

    def close(self) -> None:
        self._deliver_ended(jiter.from_json(bytes(self._text)), over=True)


class JiterAtBraces(Jiter):
    """jiter's partial mode on the pieces that hold a closing brace: without one nothing can have ended."""

    def feed(self, piece: str) -> None:
        if "}" in piece:
            super().feed(piece)
        else:
            self._text += piece.encode()


class PartialJsonParser(_Reparsed):
    """partial-json-parser on every piece."""

    def __init__(self, reply: Reply, settle: Settle) -> None:
        super().__init__(reply, settle)
        self._text = ""

    def feed(self, piece: str) -> None:
        self._text += piece
        self._deliver_ended(partial_json_parser.loads(self._text), over=False)

    def close(self) -> None:
        self._deliver_ended(json.loads(self._text), over=True)


class JsonWhole(_ById):
    """Collect, and decode once at the end with the standard library."""

    def __init__(self, reply: Reply, settle: Settle) -> None:
        super().__init__(reply, settle)
        self._pieces: list[str] = []
        self.feed = self._pieces.append

    def close(self) -> None:
        self._deliver(json.loads("".join(self._pieces))["results"])


class ByPosition(JsonWhole):
    """The same, but ids are not looked at: the first answer is the first request's."""

    def _deliver(self, elements) -> None:
        for index, element in zip(self._waiting.values(), elements, strict=False):
            self._settle(index, element["answer"])


class _Element(msgspec.Struct, Generic[T]):
    id: str
    answer: T


class _Results(msgspec.Struct, Generic[T]):
    results: list[_Element[T]]


_decoders: dict[Any, Callable[[str], Any]] = {}  # built once, as one would


class MsgspecWhole(_ById):
    """Collect, and decode once at the end with msgspec, which checks every answer's type."""

    def __init__(self, reply: Reply, settle: Settle) -> None:
        super().__init__(reply, settle)
        if reply.output_type not in _decoders:
            _decoders[reply.output_type] = msgspec.json.Decoder(_Results[reply.output_type]).decode
        self._decode = _decoders[reply.output_type]
        self._pieces: list[str] = []
        self.feed = self._pieces.append

    def close(self) -> None:
        waiting = self._waiting
        for element in self._decode("".join(self._pieces)).results:
            index = waiting.pop(element.id, None)
            if index is not None:
                self._settle(index, element.answer)


OURS = "microbatch"
WHOLE = "msgspec, whole reply"
STREAMED_PEER = "ijson yajl2_c"
CHECKED_PEER = "ijson, types checked"

BY_NAME: dict[str, type[Reader]] = {
    OURS: Microbatch,
    STREAMED_PEER: Ijson,
    CHECKED_PEER: IjsonTyped,
    "jiter, every chunk": Jiter,
    "jiter, chunks with }": JiterAtBraces,
    "partial-json-parser": PartialJsonParser,
    "json.loads, whole reply": JsonWhole,
    WHOLE: MsgspecWhole,
}

REPARSING = {"jiter, every chunk", "jiter, chunks with }", "partial-json-parser"}
"""Those whose time grows with the square of the reply."""
