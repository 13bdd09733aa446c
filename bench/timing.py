"""Measuring on a machine that others use too: alternate, take medians, compare within one run."""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self, TypeVar

    Sample = TypeVar("Sample")


class Stopwatch:
    """Wall and processor seconds of a block.

    Attributes:
        wall: Seconds that passed.
        cpu: Seconds of processor time that this process used, in all its threads.
    """

    wall = cpu = 0.0

    def __enter__(self) -> Self:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def alternate(cases: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """Run every case once a round, after a full garbage collection each, so that a busy minute of the machine strikes all alike.

    Returns:
        The samples of each case, in the order of the rounds: samples of the same place were taken next to each other.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            gc.collect()
            samples[name].append(case())
    return samples


def ratios(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return how many times the *base* of its own round each sample is."""
    return [mine / floor for mine, floor in zip(samples, base, strict=True)]


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which *share* of *values* lie, interpolated; of a single value, that value."""
    if len(values) == 1:
        return values[0]
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the least, the median and the greatest of *values*."""
    return min(values), statistics.median(values), max(values)


def chunks(text: str, size: int) -> Iterator[str]:
    """Cut *text* into pieces of *size* characters."""
    return (text[at : at + size] for at in range(0, len(text), size))
