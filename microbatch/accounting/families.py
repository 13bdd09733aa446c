"""Metrics counted by several processes, which add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

_CREATED = "_created"
"""Ending of the samples that tell when counting began."""


class Family(msgspec.Struct):
    """A counter or a histogram with the samples that were counted.

    Attributes:
        name: Its name without the ending of counters.
        kind: "counter" or "histogram".
        text: Its description.
        samples: For each sample its name, its labels and its value.
    """

    name: str
    kind: str
    text: str
    samples: list[tuple[str, dict[str, str], float]]


def added(parts: Iterable[Iterable[Family]]) -> list[Family]:
    """Return the families of several processes, with the sums of their samples, and the earliest of their beginnings."""
    families: dict[str, Family] = {}
    totals: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for part in parts:
        for family in part:
            families.setdefault(family.name, family)
            sums = totals.setdefault(family.name, {})
            for name, labels, value in family.samples:
                key = (name, tuple(labels.items()))
                before = sums.get(key)
                if before is None:
                    sums[key] = value
                else:
                    sums[key] = min(before, value) if name.endswith(_CREATED) else before + value
    return [
        msgspec.structs.replace(
            family, samples=[(name, dict(labels), value) for (name, labels), value in totals[family.name].items()]
        )
        for family in families.values()
    ]
