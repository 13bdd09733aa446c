"""The examples of `--examples`, which the model is shown before each question, alone and in combined prompts alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from microbatch.cli.console import UsageError
from microbatch.cli.reading.questions import LineError
from microbatch.cli.reading.records import Broken, RecordFile
from microbatch.schema.answer_type import answer_type

if TYPE_CHECKING:
    from microbatch.cli.reading.questions import Templated
    from microbatch.cli.reading.records import Entry
    from microbatch.schema.answer_type import AnswerType

_ROLES: Final = ("user", "assistant")


def read_examples(path: str, questions: Templated) -> list[dict[str, Any]]:
    """Return the messages of the examples in the file *path*, in order.

    An example is `{"input", "output"}`: the fields of a record or the text of a whole question, and the right answer, which has to be
    one that `--labels` or `--schema` allows. Or it is `{"messages"}`, of a user and an assistant. Raise `UsageError` if one is neither.
    """
    file = RecordFile(path)
    answer = _answer_type(questions)
    messages: list[dict[str, Any]] = []
    for number, example in file.records():
        try:
            messages += _messages(example, questions, answer)
        except (LineError, ValueError) as error:
            raise UsageError(f"--examples: {file.name}, {file.noun} {number}: {error}") from None
    if not messages:
        raise UsageError(f"--examples: {file.name} holds no example")
    return messages


def _answer_type(questions: Templated) -> AnswerType:
    if questions.labels is not None:
        return answer_type(Literal[tuple(questions.labels)])
    return answer_type(response_format=questions.schema)


def _messages(example: Entry, questions: Templated, answer: AnswerType) -> list[dict[str, Any]]:
    if isinstance(example, Broken):
        raise LineError(example.problem)
    return _given(example["messages"]) if "messages" in example else _made(example, questions, answer)


def _made(example: dict[str, Any], questions: Templated, answer: AnswerType) -> list[dict[str, Any]]:
    """Return the messages of an example with input and output."""
    if "input" not in example or "output" not in example:
        raise LineError('it needs the fields "input" and "output", or "messages"')
    given, output = example["input"], example["output"]
    if not isinstance(given, str | dict):
        raise LineError('"input" must be an object with the fields of a record, or the text of a question')
    question = given if isinstance(given, str) else questions.render(given)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _written(output, answer)}]


def _written(output: Any, answer: AnswerType) -> str:
    """Return *output* as the model would write it: a text as it is, anything else as JSON."""
    if answer.is_text and isinstance(output, str):
        return output
    written = msgspec.json.encode(output).decode()
    if not answer.is_text:
        try:
            answer.decode(written)
        except ValueError as error:
            raise LineError(f'--labels or --schema do not allow the "output" {written}: {error}') from None
    return written


def _given(messages: Any) -> list[dict[str, Any]]:
    """Return the messages of an example that holds them, checked."""
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise LineError('"messages" must be a list of objects with "role" and "content"')
    roles = [message["role"] for message in messages]
    if roles != [_ROLES[place % 2] for place in range(len(roles))] or len(roles) % 2:
        raise LineError('the "messages" must be of a user and an assistant in turn; instructions are given by --system')
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
