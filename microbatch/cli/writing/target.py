"""Where the answers of a run go: its output, in the format that was asked for, and the journal from which that is written.

The journal is the truth: a file of JSON Lines to which each answer is appended as it comes, and from which a run is resumed. An output
of JSON Lines is its own journal. Any other is written from OUTPUT.journal.jsonl, which is kept, when the run ends.
"""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.cli.console import UsageError
from microbatch.cli.writing.join import Join
from microbatch.cli.writing.output import free_names
from microbatch.cli.writing.writers import Columns, Format, columns_of, format_of, is_plain_jsonl, write_rows
from microbatch.messages import Usage
from microbatch.openai.chat_completion import completion_of, usage_share
from microbatch.transports.chat_wire import completion_object

if TYPE_CHECKING:
    import argparse

    from microbatch.cli.reading.input import Input
    from microbatch.cli.writing.output import OutputFile
    from microbatch.messages import Reply

STDOUT: Final = "-"
"""The name of stdout as an output."""

_JOURNAL: Final = ".journal.jsonl"

_COLUMNS: Final[Columns] = {
    **dict.fromkeys(("custom_id", "output", "error", "route"), str),
    **{field.name: field.type for field in msgspec.structs.fields(Usage)},
    "cost_usd": float,
}
"""The columns of the answers in a table. An output that is no text, and an error, is JSON."""


class Target(msgspec.Struct, frozen=True):
    """The output of a run.

    Attributes:
        path: Its path, or `STDOUT`.
        form: Its format.
        model: The model of the run, for completions that name none.
        join: Whether its rows are the records of the input with their answers, in the order of the input.
    """

    path: str
    form: Format
    model: str | None = None
    join: bool = False

    @property
    def journal(self) -> str:
        """The path of its journal."""
        return self.path if is_plain_jsonl(self.path, self.form) and not self.join else self.path + _JOURNAL

    @property
    def is_written_at_end(self) -> bool:
        """True if it is written from a journal."""
        return self.path not in (STDOUT, self.journal)

    def free_names(self) -> tuple[Path, Path]:
        """Return free names beside the output for it and for its journal; the same one if it is its own journal."""
        both = ((name, Path(f"{name}{_JOURNAL}") if self.is_written_at_end else name) for name in free_names(self.path))
        return next((name, journal) for name, journal in both if not journal.exists())

    def line(self, line: dict[str, Any], reply: Reply[Any]) -> dict[str, Any]:
        """Return the journal's *line* of *reply* with what the format needs of it."""
        if self.form != "openai-batch":
            return line
        body = completion_of(reply, self.model) if reply.body is None else {**reply.body, "usage": usage_share(reply)}
        return line | {"request_id": reply.request_id, "body": body}

    @property
    def columns(self) -> Columns:
        """The columns of a table of answers."""
        return _COLUMNS

    def row(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return a line of the journal as a row of the output."""
        if self.form == "jsonl":
            return line
        return _batch_row(line, self.model) if self.form == "openai-batch" else _table_row(line)

    def write(self, journal: OutputFile, source: Input) -> None:
        """Write the output from its journal, and from the records of *source* if they are joined.

        Raise `NotWritten` if that fails, and `InputChanged` if the records are not those that were asked about; then the output is as
        it was.
        """
        if self.join:
            joined = Join(source, journal)
            # The columns of the other formats need no types, which only the values show.
            columns = columns_of(joined.rows()) if self.form == "parquet" else dict.fromkeys(joined.columns, str)
            write_rows(self.path, self.form, joined.rows(), columns)
        else:
            write_rows(self.path, self.form, map(self.row, journal.lines()), self.columns)


def target_of(args: argparse.Namespace, model: str | None) -> Target:
    """Return the output of the flags. Raise `UsageError` if the name and the format disagree, or the name cannot be that of a file."""
    path = args.output
    if path != STDOUT and Path(path).exists() and not Path(path).is_file():
        raise UsageError(f"-o {path!r} must be a file, so that a run can be resumed from it; - is stdout")
    target = Target(path, format_of(path, args.output_format), model, args.join)
    if args.join and (path == STDOUT or target.form == "openai-batch"):
        raise UsageError("--join needs a file, and writes no openai-batch lines: it is written when the run ends")
    if path == STDOUT and target.form == "parquet":
        raise UsageError("a Parquet file cannot be written to stdout as the answers come; give it a name")
    if args.resume and target.journal == path and Path(path + _JOURNAL).exists():
        raise UsageError(
            f"{path!r} was written from {path + _JOURNAL!r}: to go on, give the --join or --output-format of that run too"
        )
    return target


# --- rows


def _table_row(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, **(line.get("usage") or {})}


def _batch_row(line: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Return a line of the journal as OpenAI's batch API writes it; a refusal of the endpoint is a response too."""
    name, error = line["custom_id"], line["error"]
    row: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": name, "response": None, "error": None}
    if error is None:
        body = line.get("body") or _completion(line, model)
        return row | {"response": {"status_code": 200, "request_id": line.get("request_id"), "body": body}}
    said = {"message": error.get("message"), "type": error.get("type"), "code": error.get("code"), "param": None}
    if (error.get("status") or 0) < HTTPStatus.BAD_REQUEST:
        return row | {"error": {"code": said["code"] or said["type"], "message": said["message"]}}
    response = {"status_code": error["status"], "request_id": error.get("request_id"), "body": {"error": said}}
    return row | {"response": response}


def _completion(line: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Return the chat completion of a line that was written for another format."""
    output = line["output"]
    text = output if isinstance(output, str) else msgspec.json.encode(output).decode()
    return completion_object(text, model=model, usage=msgspec.convert(line["usage"], Usage))
