"""What all caches here agree on."""

from __future__ import annotations

from typing import Final

WEEK: Final = 7 * 24 * 3600.0
"""Seconds for which answers are good when nobody says otherwise."""

SECRET_BYTES: Final = 32
"""Length of what keys the digests."""
