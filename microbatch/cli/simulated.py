"""The endpoint of `--simulate`: it runs within the command, and has the same address every time."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from microbatch.errors import ConnectFailed
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from microbatch.protocols import ChatCall, Completion
    from microbatch.testing.endpoint import SimulatedEndpoint
    from microbatch.transports.relay import Forwarded

SIMULATED_MODEL: Final = "gpt-4.1-mini"


class SimulatedChat:
    """A transport to a simulated endpoint, which it serves itself as long as it is open.

    The endpoint takes whatever port is free, so its true address differs from run to run. What a run leaves for the next one, in a
    cache or beside its output, is under `base_url`.

    Args:
        model: The model to ask when a call names none.

    Attributes:
        model: As given.
        base_url: "simulated".
    """

    base_url: Final = "simulated"

    def __init__(self, model: str | None) -> None:
        self.model = model
        self._endpoint: SimulatedEndpoint | None = None
        self._chat: OpenAIChat | None = None

    async def open(self) -> None:
        """Begin to serve."""
        from microbatch.testing.endpoint import SimulatedEndpoint  # noqa: PLC0415 a server, which a real run does not need

        endpoint = SimulatedEndpoint()
        await endpoint.open()
        self._endpoint = endpoint
        self._chat = OpenAIChat(self.model, base_url=endpoint.base_url, api_key="simulated")

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Make one attempt at *call*; see `OpenAIChat.send`."""
        if self._chat is None:
            raise ConnectFailed("the simulated endpoint is not open")
        return await self._chat.send(call, on_text)

    @asynccontextmanager
    async def forward(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[Forwarded]:
        """Relay a request as it is; see `OpenAIChat.forward`."""
        if self._chat is None:
            raise ConnectFailed("the simulated endpoint is not open")
        async with self._chat.forward(method, path, headers, body) as response:
            yield response

    async def aclose(self) -> None:
        """Stop serving."""
        chat, self._chat = self._chat, None
        endpoint, self._endpoint = self._endpoint, None
        if chat is not None:
            await chat.aclose()
        if endpoint is not None:
            await endpoint.aclose()
