"""The input file of a batch, validated as by a strict endpoint: one request per line, or the errors why none of it is run."""

from __future__ import annotations

from typing import Any, Final

import msgspec

MAX_LINES: Final = 50_000
ENDPOINT: Final = "/v1/chat/completions"

# An endpoint lists the first of them; a file that is wrong in one line mostly is in all.
_MOST_ERRORS: Final = 50


class Line(msgspec.Struct, frozen=True):
    """A request of a batch, and its length in bytes."""

    custom_id: str
    body: dict[str, Any]
    size: int


class InputError(msgspec.Struct, frozen=True):
    """The reason why a batch is not run, with the field and the number of the line, from 1, if it is about one."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class _Row(msgspec.Struct):
    custom_id: str = ""
    method: str = ""
    url: str = ""
    body: dict[str, Any] = {}


_decode = msgspec.json.Decoder(_Row).decode


def read_lines(content: bytes) -> tuple[list[Line], list[InputError]]:
    """Return the requests in *content*, and all that is wrong with it: then it is not to be run."""
    raw_lines = [raw for raw in content.split(b"\n") if raw.strip()]
    if not raw_lines:
        return [], [InputError("empty_file", "The input file does not have any requests in it.")]
    if len(raw_lines) > MAX_LINES:
        message = f"The input file has {len(raw_lines)} requests. The limit is {MAX_LINES}."
        return [], [InputError("too_many_tasks", message)]
    lines: list[Line] = []
    errors: list[InputError] = []
    seen: set[str] = set()
    for number, raw in enumerate(raw_lines, 1):
        read = _read(raw, number)
        if isinstance(read, Line):
            read = _fitting(read, number, lines, seen)
        if isinstance(read, Line):
            lines.append(read)
        else:
            errors.append(read)
            if len(errors) == _MOST_ERRORS:
                break
    return lines, errors


def _read(raw: bytes, number: int) -> Line | InputError:
    try:
        row = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return InputError("invalid_json_line", "This line is not parseable as valid JSON.", line=number)
    for field, is_there in (("custom_id", row.custom_id), ("body.model", row.body.get("model"))):
        if not is_there:
            message = f"Missing required parameter: '{field}'."
            return InputError("missing_required_parameter", message, field, number)
    if row.method != "POST":
        return InputError("invalid_method", "The HTTP method must be POST.", "method", number)
    if row.url != ENDPOINT:
        message = f"The URL provided for this request does not match the batch endpoint {ENDPOINT}."
        return InputError("url_mismatch", message, "url", number)
    if row.body.get("stream"):
        return InputError("invalid_request", "Streaming is not supported in batches.", "body.stream", number)
    return Line(row.custom_id, row.body, len(raw))


def _fitting(line: Line, number: int, before: list[Line], seen: set[str]) -> Line | InputError:
    """Return *line* if it goes with those *before* it, whose names have been *seen*."""
    if line.custom_id in seen:
        message = f"The custom_id '{line.custom_id}' for this request is a duplicate of another request."
        return InputError("duplicate_custom_id", message, "custom_id", number)
    seen.add(line.custom_id)
    if before and line.body["model"] != before[0].body["model"]:
        message = "The model of this request does not match the rest of the file."
        return InputError("model_mismatch", message, "body.model", number)
    return line
