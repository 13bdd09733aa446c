"""Faults of the replies to embeddings calls. Pure: no I/O and no state."""

from __future__ import annotations

from array import array
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from microbatch.checking import check_fields
from microbatch.testing.faults import Selection

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

EmbeddingFault = Literal[
    "shuffled",  # the elements come in another order, each with its own index
    "wrong_index",  # one element's index is beyond the list
    "duplicate_index",  # one element has the index of its neighbour
    "missing_index",  # one element has no index
    "no_indices",  # no element has one, and they are in order
    "one_based",  # indices count from 1
    "string_indices",  # indices are strings
    "dropped",  # one element is left out, and its index is missing
    "renumbered",  # one element is left out, and those after it have moved up
    "extra",  # the last element comes again, under the index after it
    "empty",  # no element at all
    "wrong_dimensions",  # one vector lacks its last number
    "nan",  # one vector has a number that is none
    "null",  # null in the place of one vector
    "bad_base64",  # one vector in base64 lacks a byte; one of numbers has a string among them
    "floats",  # base64 was asked for, and numbers are sent
    "cut",  # the connection breaks in the middle of the reply
    "hang",  # nothing is ever answered
    "http_400",
    "http_429",
    "http_500",
]


class Element(msgspec.Struct):
    """An element of the reply.

    Attributes:
        index: Its index, msgspec.UNSET for none.
        vector: Its vector; None stands for null.
        damaged: Whether the vector is written so that it cannot be read.
    """

    index: Any
    vector: array[float] | None
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddingFaults(Selection):
    """The selection of replies to embeddings calls that go wrong, and their faults; see `Faults`.

    The kinds that need two texts do no harm to a call with one: "shuffled" and "duplicate_index".

    Args:
        kinds: One kind or several to draw from.
        rate: Share of the replies that go wrong, from 0 to 1.
        seed: Another seed makes other choices.
        limit: Most replies to spoil; None sets no limit.
        retry_after: Seconds that an "http_429" asks to wait, or None to leave that open.

    Raises:
        ConfigError: A kind is unknown, there is no kind, or a number is out of range.
    """

    kinds: EmbeddingFault | Sequence[EmbeddingFault]
    _: KW_ONLY

    def __post_init__(self) -> None:
        check_fields(self)
        self.check(self._kinds, EmbeddingFault)

    @property
    def _kinds(self) -> tuple[EmbeddingFault, ...]:
        return (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)

    def draw(self, number: int, spoiled: int) -> tuple[EmbeddingFault, random.Random] | None:
        """Decide about one reply, before which there were *number*, *spoiled* ones among them; return its fault, and where it is."""
        drawn = self.drawn(number, spoiled)
        return None if drawn is None else (drawn.choice(self._kinds), drawn)


def spoil(elements: list[Element], kind: EmbeddingFault, draw: random.Random) -> list[Element]:
    """Return *elements*, which are those of a sound reply, with a fault; they are changed."""
    at = draw.randrange(len(elements))
    one = elements[at]
    match kind:
        case "shuffled":
            return _shuffled(elements, draw)
        case "wrong_index":
            one.index = len(elements) + draw.randrange(3)
        case "duplicate_index" if len(elements) > 1:
            one.index = elements[at - 1].index if at else 1
        case "missing_index":
            one.index = msgspec.UNSET
        case "no_indices" | "one_based" | "string_indices":
            for element in elements:
                element.index = {"no_indices": msgspec.UNSET, "one_based": element.index + 1}.get(
                    kind, str(element.index)
                )
        case "dropped" | "renumbered":
            del elements[at]
            if kind == "renumbered":
                for place, element in enumerate(elements):
                    element.index = place
        case "extra":
            elements.append(Element(len(elements), elements[-1].vector))
        case "empty":
            return []
        case "wrong_dimensions" if one.vector is not None:
            one.vector = one.vector[:-1]
        case "nan" if one.vector is not None:
            one.vector = array("f", one.vector)
            one.vector[draw.randrange(len(one.vector))] = float("nan")
        case "null":
            one.vector = None
        case "bad_base64":
            one.damaged = True
        case _:
            pass
    return elements


def _shuffled(elements: list[Element], draw: random.Random) -> list[Element]:
    shuffled = draw.sample(elements, len(elements))
    return shuffled if shuffled != elements else elements[1:] + elements[:1]
