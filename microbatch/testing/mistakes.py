"""Mistakes of a simulated model: some only in batches, some at every asking."""

from __future__ import annotations

import random
from collections.abc import Mapping  # noqa: TC003 the type of a field that is checked
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from microbatch.checking import Share, check_fields

if TYPE_CHECKING:
    from collections.abc import Callable

    Answer = Callable[[str, dict[str, Any] | None], Any]

_OTHER: Final = " (read in another way)"
"""Added to the text of an item to draw an answer that is wrong."""


@dataclass(kw_only=True)
class Mistakes:
    """The frequency of wrong answers of a simulated model.

    Args:
        by_size: Share of the items answered wrong in prompts of at least so many items; that of the largest such number counts. An
            item alone is answered wrong only if 1 is among them.
        noise: Share of the items, always the same, that are answered right or wrong by a coin at each asking, alone or not: two answers
            of the model differ in half of this share.
        seed: Makes the mistakes repeat in the next run.

    Raises:
        ConfigError: A share is not between 0 and 1, or a size is no whole number.
    """

    by_size: Mapping[int, Share] = field(default_factory=dict)
    noise: Share = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        self._random = random.Random(self.seed)  # noqa: S311 not a secret

    def answer(self, answer: Answer, text: str, schema: dict[str, Any] | None, size: int) -> Any:
        """Return the answer to an item with *text* in a prompt of *size* items; *answer* gives the right one."""
        share = self.by_size.get(max((least for least in self.by_size if least <= size), default=0), 0.0)
        wrong = self._random.random() < share
        unsure = random.Random(f"{self.seed} {text}").random() < self.noise  # noqa: S311 not a secret
        if unsure:
            wrong ^= self._random.random() < 0.5  # noqa: PLR2004 a coin
        right = answer(text, schema)
        return _another(answer, text, schema, right) if wrong else right


def _another(answer: Answer, text: str, schema: dict[str, Any] | None, right: Any) -> Any:
    """Return an answer that differs from the *right* one, the same each time; *right* if the schema allows no other."""
    labels = [label for label in (schema or {}).get("enum", []) if label != right]
    if labels:
        return random.Random(text).choice(labels)  # noqa: S311 not a secret
    for times in range(1, 9):
        other = answer(text + times * _OTHER, schema)
        if other != right:
            return other
    return right
