"""`AsyncOpenAI`: a batcher with the interface of OpenAI's client, for chat completions and embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, cast, overload

import msgspec

from microbatch.checking import checks_arguments
from microbatch.client import Microbatcher
from microbatch.containment import contained
from microbatch.errors import ConfigError, Filtered, MalformedAnswer, TruncatedReply
from microbatch.openai.chat_completion import completion_of, submit_arguments, usage_share
from microbatch.openai.compatible import RAW_RESPONSE, Address, Models, raw
from microbatch.openai.embeddings import Embeddings
from microbatch.openai.objects import ChatCompletion, CompletionUsage, sdk_class
from microbatch.openai.options import OF_SUBMIT, given_options, is_given, request_body
from microbatch.openai.stream import open_stream
from microbatch.protocols import ChatCall
from microbatch.schema.answer_type import answer_type
from microbatch.schema.decode import misfit_message
from microbatch.transports.addresses import CHAT_COMPLETIONS, EMBEDDINGS
from microbatch.transports.chat_wire import can_stream
from microbatch.transports.lenient import as_object

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from typing_extensions import TypeForm

    from microbatch.messages import Messages, Priority, Reply, T, UseCache
    from microbatch.openai.compatible import RawResponse
    from microbatch.openai.objects import FunctionCall
    from microbatch.openai.stream import AsyncStream


class RequestOptions(TypedDict, total=False):
    """Arguments that `create` and `parse` share, all optional: fields of the API, and options of the SDK and of `submit`.

    Other fields are sent, too; for type checkers they belong in `extra_body`.
    """

    model: str | None
    temperature: float | None
    max_tokens: int | None
    max_completion_tokens: int | None

    timeout: float | None
    extra_headers: Mapping[str, str] | None
    extra_body: Mapping[str, Any] | None
    extra_query: Mapping[str, Any] | None
    tenant: str | None
    priority: Priority
    use_cache: UseCache
    ttl: float | None

    audio: Any
    frequency_penalty: float | None
    function_call: Any
    functions: Any
    logit_bias: Mapping[str, int] | None
    logprobs: bool | None
    metadata: Mapping[str, str] | None
    modalities: Any
    n: int | None
    parallel_tool_calls: bool | None
    prediction: Any
    presence_penalty: float | None
    prompt_cache_key: str | None
    prompt_cache_options: Any
    prompt_cache_retention: Any
    reasoning_effort: Any
    safety_identifier: str | None
    seed: int | None
    service_tier: Any
    stop: Any
    store: bool | None
    stream_options: Any
    tool_choice: Any
    tools: Any
    top_logprobs: int | None
    top_p: float | None
    user: str | None
    verbosity: Any
    web_search_options: Any


class CreateOptions(RequestOptions, total=False):
    """Arguments of `create`."""

    response_format: Mapping[str, Any] | None


class Completions:
    """Asks for chat completions, with the arguments and results of the SDK.

    Args:
        batcher: Coalesces the requests.
        defaults: Options of requests that do not give them.
    """

    def __init__(self, batcher: Microbatcher, defaults: Mapping[str, Any] | None = None) -> None:
        self._batcher = batcher
        self._defaults = dict(defaults or {})

    @property
    def with_raw_response(self) -> RawCompletions:
        """`create` and `parse` that return a `RawResponse`, whose `parse()` returns the result."""
        return RawCompletions(self)

    @overload
    async def create(
        self, *, messages: Messages, stream: Literal[False] | None = None, **options: Unpack[CreateOptions]
    ) -> ChatCompletion[None]: ...

    @overload
    async def create(
        self, *, messages: Messages, stream: Literal[True], **options: Unpack[CreateOptions]
    ) -> AsyncStream: ...

    @overload
    async def create(
        self, *, messages: Messages, stream: bool, **options: Unpack[CreateOptions]
    ) -> ChatCompletion[None] | AsyncStream: ...

    async def create(
        self, *, messages: Messages, stream: bool | None = None, **options: Unpack[CreateOptions]
    ) -> ChatCompletion[None] | AsyncStream:
        """Ask for a completion. None, and the SDK's `NOT_GIVEN` and `omit`, mean "not given" for every argument.

        Args:
            messages: The chat messages.
            stream: Return an `AsyncStream`: the request is then sent alone, unchanged, at once, and is not retried.
            **options: See `RequestOptions`. `response_format` is JSON; requests with the same json_schema may be combined, and answers
                are validated against it. The model defaults to the transport's, and either name of the token limit will do.
                `timeout` covers retries too; for a stream it ends when the answer begins. With a credential in `extra_headers` the
                transport's own key is not sent. `extra_body` takes precedence over other fields. `tenant`, `priority`,
                `use_cache` and `ttl` are those of `Microbatcher.submit`, and have no effect on a stream. With some fields
                (`tools`, `n`, `logprobs`, `seed`...) the request is sent alone and the endpoint's own answer is returned.

        Returns:
            The completion, or the stream.

        Raises:
            ConfigError: An argument is wrong; nothing was sent.
            BatcherClosed: The batcher is not open.
            Overloaded: Too many requests are pending.
            RequestFailed: The request failed, as in `submit`. A refusal is an error (`Refused`) unless the request was sent alone.
        """
        given = given_options(self._defaults, options)
        if isinstance(kind := given.get("response_format"), type):
            raise ConfigError(f"create() takes a response_format as JSON; parse() takes the type {kind.__name__}")
        body = request_body(given, messages=messages, stream=stream)
        if body.get("stream"):
            return await open_stream(self._batcher, body, given.get("extra_headers"), given.get("timeout"))
        body.pop("stream", None)
        is_text = as_object(body.get("response_format")).get("type") != "json_schema"
        whole, completion = await self._ask(body, str, given)
        if not whole and not is_text:
            completion.choices[0].message.content = completion.microbatch.text
        return completion

    async def parse(
        self,
        *,
        messages: Messages,
        response_format: TypeForm[T] | Mapping[str, Any] = str,  # type: ignore[assignment]
        **options: Unpack[RequestOptions],
    ) -> ChatCompletion[T]:
        """Ask for a completion whose content is JSON of a type: `completion.choices[0].message.parsed`.

        Args:
            messages: The chat messages.
            response_format: A pydantic model, or a type that msgspec decodes: a Struct, a dataclass, a Literal, a list...; or JSON, as
                for `create`, whose answers are parsed to dicts and lists.
            **options: As for `create`. If the model calls a strict tool, `function.parsed_arguments` holds its arguments.

        Returns:
            The completion.

        Raises:
            MalformedAnswer: The answer does not fit, also after it was asked for again.
            TruncatedReply: The answer was cut off by the token limit.
            MicrobatchError: As for `create`.
        """
        given = given_options(self._defaults, options)
        if not is_given(response_format):
            response_format = cast("TypeForm[T]", str)
        if isinstance(response_format, Mapping):
            completion: ChatCompletion[Any] = await self.create(
                messages=messages, **{**given, "response_format": response_format}
            )
            _parse_json(completion)
            return completion
        body = request_body(given, messages=messages)
        if body.pop("stream", None):
            raise ConfigError("parse() waits for the whole answer; create(stream=True) streams")
        tools = body.get("tools") or ()
        whole, completion = await self._ask(body, response_format, given)
        if whole:
            _parse_choices(completion, response_format, tools)
        else:
            # The content becomes the JSON of the answer itself, without code fences and without the object put around a bare value.
            message = completion.choices[0].message
            message.content, message.parsed = completion.microbatch.text, completion.microbatch.output
        return completion

    async def _ask(
        self, body: dict[str, Any], output_type: Any, given: Mapping[str, Any]
    ) -> tuple[bool, ChatCompletion[Any]]:
        """Submit *body*; return whether the reply may hold more than one text, so that all of it matters, and the completion."""
        if {"max_tokens", "max_completion_tokens"} <= body.keys():
            raise ConfigError("give max_tokens or max_completion_tokens, not both")
        whole = not can_stream(ChatCall(messages=(), params=body))
        if whole:
            if output_type is not str:
                answer = answer_type(output_type)
                schema = {"name": "answers", "strict": answer.strict, "schema": answer.single_schema}
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
                output_type = str
            if "response_format" in body:
                # As raw JSON it is sent unchanged; `submit` would apply the schema to the only text that it looks at.
                body["response_format"] = msgspec.Raw(_encode(body["response_format"]))
        reply: Reply[Any] = await self._batcher.submit(
            **submit_arguments(body),
            output_type=output_type,
            headers=given.get("extra_headers"),
            **{name: given[name] for name in OF_SUBMIT if name in given},
        )
        members = reply.body if reply.body is not None else completion_of(reply, body.get("model"))
        completion: ChatCompletion[Any] = ChatCompletion(members)
        completion.microbatch = reply
        completion.usage = CompletionUsage(usage_share(reply))
        return whole, completion


class Chat:
    """The SDK's `client.chat`, which holds `completions`."""

    def __init__(self, batcher: Microbatcher, defaults: Mapping[str, Any] | None = None) -> None:
        self.completions: Completions = Completions(batcher, defaults)


class AsyncOpenAI:
    """A client with the SDK's interface for chat completions and embeddings; its requests may be combined with others.

    Args:
        batcher: An open batcher, which its owner closes, or a new one, which `async with` opens and closes.
        defaults: Options of requests that do not give them; see `with_options`.

    Attributes:
        batcher: As given.
        chat: Holds `completions`.
        embeddings: Asks for embeddings.
        models: The endpoint's models.
        base_url: The endpoint's address, "" if the transport has none.
        api_key: A placeholder: the transport has the key.
        max_retries: Without effect: the batcher retries by its own policy.
    """

    api_key = "microbatch"
    max_retries = 0

    @checks_arguments
    def __init__(self, batcher: Microbatcher, *, defaults: Mapping[str, Any] | None = None) -> None:
        self.batcher = batcher
        self._defaults = dict(defaults or {})
        self.chat: Chat = Chat(batcher, self._defaults)
        self.embeddings: Embeddings = Embeddings(batcher, self._defaults)
        self.models: Models = Models(batcher, self._defaults.get("extra_headers", {}))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return sdk_class("openai", "AsyncOpenAI") or type(self)

    @property
    def beta(self) -> Self:
        """This client, for programs of the SDK's earlier `client.beta.chat.completions.parse`."""
        return self

    @property
    def base_url(self) -> Address:  # noqa: D102 see the class
        return Address(self.batcher.base_url)

    _base_url = base_url

    def with_options(
        self,
        *,
        timeout: float | None = None,
        default_headers: Mapping[str, str] | None = None,
        api_key: str | None = None,
        max_retries: int | None = None,  # noqa: ARG002 see the class
        **options: Any,
    ) -> Self:
        """Return a client of the same batcher with other defaults; `max_retries` has no effect.

        Args:
            timeout: As for `create`.
            default_headers: Headers that are added to those of each request.
            api_key: A key to send in place of the transport's.
            max_retries: No effect.
            **options: Others are the transport's.

        Raises:
            ConfigError: An option belongs to the transport.
        """
        if others := sorted(name for name, value in options.items() if is_given(value)):
            raise ConfigError(f"with_options() cannot change {', '.join(others)}: make another transport and batcher")
        defaults = dict(self._defaults)
        if is_given(timeout):
            defaults["timeout"] = timeout
        headers = dict(defaults.get("extra_headers", {}))
        if is_given(default_headers):
            headers |= default_headers or {}
        if is_given(api_key):
            headers["Authorization"] = f"Bearer {api_key}"
        return type(self)(self.batcher, defaults={**defaults, "extra_headers": headers})

    copy = with_options

    async def post(
        self, path: str, *, body: Mapping[str, Any], options: Mapping[str, Any] | None = None, **of_sdk: Any
    ) -> Any:
        """Ask for a completion, a stream or embeddings by the SDK's lower method, which litellm uses.

        Raises:
            ConfigError: The path is another than `/chat/completions` and `/embeddings`.
            MicrobatchError: As for `create`.
        """
        asked: Any
        if path == CHAT_COMPLETIONS:
            asked, body = self.chat.completions, {**body, "stream": of_sdk.get("stream") or body.get("stream")}
        elif path == EMBEDDINGS:
            asked, body = self.embeddings, {"input": None, **body}
        else:
            raise ConfigError(f"only {CHAT_COMPLETIONS} and {EMBEDDINGS} can be asked for, not {path}")
        given = dict(options or {})
        headers = {name: value for name, value in (given.get("headers") or {}).items() if name.lower() != RAW_RESPONSE}
        if len(headers) < len(given.get("headers") or {}):
            asked = asked.with_raw_response
        return await asked.create(
            **body,
            extra_headers=headers,
            extra_query=given.get("params") or None,
            extra_body=given.get("extra_json"),
            timeout=given.get("timeout"),
        )

    async def __aenter__(self) -> Self:
        await self.batcher.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.batcher.__aexit__(kind, error, traceback)

    async def close(self) -> None:
        """Close the batcher, as `Microbatcher.aclose` does."""
        await self.batcher.aclose()

    def __repr__(self) -> str:
        """Return the batcher's state."""
        return f"AsyncOpenAI({self.batcher!r})"


class RawCompletions:
    """The methods of `Completions` with raw responses."""

    def __init__(self, completions: Completions) -> None:
        self.create: Callable[..., Awaitable[RawResponse[ChatCompletion[None] | AsyncStream]]] = raw(completions.create)
        self.parse: Callable[..., Awaitable[RawResponse[ChatCompletion[Any]]]] = raw(completions.parse)


def _encode(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"response_format must be JSON: {error}") from error


def _parse_choices(completion: ChatCompletion[Any], output_type: Any, tools: Iterable[Mapping[str, Any]]) -> None:
    """Parse the contents of all choices, and the arguments of calls of strict tools, in place."""
    functions = [tool["function"] for tool in tools if tool.get("function", {}).get("strict") is True]
    strict = {function.get("name"): getattr(function, "model", None) for function in functions}
    for choice in completion.choices:
        message = choice.message
        if choice.finish_reason == "length":
            raise TruncatedReply("the answer was cut off by the token limit", raw=message.content or "")
        if choice.finish_reason == "content_filter":
            raise Filtered("the endpoint's content filter stopped the answer", status=200)
        for call in message.tool_calls or ():
            if call.function and call.function.name in strict:
                _parse_arguments(call.function, strict[call.function.name])
        if message.content:
            with contained() as decoding:
                message.parsed, message.content = answer_type(output_type).decode_single(message.content)
            if (error := decoding.error) is not None:
                raise MalformedAnswer(misfit_message(error), raw=message.content) from error


def _parse_json(completion: ChatCompletion[Any]) -> None:
    """Parse the contents of a completion for a response_format in JSON, in place; those that are no JSON have none."""
    for choice in completion.choices:
        with suppress(msgspec.DecodeError, UnicodeError):
            choice.message.parsed = msgspec.json.decode(choice.message.content or "")


def _parse_arguments(function: FunctionCall, model: Any) -> None:
    """Parse the arguments of a call, to *model* if the tool was made of one by `openai.pydantic_function_tool`."""
    with contained() as decoding:
        read = msgspec.json.decode if model is None else model.model_validate_json
        function.parsed_arguments = read(function.arguments)
    if (error := decoding.error) is not None:
        wrong = "are not JSON" if model is None else "do not fit"
        raise MalformedAnswer(f"the arguments of a tool call {wrong}", raw=str(function.arguments)) from error
