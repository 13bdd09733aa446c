"""What went wrong, told once for all items it went wrong for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from microbatch.cli.console import plural

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_KINDS = 20
MAX_EXAMPLES = 5


class _Kind(msgspec.Struct):
    count: int
    examples: list[str]


class Failures:
    """Counts failures of the same kind and remembers the first few of each."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._others = 0

    def add(self, problem: str, example: str, place: str = "") -> None:
        """Note one.

        Args:
            problem: What is wrong, in words that are the same for all failures of a kind.
            example: The line or id it is wrong with.
            place: What to say before the examples.
        """
        kind = self._kinds.get((place, problem))
        if kind is None:
            if len(self._kinds) >= MAX_KINDS:
                self._others += 1
                return
            kind = self._kinds[place, problem] = _Kind(0, [])
        kind.count += 1
        if len(kind.examples) < MAX_EXAMPLES:
            kind.examples.append(example)

    def told(self, others: str = "") -> Iterator[str]:
        """Yield a line for each kind.

        Args:
            others: What to say of kinds beyond the first `MAX_KINDS`.
        """
        for (place, problem), kind in self._kinds.items():
            rest = kind.count - len(kind.examples)
            more = f" and {rest:,} more" if rest else ""
            yield f"{place}{', '.join(kind.examples)}{more}: {problem}"
        if self._others:
            yield f"and {plural(self._others, 'failure')} of other kinds{others}"
