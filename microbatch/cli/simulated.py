"""The endpoint of `--simulate`, which runs within the command."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from microbatch.errors import ConnectFailed
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from microbatch.protocols import ChatCall, Completion, Embedded, EmbeddingCall
    from microbatch.transports.relay import Forwarded

SIMULATED_MODEL: Final = "gpt-4.1-mini"
_MOST_NAMED: Final = 4


class SimulatedChat:
    """A transport to a simulated endpoint, which it serves while it is open.

    The real address has a free port and differs from run to run; caches and outputs are kept under `base_url`.
    """

    base_url: Final = "simulated"

    def __init__(self, model: str | None, embedding_model: str | None = None) -> None:
        self.model = model
        self.embedding_model = embedding_model
        self._asked: dict[str, None] = {}  # models; an ordered set
        self._transport: OpenAIChat | None = None
        self._stack = AsyncExitStack()

    @property
    def _chat(self) -> OpenAIChat:
        if self._transport is None:
            raise ConnectFailed("the simulated endpoint is not open")
        return self._transport

    @property
    def models(self) -> str:
        """The models that were asked for, in words; the default if none was."""
        names = sorted(self._asked) or [self.model or SIMULATED_MODEL]
        if len(names) > _MOST_NAMED:
            names[_MOST_NAMED:] = ["others"]
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

    async def open(self) -> None:
        """Start to serve."""
        from microbatch.testing.endpoint import SimulatedEndpoint  # noqa: PLC0415 a server, which a real run does not need

        endpoint = await self._stack.enter_async_context(SimulatedEndpoint(brief=True))
        self._transport = OpenAIChat(
            self.model, base_url=endpoint.base_url, api_key="simulated", embedding_model=self.embedding_model
        )
        self._stack.push_async_callback(self._transport.aclose)

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Make one attempt at *call*; see `OpenAIChat.send`."""
        name = call.model or self.model
        if name and len(self._asked) <= _MOST_NAMED:
            self._asked[name] = None
        return await self._chat.send(call, on_text)

    async def embed(self, call: EmbeddingCall) -> Embedded:
        """Make one attempt at *call*; see `OpenAIChat.embed`."""
        return await self._chat.embed(call)

    def forward(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AbstractAsyncContextManager[Forwarded]:
        """Relay a request as it is; see `OpenAIChat.forward`."""
        return self._chat.forward(method, path, headers, body)

    async def aclose(self) -> None:
        """Stop serving."""
        self._transport = None
        await self._stack.aclose()
