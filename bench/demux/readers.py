"""The methods of taking a combined reply apart, each as one would write it with that library.

Each takes the ids asked for, the output type and a function that settles a request by its position, and returns two functions: one for
the next chunk, one for the end of the reply. Those that keep ids in a dict settle the first answer to an id and ignore unknown ids.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ijson
import jiter
import msgspec
import partial_json_parser

from microbatch.prompt.demultiplexer import Demultiplexer
from microbatch.schema.answer_type import answer_type

if TYPE_CHECKING:
    from collections.abc import Callable

    Settle = Callable[[int, Any], object]
    Reader = tuple[Callable[[str], object], Callable[[], object]]
    Method = Callable[[list[str], Any, Settle], Reader]

T = TypeVar("T")


def microbatch(ids: list[str], output_type: Any, settle: Settle) -> Reader:
    """The demultiplexer, driven as `microbatch.batching.dispatch` drives it: ids in order, answers decoded to their type."""
    demultiplexer = Demultiplexer(ids, [answer_type(output_type).decode] * len(ids))

    def deliver(answers: Any) -> None:
        for index, (output, _) in answers:
            settle(index, output)

    return lambda piece: deliver(demultiplexer.feed(piece)), lambda: deliver(demultiplexer.close())


def _by_id(ids: list[str], settle: Settle) -> Callable[[Any], None]:
    waiting = dict(zip(ids, range(len(ids)), strict=True))

    def deliver(elements: Any) -> None:
        for element in elements:
            index = waiting.pop(element["id"], None)
            if index is not None:
                settle(index, element["answer"])

    return deliver


def ijson_streamed(ids: list[str], output_type: Any, settle: Settle) -> Reader:  # noqa: ARG001, it has no types
    """ijson's C backend, which returns each element as it closes."""
    deliver, ended = _by_id(ids, settle), ijson.sendable_list()
    parser = ijson.get_backend("yajl2_c").items_coro(ended, "results.item")

    def feed(piece: str) -> None:
        try:
            parser.send(piece.encode())
        finally:  # what ended before the damage counts
            deliver(ended)
            ended.clear()

    return feed, parser.close


def ijson_checked(ids: list[str], output_type: Any, settle: Settle) -> Reader:
    """The same, and every answer is checked against its type, as the demultiplexer does it."""

    def checked(index: int, answer: Any) -> None:
        try:
            output = msgspec.convert(answer, output_type)
        except msgspec.ValidationError:
            return
        settle(index, output)

    return ijson_streamed(ids, output_type, checked)


def _again(partial: Callable[[str], Any], whole: Callable[[str], Any]) -> Method:
    """Parse the whole text again with every chunk; all elements but the last are complete, and the last at the end."""

    def method(ids: list[str], output_type: Any, settle: Settle) -> Reader:  # noqa: ARG001
        deliver, text, seen = _by_id(ids, settle), "", 0

        def feed(piece: str) -> None:
            nonlocal text, seen
            text += piece
            elements = partial(text).get("results") or []
            if len(elements) - 1 > seen:
                deliver(elements[seen:-1])
                seen = len(elements) - 1

        return feed, lambda: deliver(whole(text)["results"][seen:])

    return method


def _collected(deliver: Callable[[str], object]) -> Reader:
    """Collect the reply, and deliver it once at the end."""
    pieces: list[str] = []
    return pieces.append, lambda: deliver("".join(pieces))


def json_whole(ids: list[str], output_type: Any, settle: Settle) -> Reader:  # noqa: ARG001
    deliver = _by_id(ids, settle)
    return _collected(lambda text: deliver(json.loads(text)["results"]))


def by_position(ids: list[str], output_type: Any, settle: Settle) -> Reader:  # noqa: ARG001
    """Ignore the ids: the first answer is the first request's."""

    def deliver(text: str) -> None:
        for index, element in zip(range(len(ids)), json.loads(text)["results"], strict=False):
            settle(index, element["answer"])

    return _collected(deliver)


class _Element(msgspec.Struct, Generic[T]):
    id: str
    answer: T


class _Results(msgspec.Struct, Generic[T]):
    results: list[_Element[T]]


@cache
def _decoder(output_type: Any) -> Callable[[str], Any]:
    return msgspec.json.Decoder(_Results[output_type]).decode


def msgspec_whole(ids: list[str], output_type: Any, settle: Settle) -> Reader:
    """Decode at the end with msgspec, which checks every answer's type."""
    decode, waiting = _decoder(output_type), dict(zip(ids, range(len(ids)), strict=True))

    def deliver(text: str) -> None:
        for element in decode(text).results:
            index = waiting.pop(element.id, None)
            if index is not None:
                settle(index, element.answer)

    return _collected(deliver)


OURS = "microbatch"
WHOLE = "msgspec, whole reply"
STREAMED_PEER = "ijson yajl2_c"
CHECKED_PEER = "ijson, types checked"
REPARSING = {
    "jiter, every chunk": _again(
        lambda text: jiter.from_json(text.encode(), partial_mode=True), lambda text: jiter.from_json(text.encode())
    ),
    "partial-json-parser": _again(partial_json_parser.loads, json.loads),
}
METHODS: dict[str, Method] = {
    OURS: microbatch,
    STREAMED_PEER: ijson_streamed,
    CHECKED_PEER: ijson_checked,
    **REPARSING,
    "json.loads, whole reply": json_whole,
    WHOLE: msgspec_whole,
    "json.loads, by position": by_position,
}
