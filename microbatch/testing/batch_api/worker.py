"""Processing of a batch by the simulated endpoint: line by line, with its own timing and order."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from microbatch.errors import ConfigError
from microbatch.policy import at_least, whole
from microbatch.testing.batch_api.input_file import InputError, Line, read_lines
from microbatch.testing.reading import EndpointError
from microbatch.testing.wire import completion_object, error_object, request_id

if TYPE_CHECKING:
    from microbatch.messages import Usage
    from microbatch.testing.batch_api.batches import Batch
    from microbatch.testing.batch_api.files import Files
    from microbatch.testing.reading import Prompt
    from microbatch.testing.reply import SimulatedReply

UNMETERED: Final = "\n"
"""The key that lines are answered under: no header can be this, and no quota is kept of it. Batches have limits of their own."""

# Of the time that a batch takes, the part before its first line and the part after its last one.
_ENDS: Final = 0.1

# Reading more than this takes milliseconds, which would block other requests.
_MAX_INLINE_BYTES: Final = 65_536

_BYTES_A_TOKEN: Final = 4


class Host(Protocol):
    """The endpoint whose batches these are: its model, and the options and counters that are about batches."""

    batch_seconds: float
    batch_expires: float
    batch_tokens: int | None
    batch_lines: int
    reported: Usage
    record: bool
    requests: list[dict[str, Any]]

    def read(self, body: dict[str, Any]) -> Prompt:
        """Check and understand a request."""
        ...

    def reply(self, prompt: Prompt, key: str = "") -> SimulatedReply:
        """Answer it."""
        ...


def check_options(*, batch_seconds: float, batch_expires: float, batch_tokens: int | None) -> None:
    """Check the options that are about batches.

    Raises:
        ConfigError: A number is out of range.
    """
    at_least(0, batch_seconds=batch_seconds, batch_expires=batch_expires)
    whole(1, batch_tokens=batch_tokens)
    if isinstance(batch_expires, float) and batch_expires > 1:
        raise ConfigError(f"batch_expires must be a whole number of lines or a share up to 1.0, got {batch_expires!r}")


class BatchWork:
    """Works on batches.

    Args:
        host: Answers the lines, and says how long that takes.
        files: Where inputs are read and outputs written.
    """

    def __init__(self, host: Host, files: Files) -> None:
        self._host = host
        self._files = files
        self._enqueued: Counter[str] = Counter()  # bytes of the inputs that are worked on, by key

    async def run(self, batch: Batch) -> None:
        """Work on *batch*, from where it stands to its end."""
        if batch.status == "validating":
            await self._until(batch, _ENDS)
            await self._validate(batch)
        if batch.running:
            await self._answer_all(batch)
            self._enqueued[batch.owner] -= batch.size
            batch.running = False
        if batch.status == "cancelling":
            self._write_files(batch)
            batch.enter("cancelled")
        elif batch.status != "failed":
            await self._finalize(batch)

    async def _validate(self, batch: Batch) -> None:
        lines: list[Line] = []
        try:
            content = self._files.get(batch.owner, batch.input_file_id).content
        except EndpointError as gone:
            errors = [InputError("invalid_input_file", str(gone))]
        else:
            lines, errors = await asyncio.to_thread(read_lines, content)
        if batch.status == "cancelling":
            return
        batch.errors = errors or self._too_much(batch, lines)
        if batch.errors:
            batch.enter("failed")
            return
        batch.total = len(lines)
        batch.waiting = _shuffled(lines, batch.id)
        expires = self._host.batch_expires
        left = round(len(lines) * expires) if isinstance(expires, float) else expires
        batch.expiring = min(len(lines), left)
        batch.running = True
        self._enqueued[batch.owner] += batch.size
        batch.enter("in_progress")

    def _too_much(self, batch: Batch, lines: list[Line]) -> list[InputError]:
        """Return what is wrong with working on *batch* beside the others of its key."""
        most = self._host.batch_tokens
        if most is None or (batch.size + self._enqueued[batch.owner]) // _BYTES_A_TOKEN <= most:
            return []
        message = (
            f"Enqueued token limit reached for {lines[0].body['model']}. Limit: {most:,} enqueued tokens. "
            "Please try again once some in_progress batches have been completed."
        )
        return [InputError("token_limit_exceeded", message)]

    async def _answer_all(self, batch: Batch) -> None:
        while len(batch.waiting) > batch.expiring and batch.status == "in_progress":
            answered = batch.total - len(batch.waiting)
            await self._until(batch, _ENDS + (1 - 2 * _ENDS) * answered / batch.total)
            if batch.status == "in_progress":
                line = batch.waiting[-1]
                prompt = await self._read(line)
                batch.waiting.pop()
                self._answer(batch, line, prompt)

    async def _until(self, batch: Batch, share: float) -> None:
        """Wait until *share* of a batch's time has passed, or it is cancelled; others have their turn in any case."""
        delay = batch.start + share * self._host.batch_seconds - asyncio.get_running_loop().time()
        if delay <= 0:
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await batch.cancelled.wait()

    async def _read(self, line: Line) -> Prompt | EndpointError:
        try:
            if line.size <= _MAX_INLINE_BYTES:
                return self._host.read(line.body)
            return await asyncio.to_thread(self._host.read, line.body)
        except EndpointError as error:
            return error

    def _answer(self, batch: Batch, line: Line, prompt: Prompt | EndpointError) -> None:
        """Answer a line like a call, without the quota."""
        self._host.batch_lines += 1
        if self._host.record:
            self._host.requests.append(line.body)
        try:
            reply = self._reply(prompt)
        except EndpointError as error:
            batch.failed += 1
            batch.failures.append(self._line(line.custom_id, error.status, error_object(error)))
        else:
            self._host.reported += reply.usage
            completion = completion_object(reply, self._host.batch_lines, line.body["model"])
            batch.output.append(self._line(line.custom_id, 200, completion))

    def _reply(self, prompt: Prompt | EndpointError) -> SimulatedReply:
        if isinstance(prompt, EndpointError):
            raise prompt
        trouble = EndpointError(500, "The server had an error while processing your request.", kind="server_error")
        try:
            reply = self._host.reply(prompt, UNMETERED)
        except EndpointError:
            raise
        except Exception as error:  # an answer function's own; a live call gets a 500 as well
            raise trouble from error
        # What breaks a connection has none to break here.
        if reply.ending not in ("done", "cut"):
            raise trouble
        return reply

    def _line(self, custom_id: str, status: int, body: dict[str, Any]) -> bytes:
        number = self._host.batch_lines
        response = {"status_code": status, "request_id": f"batch_{request_id(number)}", "body": body}
        return _encoded(f"batch_req_{number:08d}", custom_id, response, None)

    async def _finalize(self, batch: Batch) -> None:
        batch.enter("finalizing")
        await self._until(batch, 1.0)
        for number, line in enumerate(batch.waiting):
            message = "This request could not be executed before the completion window expired."
            error = {"code": "batch_expired", "message": message}
            batch.failures.append(_encoded(f"{batch.id}_req_{number:08d}", line.custom_id, None, error))
        self._write_files(batch)
        batch.enter("expired" if batch.waiting else "completed")

    def _write_files(self, batch: Batch) -> None:
        if batch.output:
            name = f"{batch.id}_output.jsonl"
            batch.output_file_id = self._files.add(batch.owner, name, "batch_output", b"".join(batch.output)).id
        if batch.failures:
            name = f"{batch.id}_error.jsonl"
            batch.error_file_id = self._files.add(batch.owner, name, "batch_output", b"".join(batch.failures)).id


def _encoded(name: str, custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    return msgspec.json.encode({"id": name, "custom_id": custom_id, "response": response, "error": error}) + b"\n"


def _shuffled(lines: list[Line], seed: str) -> list[Line]:
    """Return *lines* in another order, to be answered from the last one on: nothing may rely on theirs."""
    shuffled = random.Random(seed).sample(lines, len(lines))  # noqa: S311 - repeatable, not secret
    return shuffled if shuffled != lines[::-1] else shuffled[1:] + shuffled[:1]
