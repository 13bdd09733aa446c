"""The simulated model with a count of what its quota charged, which is more than what is used where requests reserve long replies."""

from __future__ import annotations

from typing import Any

from microbatch.testing import SimulatedModel


class MeteredModel(SimulatedModel):
    """A `SimulatedModel` with a quota.

    Attributes:
        charged: Tokens of all requests that the quota let in: their prompt and max_tokens, or without one their reply.
    """

    charged = 0

    def charge(self, body: Any, key: str, tokens: int = 0) -> Any:
        limits = super().charge(body, key, tokens)
        self.charged += tokens  # a refused request has raised by now
        return limits
