"""Retries that many calls share, so that an outage is not answered with a multiple of the load.

Finagle and gRPC (proposal A6) do the same: each first attempt earns a part of a retry, and there is a small reserve for those who
have little traffic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from microbatch.policy import RetryPolicy

# First attempts whose share of retries is saved up: enough for all slots of a default policy to use all their attempts once, so a
# quiet day's savings do not become a storm of retries.
_SAVED_FIRSTS: Final = 1_000


class RetryBudget:
    """Retries that all calls of an account may make together.

    Args:
        policy: The rules.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._share = policy.budget
        self._balance = float(policy.reserve)
        self._most = policy.reserve + policy.budget * _SAVED_FIRSTS

    def first(self) -> float:
        """Note a first attempt, which earns part of a retry; return that part."""
        before = self._balance
        self._balance = min(self._most, before + self._share)
        return self._balance - before

    def take_back(self, earned: float) -> None:
        """Take back what an attempt has *earned* that was not made."""
        self._balance -= earned

    def draw(self) -> bool:
        """Take a retry, if there is one left."""
        # A hair of tolerance: five times 0.2 is not quite 1.
        if self._balance < 1 - 1e-9:
            return False
        self._balance -= 1
        return True

    def give_back(self) -> None:
        """Return a retry that was not made."""
        self._balance = min(self._most, self._balance + 1)
