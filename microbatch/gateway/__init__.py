"""The gateway: an OpenAI-compatible server that combines the requests of unchanged clients."""

from __future__ import annotations

from microbatch.gateway.server import Gateway
from microbatch.gateway.settings import GatewaySettings

__all__ = ["Gateway", "GatewaySettings"]
