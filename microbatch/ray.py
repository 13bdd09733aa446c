"""`Ask`: questions about the rows of a Ray dataset."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

import msgspec

from microbatch.binding import BoundQuestion, Question
from microbatch.caching.redis import RedisCache
from microbatch.caching.sqlite import SQLiteCache
from microbatch.client import Microbatcher
from microbatch.errors import ConfigError
from microbatch.storage.address import is_address
from microbatch.template import Template
from microbatch.transports.credentials import hold_credentials
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray.data import Dataset

    from microbatch.messages import Result
    from microbatch.policy import FlushPolicy, RetryPolicy
    from microbatch.protocols import Cache
    from microbatch.transports.rate_limit import RateLimit

BATCH_SIZE: Final = 1_024
"""Rows of a batch of `Ask.over`. An actor has several under way at once; the last prompt of each is not full."""

USAGE: Final = ("prompt_tokens", "completion_tokens", "cached_tokens", "cost_usd")
"""Columns of each row's share of the cost, in tokens and US dollars. Their sums are what the endpoint reported."""


class Ask:
    """Asks a model about the rows of a Ray dataset, many rows in one prompt; a class for `Dataset.map_batches`.

    `Ask.over(dataset, ...)` applies it. With `map_batches` itself the arguments are `fn_constructor_kwargs`, and batches have to be in
    the format "numpy", which is the default there. Each actor has a batcher of its own, which opens at its first batch.

    The key is read from the environment of the actor; it is in no argument, because those are pickled. `over` adds these columns to
    each row:

    - *output*: the answer, a string, or for other output types the JSON value of it; None if there is none.
    - *error*: type and message of the error of this row; None if it was answered. An error of a row ends nothing else.
    - `prompt_tokens`, `completion_tokens`, `cached_tokens`, `cost_usd`: the row's share of the cost. `dataset.sum("cost_usd")` is the
      price of all; None where a price is unknown.

    Args:
        system: The instructions, or None.
        template: The question, with columns in braces.
        output_type: What the answer is decoded to.
        labels: The only answers allowed, instead of *output_type*; None for any.
        output: Name of the column of answers.
        error: Name of the column of errors.
        model: Name of the model.
        base_url: Address of the API, up to /v1; None for the actor's `OPENAI_BASE_URL`, else OpenAI.
        api_key_env: The environment variable of the actor that holds the key; None for the one that belongs to *base_url*.
        transport: Other settings of `OpenAIChat`, without keys.
        cache: Address of a cache that all actors share, `redis://...`, or the path of an SQLite file; None for no cache.
        rate_limit: With `store=`, one limit for all actors; else the limit of each.
        policy: See `Microbatcher`.
        retry: See `Microbatcher`.
        options: Further options of `submit`, the same for all rows.

    Raises:
        ConfigError: An argument is wrong.
    """

    def __init__(
        self,
        system: str | None = None,
        template: str = "{text}",
        *,
        output_type: Any = str,
        labels: Sequence[str] | None = None,
        output: str = "answer",
        error: str = "error",
        model: str | None = None,
        base_url: str | None = None,
        api_key_env: str | None = None,
        transport: Mapping[str, Any] | None = None,
        cache: str | None = None,
        rate_limit: RateLimit | None = None,
        policy: FlushPolicy | None = None,
        retry: RetryPolicy | None = None,
        **options: Any,
    ) -> None:
        _check_secrets(transport or {}, options)
        key = None if api_key_env is None else os.environ.get(api_key_env)
        if api_key_env is not None and not key:
            raise ConfigError(f"the environment of this actor has no {api_key_env}")
        self._columns = (output, error, *USAGE)
        self._fields = Template(template).fields
        store: Cache | None = None
        if cache is not None:
            store = RedisCache(cache) if is_address(cache) else SQLiteCache(cache)
        chat = OpenAIChat(model, base_url=base_url, api_key=key, **(transport or {}))
        self._batcher = Microbatcher(chat, cache=store, rate_limit=rate_limit, policy=policy, retry=retry)
        kind: Any = output_type if labels is None else Literal[tuple(labels)]
        self._ask: BoundQuestion[Any] = self._batcher.bind(system, output_type=kind, template=template, **options)
        self._opening = asyncio.Lock()  # several batches may come at once
        self._is_open = False

    @classmethod
    def over(
        cls,
        dataset: Dataset,
        system: str | None = None,
        template: str = "{text}",
        *,
        concurrency: int = 1,
        batch_size: int = BATCH_SIZE,
        **settings: Any,
    ) -> Dataset:
        """Return *dataset* with the columns of the answers.

        Args:
            dataset: The rows.
            system: As in `Ask`, like *template* and *settings*.
            template: The question, with columns in braces.
            settings: The other arguments of `Ask`.
            concurrency: Number of actors.
            batch_size: Rows that an actor is given at once.

        Raises:
            ConfigError: An argument is wrong.
        """
        _check_secrets(settings.get("transport") or {}, settings)
        Question(system, template)  # refused here rather than in an actor
        return dataset.map_batches(
            cls,
            fn_constructor_args=(system, template),
            fn_constructor_kwargs=settings,
            concurrency=concurrency,
            batch_size=batch_size,
            batch_format="numpy",
        )

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return *batch* with the columns of the answers.

        Raises:
            ConfigError: A column of the template is missing, or one of the answers is there already; or the batcher cannot be opened.
        """
        self._check(batch)
        await self._open()
        names = [
            name
            for name in batch
            if name in self._fields or any(field.startswith(f"{name}.") for field in self._fields)
        ]
        columns = [_values(batch[name]) for name in names]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        results = [result async for result in self._ask.map(rows, max_pending=max(len(rows), 1))]
        for result in results:
            if result.reply is not None:
                await result.reply.settled()
        cells = [*map(_cells, results)]
        return {**batch, **{name: [row[place] for row in cells] for place, name in enumerate(self._columns)}}

    def _check(self, batch: Any) -> None:
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f'map_batches has to hand batches in the format "numpy" to Ask, not {type(batch).__name__}'
            )
        for field in self._fields:
            if field not in batch and field.partition(".")[0] not in batch:
                raise ConfigError(f'there is no column "{field}" for the template; there are {", ".join(batch)}')
        taken = [name for name in self._columns if name in batch]
        if taken:
            raise ConfigError(
                f"the dataset has the columns {', '.join(taken)} already: rename them, or set output= and error="
            )

    async def _open(self) -> None:
        async with self._opening:
            if not self._is_open:
                await self._batcher.open()
                self._is_open = True

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Ask cannot be pickled: give the class and its arguments to map_batches")


def _check_secrets(*settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a credential is among *settings*, which are pickled."""
    for each in settings:
        headers = each.get("headers") or {}
        if "api_key" in each or (isinstance(headers, Mapping) and hold_credentials(headers)):
            raise ConfigError(
                "a key must not be in the arguments, which Ray pickles: set it in the environment of the actors, and name the "
                "variable in api_key_env="
            )


def _values(column: Any) -> list[Any]:
    """Return the values of a column of numpy's as Python's own."""
    values: list[Any] = column.tolist() if hasattr(column, "tolist") else list(column)
    return values


def _cells(result: Result[Any]) -> tuple[Any, ...]:
    """Return the cells of a row: answer, error, and its share of the cost."""
    reply, error = result.reply, result.error
    if reply is None:
        return None, f"{type(error).__name__}: {error}", 0, 0, 0, 0.0
    usage, answer = reply.usage, reply.output
    if not isinstance(answer, str):
        answer = msgspec.to_builtins(answer.model_dump(mode="json") if hasattr(answer, "model_dump") else answer)
    return answer, None, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, reply.cost_usd
