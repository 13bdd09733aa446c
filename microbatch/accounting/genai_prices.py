"""Prices of many providers' models from the genai-prices package, extra `prices`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from microbatch.accounting.prices import Price, checked, look_up
from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


def genai_prices(own: Mapping[str, Price] | None = None) -> GenaiPrices:
    """Return what knows the list prices of some thousand models, for `Microbatcher(prices=genai_prices())`.

    The data is that of the installed genai-prices package: nothing is downloaded, so a newer release of it has newer prices.
    Prices are a model's standard ones as of the moment at which it is first seen. Where a price rises with the length of the
    prompt it is that of short ones, so very long prompts cost more than is told.

    Args:
        own: Prices of one's own, in US dollars per million tokens; they come first. None for none.

    Raises:
        ConfigError: The package is not installed, or `own` holds something else than names and `Price`s.
    """
    return GenaiPrices({} if own is None else own)


class GenaiPrices:
    """Finds a model's price in a table of the user's, then among those of genai-prices.

    Args:
        own: The table; copied.

    Raises:
        ConfigError: The package is not installed, or `own` is no table of prices.
    """

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
        """Return the price of *model*, or None if nobody knows it. A name may say whose it is: `anthropic/claude-sonnet-4-5`."""
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
        """Tell how many prices are the user's own."""
        return f"genai_prices(own=<{len(self._own)}>)"


def _base(price: Any) -> float | None:
    """Return a price as a number: of a tiered one, that of the first tier."""
    price = getattr(price, "base", price)
    return None if price is None else float(price)
