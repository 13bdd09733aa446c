"""Tokens, prices and counters."""
