"""The figures of a budget."""

from __future__ import annotations

import msgspec


class BudgetFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The spending of a `Budget` in the present period, charges of calls under way included.

    Attributes:
        spent_usd: US dollars spent, by all tenants together; None if the budget has no `usd`.
        left_usd: US dollars left; None likewise, and if each tenant has its own budget.
        spent_tokens: Tokens spent, by all tenants together.
        left_tokens: Tokens left; None if the budget has no `tokens`, and if each tenant has its own budget.
        refused: Calls of this batcher that were not sent because of the budget, without audits.
    """

    spent_usd: float | None = None
    left_usd: float | None = None
    spent_tokens: int = 0
    left_tokens: int | None = None
    refused: int = 0
