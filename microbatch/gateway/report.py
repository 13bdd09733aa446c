"""The figures of one process of a gateway, which add up with those of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from microbatch.accounting.families import Family, added
from microbatch.accounting.live import LiveState  # noqa: TC001 the type of a field
from microbatch.accounting.stats import Stats, together
from microbatch.gateway.hour import HourState  # noqa: TC001 likewise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microbatch.accounting.budget import BudgetFigures


class Report(msgspec.Struct):
    """The figures of one process, or of several together.

    Attributes:
        stats: The figures of the batchers.
        live: Recent figures.
        hour: Those of the last hour.
        families: The metrics that were counted; empty without the package prometheus-client.
        texts: Texts that clients have asked the vectors of; they are among the items of the figures.
    """

    stats: Stats
    live: LiveState
    hour: HourState
    families: list[Family] = []
    texts: int = 0

    def ended(self) -> Report:
        """Return what remains when the process has ended: nothing waits any more."""
        return msgspec.structs.replace(self, stats=msgspec.structs.replace(self.stats, queued=0, in_flight=0))


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Report)


def total(reports: Sequence[Report]) -> Report:
    """Return what several processes have counted together; *reports*, at least one, are not changed."""
    if len(reports) == 1:
        return reports[0]
    copy = _decoder.decode(_encoder.encode(reports[0]))
    for other in reports[1:]:
        copy.live.add(other.live)
        copy.hour.add(other.hour)
    stats = together([report.stats for report in reports])
    copy.stats = msgspec.structs.replace(stats, budget=_freshest([report.stats.budget for report in reports]))
    copy.texts = sum(report.texts for report in reports)
    copy.families = added(report.families for report in reports)
    return copy


def _freshest(parts: Sequence[BudgetFigures | None]) -> BudgetFigures | None:
    """Return the figures of the budget that all share: those of the process that has seen most of what was spent."""
    found = [each for each in parts if each is not None]
    if not found:
        return None
    best = max(found, key=lambda each: (each.spent_usd or 0.0, each.spent_tokens))
    return msgspec.structs.replace(best, refused=sum(each.refused for each in found))
