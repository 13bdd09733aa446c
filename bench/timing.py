"""Measurement on a machine that others use too: alternate, take medians, compare within one round."""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Self

Key, Sample = TypeVar("Key"), TypeVar("Sample")
median = statistics.median


class Stopwatch:
    """Wall and processor seconds of a block; processor time is that of all threads of this process."""

    wall = cpu = 0.0

    def __enter__(self) -> Self:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *raised: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def alternate(cases: Mapping[Key, Callable[[], Sample]], rounds: int) -> dict[Key, list[Sample]]:
    """Run every case once per round, after a full garbage collection, so that other load on the machine affects all alike.

    Returns:
        The samples of each case by round: samples at the same index were taken next to each other.
    """
    samples: dict[Key, list[Sample]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            gc.collect()
            samples[name].append(case())
    return samples


def ratio(samples: Iterable[float], base: Iterable[float]) -> float:
    """Return the median over the rounds of *samples* divided by the *base* of the same round."""
    return median(mine / floor for mine, floor in zip(samples, base, strict=True))


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which *share* of *values* lie, by linear interpolation."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def column(samples: Iterable[Mapping[str, float]], name: str) -> list[float]:
    return [sample[name] for sample in samples]
