"""Reads the output and error files of a finished batch."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.spool.provider.replies import Response, Results, Why

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from microbatch.spool.provider.api import RemoteBatch
    from microbatch.spool.provider.input_file import Content, Line
    from microbatch.spool.provider.replies import Replies
    from microbatch.spool.records import Delivery

_SLICE: Final = 16  # lines between two turns of the event loop


class _Error(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class _Row(msgspec.Struct):
    custom_id: str
    response: Response | None = None
    error: _Error | None = None


class _Sent(msgspec.Struct):
    body: dict[str, Any]


async def read_output(
    batch: RemoteBatch, content: Content, tied: Mapping[str, Delivery], files: Iterable[bytes], replies: Replies
) -> Results:
    """Return the results of a batch.

    Args:
        batch: The batch, whose status is final.
        content: The recorded content of its job.
        tied: The requests that still wait for it, by the keys of their names.
        files: Its output file and its error file.
        replies: Reads the replies to the lines.
    """
    results = Results()
    rows = await _rows(files)
    sent = (await content.file()).split(b"\n") if rows else []
    absent = _absence(batch, content)
    for number, line in enumerate(content.lines):
        deliveries = [tied.get(name.key) for name in line.names]
        waiting = [delivery for delivery in deliveries if delivery is not None]
        row = rows.get(line.custom_id)
        if not waiting:
            continue
        if row is None or row.response is None:
            results.leave(waiting, absent(line, row))
        else:
            replies.take(row.response, line, deliveries, _body_at(sent, number), results)
        if number % _SLICE == 0:
            await asyncio.sleep(0)
    return results


async def _rows(files: Iterable[bytes]) -> dict[str, _Row]:
    """Return the rows of *files* by the names of their lines; the first of several counts."""
    decode = msgspec.json.Decoder(_Row).decode
    rows: dict[str, _Row] = {}
    for file in files:
        for number, raw in enumerate(file.split(b"\n"), 1):
            try:
                row = decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue  # treated as missing
            rows.setdefault(row.custom_id, row)
            if number % _SLICE == 0:
                await asyncio.sleep(0)
    return rows


def _absence(batch: RemoteBatch, content: Content) -> Callable[[Line, _Row | None], Why]:
    """Return a function that returns why a line of *batch* has no reply."""
    if batch.status == "failed":
        return _rejection(batch, content)

    def absent(_line: Line, row: _Row | None) -> Why:
        code = row.error.code if row is not None and row.error is not None else None
        message = f"the batch {batch.status} without a reply" + (f" ({code})" if code else "")
        # A line of an expired or cancelled batch did not cause that.
        return Why(message, counted=batch.status == "completed")

    return absent


def _rejection(batch: RemoteBatch, content: Content) -> Callable[[Line, _Row | None], Why]:
    """As `_absence`, for a batch that was refused: the cause is the lines that its errors name, if any."""
    blamed: dict[str, Why] = {}
    for error in batch.complaints:
        # An unavailable model is reported for one line, but was not caused by it.
        if error.line is not None and 0 < error.line <= len(content.lines) and error.param != "body.model":
            blamed[content.lines[error.line - 1].custom_id] = Why(f"the provider refused the line ({error.code})")
    codes = ", ".join(dict.fromkeys(str(error.code) for error in batch.complaints)) or "no reason was given"
    others = Why(f"the provider refused the batch ({codes})", counted=False)
    return lambda line, _row: blamed.get(line.custom_id, others)


def _body_at(rows: Sequence[bytes], number: int) -> Callable[[], Mapping[str, Any]]:
    """Return a function that returns the body of a sent line."""
    return lambda: msgspec.json.decode(rows[number], type=_Sent).body
