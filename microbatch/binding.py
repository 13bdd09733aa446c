"""Functions of one item: instructions and a template, bound to a batcher."""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from microbatch.batching.request import arguments_of
from microbatch.errors import ConfigError
from microbatch.messages import Request
from microbatch.template import MissingField, Template

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from typing_extensions import TypeForm

    from microbatch.batching.intake import Intake
    from microbatch.messages import Messages, Reply, Result, Source

T = TypeVar("T")


class Question:
    """Makes messages of items: instructions, which all have in common, and a template.

    Raises:
        ConfigError: The template is malformed or has no field, or *system* is not a string.
    """

    def __init__(self, system: str | None, template: str) -> None:
        if not isinstance(system, str | None):
            raise ConfigError(f"system must be a string or None, got {type(system).__name__}")
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._template = Template(template)
        self._takes_values = self._template.fields == ("",)
        if "" in self._template.fields and not self._takes_values:
            raise ConfigError(f"{template!r} has empty braces and names: the item is either a value or a record")

    def messages(self, item: Any) -> Messages:
        """Return the messages about *item*.

        Raises:
            ConfigError: It lacks a field of the template, or cannot be written as JSON.
        """
        try:
            record = {"": item} if self._takes_values else _record_of(item)
            text = self._template.render(record)
        except MissingField as error:
            raise ConfigError(f"an item cannot be asked about: {error}") from None
        except ConfigError:
            raise
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(f"an item cannot be written as JSON ({type(error).__name__})") from None
        return [*self._system, {"role": "user", "content": text}]


class BoundQuestion(Generic[T]):
    """An async function of one item that returns the answer; made by `Microbatcher.bind`."""

    def __init__(
        self,
        submit: Callable[..., Awaitable[Reply[T]]],
        map: Callable[..., AsyncIterator[Result[T]]],  # noqa: A002 the name of the method
        question: Question,
        options: Mapping[str, Any],
    ) -> None:
        self._submit = submit
        self._map = map
        self._question = question
        self._options = options

    async def __call__(self, item: Any) -> T:
        """Return the answer about *item*, decoded to the output type.

        Raises:
            ConfigError: The item lacks a field of the template; nothing was sent.
            MicrobatchError: What `Microbatcher.submit` raises.
        """
        return (await self._submit(self._question.messages(item), **self._options)).output

    def map(self, items: Source[Any], *, max_pending: int | None = None) -> AsyncIterator[Result[T]]:
        """Answer any number of items in full batches; yield a `Result` for each, in their order. See `Microbatcher.map`."""
        requests = self.requests(items)
        results = self._map(requests.source, max_pending=max_pending, ordered=True)
        return requests.named(results)

    def requests(self, items: Source[Any]) -> BoundRequests[T]:
        """Return the requests about *items*."""
        return BoundRequests(self._question, items, self._options)


class BoundRequests(Generic[T]):
    """The requests about *items*, made as they are read.

    Attributes:
        source: The requests, for `map`.
    """

    def __init__(self, question: Question, items: Source[Any], options: Mapping[str, Any]) -> None:
        self._question = question
        self._options = options
        self._errors: dict[int, ConfigError] = {}  # of items that no request can be made of, by position
        self._read = 0
        self.source: Source[Request[T]]
        self.source = self._requests_later(items) if isinstance(items, AsyncIterable) else map(self._request, items)

    async def _requests_later(self, items: AsyncIterable[Any]) -> AsyncIterator[Request[T]]:
        async for item in items:
            yield self._request(item)

    def _request(self, item: Any) -> Request[T]:
        position, self._read = self._read, self._read + 1
        try:
            messages = self._question.messages(item)
        except ConfigError as error:
            self._errors[position] = error
            messages = ()  # `map` refuses a request without messages, which keeps its place
        return Request(messages, **self._options)

    async def named(self, results: AsyncIterator[Result[T]]) -> AsyncIterator[Result[T]]:
        """Yield *results*, those of the requests, with the errors of items that no request could be made of."""
        async for result in results:
            yield self.result(result)

    def result(self, result: Result[T]) -> Result[T]:
        """Return *result* with the error of its item, if no request could be made of that."""
        error = self._errors.pop(result.index, None)
        return result if error is None else msgspec.structs.replace(result, error=error)


class Binds:
    """The part of `Microbatcher` that binds questions."""

    _intake: Intake
    submit: Callable[..., Any]
    map: Callable[..., Any]

    def bind(
        self,
        system: str | None,
        *,
        output_type: TypeForm[T] = str,  # type: ignore[assignment]
        template: str = "{}",
        **options: Any,
    ) -> BoundQuestion[T]:
        """Return an async function of one item, which asks about it and returns the output; its `map` answers many items.

        Args:
            system: The instructions, or None.
            output_type: What the answer is decoded to.
            template: The question: `{}` stands for an item that is a value, `{name}` for a field of one that is a mapping or an object;
                `{{` and `}}` are braces. Values that are not strings are written as JSON.
            options: Further options of `submit`.

        Raises:
            ConfigError: The template has no field, or an option is wrong.
        """
        options["output_type"] = output_type
        self._intake.read_options(*arguments_of(Request((), **options)))
        return BoundQuestion(self.submit, self.map, Question(system, template), options)


def _record_of(item: Any) -> Mapping[str, Any]:
    """Return the fields of *item*: a mapping, or an object that has fields.

    Raises:
        ConfigError: It has none.
    """
    if isinstance(item, Mapping):
        return item
    if hasattr(item, "model_dump"):
        dumped: Mapping[str, Any] = item.model_dump(mode="json")
        return dumped
    try:
        fields = msgspec.to_builtins(item)
    except (TypeError, ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict):
        return fields
    raise ConfigError(
        f"an item must be a mapping or an object with fields for this template, got {type(item).__name__}"
    )
