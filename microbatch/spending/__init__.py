"""Budgets: what calls may cost, and what they have cost so far."""
