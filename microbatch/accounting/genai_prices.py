"""List prices of many providers' models from the genai-prices package, extra `prices`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from microbatch.accounting.prices import Price, checked, look_up
from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


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
        self._own = checked(own)
        self._package: Any = None
        if find_spec("genai_prices") is None:
            raise ConfigError("genai_prices() needs the package genai-prices: pip install 'microbatch[prices]'")

    def load(self) -> None:
        """Import the data, which takes some tenths of a second; a batcher that opens does so in a thread."""
        import genai_prices  # noqa: PLC0415 optional, and slow

        self._package = genai_prices

    def __call__(self, model: str) -> Price | None:
        """Return the price of *model*, or None. The name may contain the provider: `anthropic/claude-sonnet-4-5`."""
        price = look_up(self._own, model)
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
