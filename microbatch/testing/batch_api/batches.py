"""The batches of the simulated endpoint: each belongs to the key that created it and is processed by a task of its own."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from microbatch.checking import AtLeast, Count, Seconds
from microbatch.errors import ConfigError
from microbatch.testing.batch_api.batch import OVER, Batch, check_request
from microbatch.testing.batch_api.input_file import InputError, Line, read_lines
from microbatch.testing.model import SimulatedModel
from microbatch.testing.reading import EndpointError
from microbatch.testing.wire import completion_object, request_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.messages import Limits
    from microbatch.testing.batch_api.files import Files
    from microbatch.testing.reply import SimulatedReply

_UNMETERED: Final = "\n"
"""The key that lines are answered under: no header can be this, and no quota is kept of it. Batches have limits of their own."""

# Of the time that a batch takes, the part before its first line and the part after its last one.
_ENDS: Final = 0.1

_BYTES_A_TOKEN: Final = 4


@dataclass(kw_only=True, eq=False, repr=False)
class BatchModel(SimulatedModel):
    """A simulated model that answers the lines of batches too; its options are those of `SimulatedEndpoint`."""

    batch_seconds: Seconds = 0.0
    batch_expires: Annotated[float, AtLeast(0)] = 0
    batch_tokens: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.batch_expires, float) and self.batch_expires > 1:
            wanted = "a whole number of lines or a share up to 1.0"
            raise ConfigError(f"batch_expires must be {wanted}, got {self.batch_expires!r}")
        self.batch_lines: int = 0

    def charge(self, body: Mapping[str, Any], key: str, tokens: int = 0) -> Limits | None:
        """Charge a request as `SimulatedModel.charge` does; the line of a batch costs nothing."""
        return None if key == _UNMETERED else super().charge(body, key, tokens)

    async def answer_line(self, line: Line) -> SimulatedReply | EndpointError:
        """Answer a line like a call, without the quota; what breaks a connection is an error, for there is none to break."""
        trouble = EndpointError(500, "The server had an error while processing your request.", kind="server_error")
        answer: SimulatedReply | EndpointError
        try:
            answer = await self.respond(line.body, _UNMETERED, line.size)
        except EndpointError as error:
            answer = error
        except Exception:  # noqa: BLE001 - an answer function's own; a live call gets a 500 as well
            answer = trouble
        self.batch_lines += 1
        if self.record:
            self.requests.append(line.body)
        if isinstance(answer, EndpointError) or answer.ending in ("done", "cut"):
            return answer
        return trouble


class Batches:
    """All batches of an endpoint.

    Args:
        model: Answers the lines, and says how long that takes.
        files: Where inputs are read and outputs written.
    """

    def __init__(self, model: BatchModel, files: Files) -> None:
        self._model = model
        self._files = files
        self._batches: dict[str, Batch] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._enqueued: Counter[str] = Counter()  # bytes that are worked on, by key

    def __len__(self) -> int:
        return len(self._batches)

    def start(self) -> None:
        """Work on all batches that are not over."""
        for batch in self._batches.values():
            if batch.status not in OVER:
                self._work_on(batch)

    async def stop(self) -> None:
        """Work on none; `start` goes on where they stand."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def create(self, owner: str, asked: Mapping[str, Any]) -> Batch:
        """Make a batch and begin to work on it.

        Raises:
            EndpointError: What is *asked* for is malformed or not supported, or the file is not there for *owner*.
        """
        name, metadata = check_request(asked)
        file = self._files.get(owner, name)
        if file.purpose != "batch":
            raise EndpointError(400, "The file's purpose must be 'batch'.", param="input_file_id", code="invalid_value")
        number, start = len(self._batches) + 1, asyncio.get_running_loop().time()
        batch = Batch(f"batch_{number:08d}", owner, name, metadata, len(file.content), start)
        self._batches[batch.id] = batch
        self._work_on(batch)
        return batch

    def get(self, owner: str, name: str) -> Batch:
        """Return the batch *name* of a key; those of other keys are not there for it."""
        batch = self._batches.get(name)
        if batch is None or batch.owner != owner:
            raise EndpointError(404, f"No batch found with id '{name}'.")
        return batch

    def of(self, owner: str) -> list[Batch]:
        """Return the batches of a key, newest first."""
        return [batch for batch in self._batches.values() if batch.owner == owner][::-1]

    def cancel(self, owner: str, name: str) -> Batch:
        """Begin to cancel a batch, unless it is over, or nearly, and return it."""
        batch = self.get(owner, name)
        if batch.status in (*OVER, "finalizing"):
            raise EndpointError(409, f"Cannot cancel a batch with status '{batch.status}'.")
        if batch.status != "cancelling":
            batch.enter("cancelling")
            batch.cancelled.set()
        return batch

    def _work_on(self, batch: Batch) -> None:
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, batch: Batch) -> None:
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
        expires = self._model.batch_expires
        left = round(len(lines) * expires) if isinstance(expires, float) else expires
        batch.expiring = min(len(lines), left)
        batch.running = True
        self._enqueued[batch.owner] += batch.size
        batch.enter("in_progress")

    def _too_much(self, batch: Batch, lines: list[Line]) -> list[InputError]:
        """Return what is wrong with working on *batch* beside the others of its key."""
        most = self._model.batch_tokens
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
                await self._answer(batch, batch.waiting[-1])
                batch.waiting.pop()

    async def _answer(self, batch: Batch, line: Line) -> None:
        answer = await self._model.answer_line(line)
        number = self._model.batch_lines
        if isinstance(answer, EndpointError):
            batch.failed += 1
            batch.failures.append(_answered(line, number, answer.status, answer.body))
        else:
            self._model.reported += answer.usage
            batch.output.append(_answered(line, number, 200, completion_object(answer, number, line.body["model"])))

    async def _until(self, batch: Batch, share: float) -> None:
        """Wait until *share* of a batch's time has passed, or it is cancelled; others have their turn in any case."""
        delay = batch.start + share * self._model.batch_seconds - asyncio.get_running_loop().time()
        if delay <= 0:
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await batch.cancelled.wait()

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


def _answered(line: Line, number: int, status: int, body: dict[str, Any]) -> bytes:
    response = {"status_code": status, "request_id": f"batch_{request_id(number)}", "body": body}
    return _encoded(f"batch_req_{number:08d}", line.custom_id, response, None)


def _encoded(name: str, custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    return msgspec.json.encode({"id": name, "custom_id": custom_id, "response": response, "error": error}) + b"\n"


def _shuffled(lines: list[Line], seed: str) -> list[Line]:
    """Return *lines* in another order, to be answered from the last one on: nothing may rely on theirs."""
    shuffled = random.Random(seed).sample(lines, len(lines))  # noqa: S311 - repeatable, not secret
    return shuffled if shuffled != lines[::-1] else shuffled[1:] + shuffled[:1]
