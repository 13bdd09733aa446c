"""The common part of the routes whose requests are combined."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from microbatch.client import Microbatcher
    from microbatch.gateway.access import Access
    from microbatch.gateway.relay import Relay
    from microbatch.gateway.settings import GatewaySettings


class Route:
    """Submits requests to *batcher*, or has *relay* pass them on; *model* is the one for requests that name none, None for none.

    Fields of requests beside those that the batcher takes are *harmless* if requests with them are combined.
    """

    def __init__(
        self,
        batcher: Microbatcher,
        access: Access,
        relay: Relay,
        settings: GatewaySettings,
        model: str | None,
        harmless: Collection[str],
    ) -> None:
        self._batcher = batcher
        self._access = access
        self._relay = relay
        self._settings = settings
        self._model = model
        self._harmless = harmless
