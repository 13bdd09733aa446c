"""The audit of a run: its record beside the output, and which answers are asked for again.

The output is the journal: with an audit each line says which batch its answer came from, so no answer is kept in memory. When nothing
is left to ask, and no audit is under way, new tries of condemned sizes that are undecided are given up, and the output is read for
answers that the audits have made doubtful (see `microbatch.audit.lane_kind`). Those items are asked again, in the batches that are in
use by then, which are audited in turn, until no answer is doubtful. The last line of an id counts, and replaces the earlier ones when
the run ends.

The record of the audits is kept in OUTPUT.audit, without any text, so that a resumed run goes on with it. It is written at each
decision and before the first line of a new period, at most every tenth of a second otherwise, and at the end.

With stdout as the output there is no record, and nothing is asked again: doubtful answers are only counted.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.audit.lane_kind import LaneKind, step_of
from microbatch.cli.console import note
from microbatch.cli.writing.output import OutputFile, Provenance, replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from microbatch.accounting.audits import Audited
    from microbatch.batching.audits import Audits
    from microbatch.cli.writing.standard_output import StandardOutput
    from microbatch.messages import Reply, UseCache
    from microbatch.policy import AuditPolicy

SAVE_SECONDS: Final = 0.1
"""Seconds between two writes of the record: a kill loses the scores of so much time, and the audits that were under way."""


class Record(msgspec.Struct):
    """The content of OUTPUT.audit.

    Attributes:
        max_excess: The bound that the kinds of lanes were judged by.
        kinds: Their records.
    """

    max_excess: float
    kinds: list[LaneKind]


def record_path(output: str) -> Path:
    """Return the path of the record of the audits of *output*."""
    return Path(output + ".audit")


class AskingAgain:
    """The audit of a run into *output*, and the items that are asked again because of it. It is a hook of the batcher.

    Args:
        policy: The policy of the audit.
        items: The digests of the ids that can be asked again, those of the input.

    Attributes:
        pending: Digests of the ids that are being asked again.
        use_cache: True if the cache may answer them. It hands out no answers that it can tell are doubtful; an item that comes up
            once more is asked in any case, and the answer that the cache has is replaced.
        asked: Answers that were asked for again and replaced.
        largest: Requests in the largest batch that answered one of them.
        left: At the end, doubtful answers that were not replaced: the run has ended early, or asking again has failed.
    """

    def __init__(self, policy: AuditPolicy, output: OutputFile | StandardOutput, items: Container[int]) -> None:
        self.policy = policy
        self.pending: set[int] = set()
        self.use_cache: UseCache = True
        self.asked: int = 0
        self.largest: int = 0
        self.left: int = 0
        self._output = output
        self._items = items
        self._found: set[int] = set()  # asked again in this run
        self._in_vain: set[int] = set()  # and without an answer
        self._audits: Audits
        self._saved_at = float("-inf")  # loop time
        self._saved_periods: dict[tuple[str, int], int] = {}
        self._unwritable = False

    # --- the record

    def begin(self, audits: Audits) -> None:
        """Go on from the record, if there is one, with *audits*, those of the batcher."""
        self._audits = audits
        audits.restore(self._kept())

    def _kept(self) -> Iterable[LaneKind]:
        if self._output.name is None:
            return []
        path = record_path(self._output.name)
        try:
            record = msgspec.json.decode(path.read_bytes(), type=Record)
        except FileNotFoundError:
            return []
        except (OSError, ValueError):
            note(f"{str(path)!r} cannot be read: the audit begins anew")
            return []
        if record.max_excess != self.policy.max_excess:
            note(f"the audit begins anew: --max-excess was {record.max_excess:g}, is {self.policy.max_excess:g}")
            return []
        return record.kinds

    def _save(self, *, sync: bool) -> None:
        if self._output.name is None:
            return
        path, kinds = record_path(self._output.name), self._audits.state()
        self._saved_periods = {(kind.digest, step): each.period for kind in kinds for step, each in kind.steps.items()}
        try:
            with replacing(path, sync=sync) as file:
                file.write(msgspec.json.encode(Record(self.policy.max_excess, kinds)) + b"\n")
        except OSError as error:
            if not self._unwritable:
                note(f"cannot write {str(path)!r}: {error.strerror}; --resume will not know of all audits")
            self._unwritable = True

    def on_audit(self, event: Audited) -> None:
        """Keep the record."""
        now = asyncio.get_running_loop().time()
        if event.decision is not None or now - self._saved_at >= SAVE_SECONDS:
            self._saved_at = now
            self._save(sync=event.decision is not None)

    # --- answers

    def period(self, reply: Reply[Any]) -> int:
        """Return the period of the batch that *reply* came from; see `Provenance`.

        A period that a new try has begun is kept first: after a kill its answers would be taken for those of a later one.
        """
        kind = None if reply.lane_kind is None else self._audits.kinds.get(reply.lane_kind)
        period = 0 if kind is None else kind.period(reply.batch_size)
        if period and period != self._saved_periods.get((reply.lane_kind or "", step_of(reply.batch_size))):
            self._save(sync=True)
        return period

    async def settled(self) -> None:
        """Wait until no audit is under way."""
        await self._audits.settled()

    def find(self) -> set[int]:
        """Return the ids that are to be asked again, which are `pending` from then on; nothing is under way.

        It reads the output, which takes a few seconds for a million lines.
        """
        self._audits.give_up_tries()
        self.pending = self._doubtful() - self._in_vain
        self.use_cache = True if self._found.isdisjoint(self.pending) else "refresh"
        self._found |= self.pending
        return self.pending.copy()

    def _doubtful(self) -> set[int]:
        is_doubtful = self._judge()
        if is_doubtful is None or not isinstance(self._output, OutputFile):
            return set()
        return {item for item in self._output.select(is_doubtful) if item in self._items}

    def _judge(self) -> Callable[[Provenance], bool] | None:
        """Return whether an answer is doubtful, as a function; None if none is."""
        kinds = {kind.digest: kind for kind in self._audits.kinds.values()}

        def is_doubtful(answer: Provenance) -> bool:
            kind = kinds.get(answer.lane_kind or "")
            return kind is not None and kind.is_doubtful(answer.batch_size, answer.period)

        any_doubt = any(step.doubtful for kind in kinds.values() for step in kind.steps.values())
        return is_doubtful if any_doubt else None

    def answered(self, item: int, size: int) -> bool:
        """Note that *item* was answered, in a batch of *size*; return whether it was asked again."""
        if item not in self.pending:
            return False
        self.pending.discard(item)
        self.asked += 1
        self.largest = max(self.largest, size)
        return True

    def given_up(self, digest: str, step: int) -> bool:
        """Return whether batches of the size *step*, of the kind named *digest*, are not sent any more."""
        kind = self._audits.kinds.get(digest)
        return kind is not None and kind.limit is not None and kind.limit < step

    def failed(self, item: int) -> bool:
        """Note that *item* has failed; return whether it was asked again. Then its earlier answer stands."""
        if item not in self.pending:
            return False
        self.pending.discard(item)
        self._in_vain.add(item)
        return True

    def end(self) -> None:
        """Keep the record, and count the answers that are still doubtful; the batcher is closed."""
        self._save(sync=True)
        is_doubtful = self._judge()
        if is_doubtful is not None and not isinstance(self._output, OutputFile):
            self.left = self._output.count(is_doubtful)
        else:
            self.left = len(self._doubtful())
