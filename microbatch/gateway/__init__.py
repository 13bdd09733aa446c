"""The gateway: an OpenAI-compatible server whose clients' requests leave together, without a change in the clients."""

from __future__ import annotations

from microbatch.gateway.server import Gateway
from microbatch.gateway.settings import GatewaySettings

__all__ = ["Gateway", "GatewaySettings"]
