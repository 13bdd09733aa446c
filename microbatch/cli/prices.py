"""`--prices FILE`: the user's prices, which come before list prices.

The file is a JSON object with an entry for each model: `{"my-model": {"input": 2.0, "output": 8.0}}`, in US dollars per million tokens.
An entry may also have `cached_input`, `cache_write`, `tiers` (an object with an entry for each service tier) and `above` (one for each
length of the prompt, in tokens, above which other prices hold).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.accounting.prices import Price
from microbatch.cli.console import UsageError
from microbatch.errors import ConfigError

if TYPE_CHECKING:
    import argparse

_FIELDS: Final = Price.__struct_fields__
_REQUIRED: Final = ("input", "output")


def read_prices(args: argparse.Namespace) -> dict[str, Price] | None:
    """Return the prices of `--prices` by model, None without the flag; raise `UsageError` if the file is wrong."""
    path = args.prices
    if path is None:
        return None
    try:
        content = Path(path).read_text("utf-8-sig")
        entries = msgspec.json.decode(content, type=dict[str, Any])
    except OSError as error:
        raise UsageError(f"--prices: cannot read {path!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--prices: {path!r} must hold a JSON object with an entry for each model: {error}") from None
    try:
        return {model: _price(repr(model), entry) for model, entry in entries.items()}
    except ConfigError as error:
        raise UsageError(f"--prices {path}: {error}") from None


def _price(name: str, entry: Any) -> Price:
    """Return the price of the entry *name*; raise `ConfigError` that names it if it is wrong."""
    if not isinstance(entry, dict):
        raise ConfigError(f'the entry {name} must be an object, as {{"input": 2.0, "output": 8.0}}')
    lacking = [field for field in _REQUIRED if entry.get(field) is None]
    if lacking:
        raise ConfigError(f"the entry {name} lacks {' and '.join(lacking)}")
    unknown = [field for field in entry if field not in _FIELDS]
    if unknown:
        raise ConfigError(f"the entry {name} has an unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}")
    fields: dict[str, Any] = dict(entry)
    for field, what in (("tiers", "tier"), ("above", "prompts above")):
        parts = entry.get(field, {})
        if not isinstance(parts, dict):
            raise ConfigError(f"{field} of the entry {name} must be an object")
        fields[field] = {key: _price(f"{name}, {what} {key}", part) for key, part in parts.items()}
    fields["above"] = {_length(name, key): price for key, price in fields["above"].items()}
    try:
        return Price(**fields)
    except ConfigError as error:
        raise ConfigError(f"the entry {name}: {error}") from None


def _length(name: str, key: str) -> int:
    if not key.isdecimal():
        raise ConfigError(f"above of the entry {name} must have whole numbers of tokens as names, got {key!r}")
    return int(key)
