"""Prices of tokens, in US dollars: the user's, those of the extra `prices`, and a table of well-known models."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, cast

import msgspec

from microbatch.checking import AtLeast, check_fields
from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from microbatch.messages import Usage

logger: Final = logging.getLogger("microbatch")

Dollars: TypeAlias = Annotated[float, AtLeast(0)]

_PER_MILLION: Final = 1_000_000
_MAX_REMEMBERED: Final = 1_024  # callers may make up model names, so memory must not grow with them


class Price(msgspec.Struct, frozen=True):
    """The price of a model.

    Attributes:
        input: US dollars per million prompt tokens.
        output: US dollars per million generated tokens, reasoning included.
        cached_input: US dollars per million prompt tokens read from the provider's prefix cache; None for the price of `input`.
        cache_write: US dollars per million prompt tokens written to it; None for the price of `input`.
        tiers: Prices of other service tiers, by the name that the endpoint reports, such as "flex", "priority" or "batch". A tier that
            is not listed has the prices above.

    Raises:
        ConfigError: A price is no number, negative, NaN or infinite.
    """

    input: Dollars
    output: Dollars
    cached_input: Dollars | None = None
    cache_write: Dollars | None = None
    tiers: Mapping[str, Price] = {}

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("input", "output", "cached_input", "cache_write"):
            price = getattr(self, name)
            if price is not None and math.isinf(price):
                raise ConfigError(f"{name} must be a finite number, got {price!r}")

    def of_tier(self, tier: str | None) -> Price:
        """Return the price of a service tier; this one if *tier* is None or not listed."""
        return self.tiers.get(tier, self) if tier is not None else self

    def cost(self, usage: Usage) -> float:
        """Return the price of *usage* in US dollars."""
        # Some endpoints report more cached tokens than prompt tokens.
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        written = min(usage.cache_write_tokens, usage.prompt_tokens - cached)
        cached_price = self.input if self.cached_input is None else self.cached_input
        write_price = self.input if self.cache_write is None else self.cache_write
        dollars = (
            (usage.prompt_tokens - cached - written) * self.input
            + cached * cached_price
            + written * write_price
            + usage.completion_tokens * self.output
        )
        return dollars / _PER_MILLION


Prices: TypeAlias = Mapping[str, Price] | Callable[[str], Price | None]

# Standard tier of https://platform.openai.com/docs/pricing, as pydantic/genai-prices had it on 2025-11-13.
PRICES: Final[Mapping[str, Price]] = MappingProxyType(
    {
        "gpt-5": Price(1.25, 10.0, 0.125),
        "gpt-5-mini": Price(0.25, 2.0, 0.025),
        "gpt-5-nano": Price(0.05, 0.40, 0.005),
        "gpt-4.1": Price(2.0, 8.0, 0.50),
        "gpt-4.1-mini": Price(0.40, 1.60, 0.10),
        "gpt-4.1-nano": Price(0.10, 0.40, 0.025),
        "gpt-4o": Price(2.50, 10.0, 1.25),
        # The first gpt-4o kept its launch price (genai-prices misses that), so it must not go by its family name.
        "gpt-4o-2024-05-13": Price(5.0, 15.0),
        "gpt-4o-mini": Price(0.15, 0.60, 0.075),
        "o4-mini": Price(1.10, 4.40, 0.275),
        "o3": Price(2.0, 8.0, 0.50),
        "o1": Price(15.0, 60.0, 7.50),
        "gpt-3.5-turbo": Price(0.50, 1.50),
    }
)
"""List prices of well-known OpenAI models, without discounts (batch, flex), cache writes and regional surcharges.

Prices change; those that a user gives take precedence.
"""

_DATE = re.compile(r"-\d{4}-\d{2}-\d{2}\Z")


def _look_up(table: Mapping[str, Price], model: str) -> Price | None:
    """Return the price of *model* in *table* under the most specific of its names, or None.

    The names are the model's own and those without a trailing -YYYY-MM-DD and a leading "openai/". A prefix is not enough:
    gpt-4.1-mini must not be priced as gpt-4.1.
    """
    plain = model.removeprefix("openai/")
    names = (model, _DATE.sub("", model), plain, _DATE.sub("", plain))
    return next((table[name] for name in names if name in table), None)


def _checked(prices: object) -> dict[str, Price]:
    """Return a copy of a user's table. Raise `ConfigError` if it is no mapping from names to `Price`s."""
    if not isinstance(prices, Mapping):
        raise ConfigError(f"prices must be a mapping, a function or None, got {type(prices).__name__}")
    table: dict[str, Price] = {}
    for model, price in cast("Mapping[object, object]", prices).items():
        if not isinstance(model, str):
            raise ConfigError(f"prices must be filed under model names, got {model!r}")
        if not isinstance(price, Price):
            raise ConfigError(f"the price of {model!r} must be a Price, got {type(price).__name__}")
        table[model] = price
    return table


class PriceBook:
    """The prices of models: the user's first, then the built-in `PRICES`; see `_look_up`.

    The first model without a price is logged once.

    Args:
        prices: A table (copied), or a function that takes a model name and returns its price or None; None for the built-in table
            alone. Anything else raises `ConfigError`.
    """

    def __init__(self, prices: Prices | None = None) -> None:
        self._ask: Callable[[str], object] | None = prices if callable(prices) else None
        self._table = {} if prices is None or callable(prices) else _checked(prices)
        self._warned = False
        self._missed = False
        self._resolved = lru_cache(_MAX_REMEMBERED)(self._resolve)

    def for_model(self, model: str | None) -> Price | None:
        """Return the price of a model, resolved once per name; None if it is unknown, or the user's function fails."""
        return self._resolved(model) if model else None

    @property
    def load(self) -> Callable[[], object] | None:
        """The user's function's own `load`, which prepares its prices and may take a while; None if it has none."""
        load = getattr(self._ask, "load", None)
        return load if callable(load) else None

    def _resolve(self, model: str) -> Price | None:
        if self._ask is not None:
            try:
                answer = self._ask(model)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # noqa: BLE001 - Rust panics are no Exception
                self._warn(model, f"raised {type(error).__name__}")
                return None
            if isinstance(answer, Price):
                return answer
            if answer is not None:
                self._warn(model, f"returned {type(answer).__name__} instead of a Price")
                return None
        price = _look_up(self._table, model) or _look_up(PRICES, model)
        if price is None and not self._missed:
            self._missed = True
            words = "no price is known for model %r, so cost_usd is None for it and its like; give prices={...} or genai_prices()"
            logger.warning(words, model)
        return price

    def _warn(self, model: str, what: str) -> None:
        # Once: a function that fails for one model usually fails for all. Its message may hold keys and is not logged.
        if not self._warned:
            self._warned = True
            logger.warning("the prices function %s for model %r; costs of such models are unknown", what, model)


def genai_prices(own: Mapping[str, Price] | None = None) -> GenaiPrices:
    """Return a function from model names to list prices, for `Microbatcher(prices=genai_prices())`.

    The data is that of the installed genai-prices package; nothing is downloaded. Prices are a model's standard ones at the time it
    is first seen. Where they rise with the length of the prompt they are those of short prompts, so very long ones cost more.

    Args:
        own: Prices that take precedence, by model name; None for none.

    Raises:
        ConfigError: The package is not installed, or `own` is no mapping from names to `Price`s.
    """
    return GenaiPrices({} if own is None else own)


class GenaiPrices:
    """Prices from a table of the user, then from genai-prices; see `genai_prices`."""

    def __init__(self, own: Mapping[str, Price]) -> None:
        self._own = _checked(own)
        self._package: Any = None
        if find_spec("genai_prices") is None:
            raise ConfigError("genai_prices() needs the package genai-prices: pip install 'microbatch[prices]'")

    def load(self) -> None:
        """Import the data, which takes some tenths of a second; a batcher that opens does so in a thread."""
        import genai_prices  # noqa: PLC0415 optional, and slow

        self._package = genai_prices

    def __call__(self, model: str) -> Price | None:
        """Return the price of *model*, or None. The name may contain the provider: `anthropic/claude-sonnet-4-5`."""
        price = _look_up(self._own, model)
        if price is not None:
            return price
        if self._package is None:
            self.load()
        provider, slash, name = model.partition("/")
        return self._listed(model) or (self._listed(name, provider) if slash else None)

    def _listed(self, model: str, provider: str | None = None) -> Price | None:
        try:
            found = self._package.calc_price(self._package.Usage(), model, provider_id=provider).model_price
        except LookupError:
            return None
        paid, generated = _base(found.input_mtok), _base(found.output_mtok)
        if paid is None or generated is None:
            return None  # paid by the image, the second, the request
        return Price(paid, generated, _base(found.cache_read_mtok))

    def __repr__(self) -> str:
        """Return the number of the user's prices."""
        return f"genai_prices(own=<{len(self._own)}>)"


def _base(price: Any) -> float | None:
    """Return a price as a number; that of the first tier if it is tiered."""
    price = getattr(price, "base", price)
    return None if price is None else float(price)
