"""`AsyncOpenAI`: a batcher with the interface of OpenAI's client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from microbatch.openai.completions import Completions

if TYPE_CHECKING:
    from types import TracebackType

    from microbatch.client import Microbatcher


class Chat:
    """The SDK's `client.chat`.

    Attributes:
        completions: The completions.
    """

    def __init__(self, batcher: Microbatcher) -> None:
        self.completions = Completions(batcher)


class AsyncOpenAI:
    """A client with the SDK's interface for chat completions; its requests may be combined with others.

    ```python
    async with AsyncOpenAI(mb.Microbatcher(mb.OpenAIChat("gpt-4.1-mini"))) as client:
        completion = await client.chat.completions.create(model="gpt-4.1-mini", messages=messages)
        print(completion.choices[0].message.content, completion.microbatch.cost_usd)
    ```

    Args:
        batcher: An open batcher, which its owner closes, or a new one, which `async with` opens and closes.

    Attributes:
        batcher: As given.
        chat: Holds `completions`.
    """

    def __init__(self, batcher: Microbatcher) -> None:
        self.batcher = batcher
        self.chat = Chat(batcher)

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
