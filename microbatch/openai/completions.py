"""`chat.completions`: the two ways to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from microbatch.errors import ConfigError
from microbatch.openai.completion import completion_of, parse_all, with_answer
from microbatch.openai.request import body_of, check_create, is_text, submission
from microbatch.openai.stream import open_stream

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import TypeForm

    from microbatch.client import Microbatcher
    from microbatch.messages import Messages, Priority, Reply, T
    from microbatch.openai.objects import ChatCompletion
    from microbatch.openai.stream import AsyncStream


class Completions:
    """Asks for chat completions, with the arguments and results of the SDK.

    Args:
        batcher: What coalesces the requests.
    """

    def __init__(self, batcher: Microbatcher) -> None:
        self._batcher = batcher

    @overload
    async def create(
        self,
        *,
        messages: Messages,
        model: str | None = None,
        response_format: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        stream: Literal[False] | None = None,
        timeout: float | None = None,
        extra_headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        priority: Priority = "normal",
        use_cache: bool = True,
        ttl: float | None = None,
        **params: Any,
    ) -> ChatCompletion[None]: ...

    @overload
    async def create(
        self,
        *,
        messages: Messages,
        model: str | None = None,
        response_format: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        stream: Literal[True],
        timeout: float | None = None,
        extra_headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        priority: Priority = "normal",
        use_cache: bool = True,
        ttl: float | None = None,
        **params: Any,
    ) -> AsyncStream: ...

    @overload
    async def create(
        self,
        *,
        messages: Messages,
        model: str | None = None,
        response_format: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        stream: bool,
        timeout: float | None = None,
        extra_headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        priority: Priority = "normal",
        use_cache: bool = True,
        ttl: float | None = None,
        **params: Any,
    ) -> ChatCompletion[None] | AsyncStream: ...

    async def create(
        self,
        *,
        messages: Messages,
        model: str | None = None,
        response_format: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        stream: bool | None = None,
        timeout: float | None = None,
        extra_headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        priority: Priority = "normal",
        use_cache: bool = True,
        ttl: float | None = None,
        **params: Any,
    ) -> ChatCompletion[None] | AsyncStream:
        """Ask for a completion. None means "not given" for every argument.

        Args:
            messages: The chat messages.
            model: The model; None for the transport's.
            response_format: As JSON. A json_schema is combined with others of the same schema, and the answer is checked against it.
            temperature: As in the API.
            max_tokens: Most tokens of the answer. The transport knows which of the two names the endpoint takes.
            max_completion_tokens: The same by its newer name.
            stream: Whether to return an `AsyncStream`: the request then goes out alone, as it is, at once, and once.
            timeout: Seconds for the whole of it, retries included; until the answer begins if it is streamed.
            extra_headers: This caller's headers. With a credential among them, in any header, the transport's own key is not sent.
            extra_body: Further fields of the request; they come before all others.
            tenant: See `Microbatcher.submit`; so for those that follow. A stream has no use for them.
            priority: As named.
            use_cache: As named.
            ttl: As named.
            **params: Every other field of the request. With some of them (`tools`, `n`, `logprobs`, `seed`...) it goes alone, and
                the endpoint's own answer comes back.

        Returns:
            The completion, or the stream.

        Raises:
            ConfigError: An argument is wrong; nothing was sent.
            BatcherClosed: The batcher is not open.
            Overloaded: Too many requests are pending.
            RequestFailed: What ended the request, as from `submit`. A refusal is an error (`Refused`) unless the request went alone.
        """
        check_create(response_format)
        body = body_of(
            {
                "messages": messages,
                "model": model,
                "response_format": response_format,
                "temperature": temperature,
                "max_tokens": max_tokens,
                "max_completion_tokens": max_completion_tokens,
                "stream": stream,
                **params,
            },
            extra_body,
        )
        if body.get("stream"):
            return await open_stream(self._batcher, body, extra_headers, timeout)
        body.pop("stream", None)
        asked = body.get("response_format")
        whole, completion = await self._ask(
            body,
            str,
            headers=extra_headers,
            timeout=timeout,
            tenant=tenant,
            priority=priority,
            use_cache=use_cache,
            ttl=ttl,
        )
        if not whole and not is_text(asked):
            with_answer(completion, completion.microbatch, parsed=False)
        return completion

    async def parse(
        self,
        *,
        messages: Messages,
        response_format: TypeForm[T],
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        timeout: float | None = None,
        extra_headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        priority: Priority = "normal",
        use_cache: bool = True,
        ttl: float | None = None,
        **params: Any,
    ) -> ChatCompletion[T]:
        """Ask for a completion whose content is JSON of a type: `completion.choices[0].message.parsed`.

        Args:
            messages: The chat messages.
            response_format: A pydantic model, or anything that msgspec decodes: a Struct, a dataclass, a Literal, a list...
            model: As for `create`, and so for all that follow.
            temperature: As named.
            max_tokens: As named.
            max_completion_tokens: As named.
            timeout: As named.
            extra_headers: As named.
            extra_body: As named.
            tenant: As named.
            priority: As named.
            use_cache: As named.
            ttl: As named.
            **params: As for `create`. Where the model calls a strict tool, `function.parsed_arguments` holds its arguments.

        Returns:
            The completion.

        Raises:
            ConfigError: An argument is wrong; nothing was sent.
            BatcherClosed: The batcher is not open.
            Overloaded: Too many requests are pending.
            MalformedAnswer: The answer does not fit; it was asked for again before.
            TruncatedReply: The answer was cut off by the token limit.
            RequestFailed: What else ended the request.
        """
        body = body_of(
            {
                "messages": messages,
                "model": model,
                "temperature": temperature,
                "max_tokens": max_tokens,
                "max_completion_tokens": max_completion_tokens,
                **params,
            },
            extra_body,
        )
        if body.pop("stream", None):
            raise ConfigError("parse() waits for the whole answer; create(stream=True) streams")
        tools = body.get("tools") or ()
        whole, completion = await self._ask(
            body,
            response_format,
            headers=extra_headers,
            timeout=timeout,
            tenant=tenant,
            priority=priority,
            use_cache=use_cache,
            ttl=ttl,
        )
        if whole:
            parse_all(completion, response_format, tools)
        else:
            with_answer(completion, completion.microbatch, parsed=True)
        return completion

    async def _ask(self, body: dict[str, Any], output_type: Any, **arguments: Any) -> tuple[bool, ChatCompletion[Any]]:
        """Submit *body*; return whether all of the endpoint's reply matters, and the completion."""
        model = body.get("model")
        asked = submission(body, output_type)
        reply: Reply[Any] = await self._batcher.submit(asked.messages, **asked.arguments, **arguments)
        return asked.whole, completion_of(reply, model)
