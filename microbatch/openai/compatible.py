"""The parts of the SDK's client that frameworks use beside `create` and `parse`: raw responses, `models`, and the SDK's classes.

Some frameworks check for classes of the SDK with `isinstance`, some call lower methods of the client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from microbatch.openai.objects import Object, sdk_class
from microbatch.openai.relayed import read_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping

    from microbatch.client import Microbatcher

T = TypeVar("T")

RAW_RESPONSE: Final = "x-stainless-raw-response"
"""The header by which the SDK asks itself for a raw response."""


class RawResponse(Generic[T]):
    """A completion or a stream, as `with_raw_response` returns it.

    Attributes:
        headers: The endpoint's headers of a stream; of a completion the id of its call, if there is one.
        http_response: None, as there is no response of an HTTP client.
    """

    http_response = None

    def __init__(self, result: T, headers: Mapping[str, str]) -> None:
        self._result = result
        self.headers = headers

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return sdk_class("openai._legacy_response", "LegacyAPIResponse") or RawResponse

    def parse(self) -> T:
        """Return the completion or the stream."""
        return self._result


def raw(ask: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[RawResponse[T]]]:
    """Return *ask*, with a result as `with_raw_response` returns it."""

    async def ask_raw(**options: Any) -> RawResponse[T]:
        result: Any = await ask(**options)
        response = getattr(result, "response", None)
        if response is not None:
            return RawResponse(result, response.headers)
        request_id = result.microbatch.request_id
        return RawResponse(result, {} if request_id is None else {"x-request-id": request_id})

    return ask_raw


class Address(str):
    """The address of the endpoint, which some frameworks log by a private attribute of the SDK's."""

    __slots__ = ()

    @property
    def _uri_reference(self) -> str:
        return str(self)


class Models:
    """The SDK's `client.models`."""

    def __init__(self, batcher: Microbatcher, headers: Mapping[str, str]) -> None:
        self._batcher = batcher
        self._headers = headers

    def list(self) -> ModelList:
        """Return the models of the endpoint, to be awaited or iterated.

        Raises:
            TransportError: The endpoint could not be reached, or refused.
        """
        return ModelList(self.retrieve(""))

    async def retrieve(self, model: str) -> Object:
        """Return the endpoint's description of *model*."""
        return Object(await read_json(self._batcher, f"/models/{model}".rstrip("/"), self._headers))


class ModelList:
    """The models of an endpoint: `await` it for an object with `data`, or iterate over them."""

    def __init__(self, asked: Awaitable[Object]) -> None:
        self._asked = asked

    def __await__(self) -> Generator[Any, None, Object]:
        return self._asked.__await__()

    async def __aiter__(self) -> AsyncIterator[Object]:
        for model in (await self._asked).data:
            yield model
