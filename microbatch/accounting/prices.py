"""Prices of tokens, in US dollars: the user's, and those of the extra `prices`."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias, cast

import msgspec

from microbatch.checking import AtLeast, check_fields
from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.messages import Usage

logger: Final = logging.getLogger("microbatch")

Dollars: TypeAlias = Annotated[float, AtLeast(0)]

BATCH_DISCOUNT: Final = 0.5
"""The price of a provider's batches, as a part of the usual one, where it is not known."""

_EMBEDDINGS: Final = "text-embedding-"
"""The beginning of the names of OpenAI's embedding models, by which genai-prices does not know them for OpenAI's."""

_PER_MILLION: Final = 1_000_000
_RATES: Final = ("input", "output", "cached_input", "cache_write")
_MAX_REMEMBERED: Final = 1_024  # callers may make up model names, so memory must not grow with them


class Price(msgspec.Struct, frozen=True):
    """The price of a model.

    Attributes:
        input: US dollars per million prompt tokens.
        output: US dollars per million generated tokens, reasoning included; 0 for embedding models, which generate none.
        cached_input: US dollars per million prompt tokens read from the provider's prefix cache; None for the price of `input`.
        cache_write: US dollars per million prompt tokens written to it; None for the price of `input`.
        tiers: Prices of other service tiers, by the name that the endpoint reports, such as "flex", "priority" or "batch". A tier that
            is not listed has the prices above.
        above: Prices of calls with long prompts, all of whose tokens cost more, by the number of prompt tokens above which they hold.

    Raises:
        ConfigError: A price is no number, negative, NaN or infinite, or one of `tiers` or `above` is no `Price`.
    """

    input: Dollars
    output: Dollars = 0.0
    cached_input: Dollars | None = None
    cache_write: Dollars | None = None
    tiers: Mapping[str, Price] = {}
    above: Mapping[int, Price] = {}

    def __post_init__(self) -> None:
        check_fields(self)
        for name in _RATES:
            price = getattr(self, name)
            if price is not None and math.isinf(price):
                raise ConfigError(f"{name} must be a finite number, got {price!r}")
        for field, kind, words in (("tiers", str, "names"), ("above", int, "whole numbers")):
            for key, price in getattr(self, field).items():
                if not isinstance(key, kind) or not isinstance(price, Price):
                    found = f"{type(key).__name__} to {type(price).__name__}"
                    raise ConfigError(f"{field} must be a mapping of {words} to Prices, got {found}")

    def of_tier(self, tier: str | None) -> Price:
        """Return the price of a service tier; this one if *tier* is None or not listed."""
        return self.tiers.get(tier, self) if tier is not None else self

    def of_batches(self) -> Price:
        """Return the price of the provider's batches: the tier "batch", or half of this one if it is not listed."""
        if "batch" in self.tiers:
            return self.tiers["batch"]
        above = {length: _discounted(price) for length, price in self.above.items()}
        return msgspec.structs.replace(_discounted(self), above=above)

    def for_prompt(self, prompt_tokens: int) -> Price:
        """Return the price of calls with so long a prompt; that of any part of such a call is the same."""
        if not self.above:
            return self
        length = max((length for length in self.above if prompt_tokens > length), default=None)
        return msgspec.structs.replace(self, above={}) if length is None else self.above[length]

    def cost(self, usage: Usage) -> float:
        """Return the price of *usage*, that of a call, in US dollars."""
        price = self.for_prompt(usage.prompt_tokens)
        # Some endpoints report more cached tokens than prompt tokens.
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        written = min(usage.cache_write_tokens, usage.prompt_tokens - cached)
        cached_price = price.input if price.cached_input is None else price.cached_input
        write_price = price.input if price.cache_write is None else price.cache_write
        dollars = (
            (usage.prompt_tokens - cached - written) * price.input
            + cached * cached_price
            + written * write_price
            + usage.completion_tokens * price.output
        )
        return dollars / _PER_MILLION


def _discounted(price: Price) -> Price:
    """Return the rates of *price* in a batch, without tiers."""
    rates: dict[str, float | None] = {name: getattr(price, name) for name in _RATES}
    return Price(**{name: rate * BATCH_DISCOUNT for name, rate in rates.items() if rate is not None})  # type: ignore[arg-type]


Prices: TypeAlias = Mapping[str, Price] | Callable[[str], Price | None]

_DATE = re.compile(r"-\d{4}-?\d{2}-?\d{2}\Z")


def _names(model: str) -> Iterator[str]:
    """Yield the names under which the price of *model* may be listed, the most specific first.

    They are its own, those without the providers that gateways put before it, each also without the date at its end. A prefix is not
    enough: gpt-4.1-mini must not be priced as gpt-4.1.
    """
    while model:
        yield model
        if _DATE.search(model):
            yield _DATE.sub("", model)
        model = model.partition("/")[2]


def _look_up(table: Mapping[str, Price], model: str) -> Price | None:
    """Return the price of *model* in *table* under the most specific of its names, or None."""
    return next((table[name] for name in _names(model) if name in table), None) if table else None


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


class PriceTable:
    """Prices by model that may be replaced while batchers use them, as their `prices=`.

    Args:
        table: A mapping from names to `Price`s, copied.

    Attributes:
        on_change: Functions that are called after a change.

    Raises:
        ConfigError: It is no such mapping.
    """

    def __init__(self, table: Mapping[str, Price]) -> None:
        self._table = _checked(table)
        self.on_change: list[Callable[[], None]] = []

    def __call__(self, model: str) -> Price | None:
        """Return the price of *model*; None if it is not known."""
        return _look_up(self._table, model)

    def replace(self, table: Mapping[str, Price]) -> None:
        """Take another *table*; what has been charged stays so. Raise `ConfigError` if it is none, and keep the one before."""
        self._table = _checked(table)
        for act in self.on_change:
            act()


class PriceBook:
    """The prices of models: the user's, then those of genai-prices if that is installed.

    The first model without a price is logged once.

    Args:
        prices: A table (copied), or a function that takes a model name and returns its price or None; None for none. Anything else
            raises `ConfigError`.
        base_url: The endpoint's address, which may tell whose prices hold; "" if there is none.
    """

    def __init__(self, prices: Prices | None = None, *, base_url: str = "") -> None:
        self._ask: Callable[[str], object] | None = None
        self._listed: GenaiPrices | None = None
        self._demanded = isinstance(prices, GenaiPrices)  # by the user
        self._at_open = self._demanded or bool(base_url)
        if isinstance(prices, GenaiPrices):
            self._listed, prices = prices.of_endpoint(base_url), prices.own
        elif find_spec("genai_prices") is not None:
            self._listed = GenaiPrices({}, base_url=base_url)
        if callable(prices):
            self._ask, prices = prices, None
        self._table = {} if prices is None else _checked(prices)
        self._warned = False
        self._missed = False
        self._own = lru_cache(_MAX_REMEMBERED)(self._find_own)
        if isinstance(self._ask, PriceTable):
            self._ask.on_change.append(self._own.cache_clear)

    def for_model(self, model: str | None, asked: str | None = None) -> Price | None:
        """Return the price of a model, or None if it is unknown, or the user's function fails.

        Args:
            model: The model as the endpoint names it; None if that is unknown.
            asked: The name by which it was asked for, which counts where *model* has no price. The user's prices of either name come
                before the list prices of either.
        """
        if not (model or asked):
            return None
        names = [name for name in dict.fromkeys((model, asked)) if name]
        own = [self._own(name) for name in names]
        known = any(price is not None for price in own)  # or would be, if the user's function had not failed
        if not known:
            self._load_listed(strict=False)
        listed = self._listed
        prices = own if known or listed is None else (self._tried(listed, name) for name in names)
        for price in prices:
            if isinstance(price, Price):
                return price
        if not known:
            self._note_missing(names[0])
        return None

    def pricing(
        self, model: str | None, tier: str | None = None, *, asked: str | None = None, prompt_tokens: int | None = None
    ) -> Callable[[Usage], float] | None:
        """Return what prices a usage of a model; None if its price is unknown.

        Args:
            model: See `for_model`, as for *asked*.
            asked: The name by which it was asked for.
            tier: The service tier that the endpoint has reported, or None.
            prompt_tokens: The length of the prompt of the call whose parts are priced; None if each usage is that of a whole call.
        """
        price = self.for_model(model, asked)
        if price is None:
            return None
        price = price.of_tier(tier)
        return (price if prompt_tokens is None else price.for_prompt(prompt_tokens)).cost

    @property
    def load(self) -> Callable[[], object] | None:
        """Prepares the prices, which may take a while and should be done in a thread; None if they are ready.

        Also None without an endpoint's address, as of a double in a test, whose calls may name no model: list prices are then loaded
        when a model is named.
        """
        waits = self._at_open and self._listed is not None and not self._listed.loaded
        return self._load if waits or self._load_own is not None else None

    @property
    def _load_own(self) -> Callable[[], object] | None:
        load = getattr(self._ask, "load", None)  # the user's function may have one
        return load if callable(load) else None

    def _load(self) -> None:
        if self._load_own is not None:
            self._load_own()
        if self._at_open:
            self._load_listed(strict=self._demanded)

    def _load_listed(self, *, strict: bool) -> None:
        if self._listed is None or self._listed.loaded:
            return
        try:
            self._listed.load()
        except Exception:
            if strict:
                raise
            self._listed = None  # its being installed is no reason to fail
            logger.warning("genai-prices cannot be used, so list prices are unknown", exc_info=True)

    def _find_own(self, model: str) -> Price | Literal[False] | None:
        """Return the user's price of *model*; None if there is none, False if the user's function fails."""
        return _look_up(self._table, model) if self._ask is None else self._tried(self._ask, model)

    def _tried(self, ask: Callable[[str], object], model: str) -> Price | Literal[False] | None:
        """Return what *ask* returns for *model*; False if it fails, which must not end a call."""
        try:
            answer = ask(model)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - Rust panics are no Exception
            self._warn(model, f"raised {type(error).__name__}")
            return False
        if answer is None or isinstance(answer, Price):
            return answer
        self._warn(model, f"returned {type(answer).__name__} instead of a Price")
        return False

    def _note_missing(self, model: str) -> None:
        if not self._missed:
            self._missed = True
            remedy = "give prices= (the flag --prices)"
            if self._listed is None:
                remedy += ", or install list prices: pip install 'microbatch[prices]'"
            logger.warning(
                "no price is known for model %r: cost_usd is None for it, and for any other model without a price; %s",
                model,
                remedy,
            )

    def _warn(self, model: str, what: str) -> None:
        # Once: a function that fails for one model usually fails for all. Its message may hold keys and is not logged.
        if not self._warned:
            self._warned = True
            logger.warning("the prices function %s for model %r; costs of such models are unknown", what, model)


def genai_prices(own: Mapping[str, Price] | None = None) -> GenaiPrices:
    """Return a function from model names to list prices, for `Microbatcher(prices=genai_prices())`.

    The data is that of the installed genai-prices package; nothing is downloaded. A batcher without `prices` uses it too, if it is
    installed. Prices are those of the present minute. Fees per request or search, and for cache writes that last an hour, are not
    among them.

    Args:
        own: Prices that take precedence, by model name; None for none.

    Raises:
        ConfigError: The package is not installed, or `own` is no mapping from names to `Price`s.
    """
    return GenaiPrices({} if own is None else own)


class GenaiPrices:
    """Prices from a table of the user, then from genai-prices; see `genai_prices`.

    Args:
        own: The user's table.
        base_url: The endpoint's address, whose provider's prices come first; "" for none.
        now: Returns the time in seconds since 1970, because some prices change with the date or the time of day.

    Attributes:
        own: The user's table, copied.
    """

    def __init__(
        self,
        own: Mapping[str, Price],
        *,
        base_url: str = "",
        now: Callable[[], float] = time.time,  # noqa: TID251 the dates of prices
    ) -> None:
        self.own: dict[str, Price] = _checked(own)
        self._base_url = base_url.lower()
        self._now = now
        self._package: Any = None
        self._remembered = lru_cache(_MAX_REMEMBERED)(self._find)
        if find_spec("genai_prices") is None:
            raise ConfigError("genai_prices() needs the package genai-prices: pip install 'microbatch[prices]'")

    def of_endpoint(self, base_url: str) -> GenaiPrices:
        """Return the same prices for an endpoint, unless these are for one already."""
        return self if self._base_url or not base_url else GenaiPrices(self.own, base_url=base_url, now=self._now)

    @property
    def loaded(self) -> bool:
        """True if the data is at hand."""
        return self._package is not None

    def load(self) -> None:
        """Import the data, which takes some tenths of a second; a batcher that opens does so in a thread."""
        from genai_prices import data_snapshot  # noqa: PLC0415 optional, and slow

        self._package = data_snapshot
        try:
            self._find("gpt-4o", 0)  # which imports the rest
        except BaseException:
            self._package = None
            raise

    def __call__(self, model: str) -> Price | None:
        """Return the price of *model*, or None. The name may contain the provider: `anthropic/claude-sonnet-4-5`."""
        price = _look_up(self.own, model)
        if price is not None:
            return price
        if self._package is None:
            self.load()
        return self._remembered(model, int(self._now() // 60))

    def _find(self, model: str, minute: int) -> Price | None:
        when = datetime.fromtimestamp(60 * minute, UTC)
        for provider, name in self._places(model):
            # Not by `calc_price`, which remembers every name that is not listed.
            found = provider.find_model(name, all_providers=self._package.get_snapshot().providers)
            if found is not None:
                return _as_price(found, when, tiered=any(found is own for own in provider.models))
        return None

    def _places(self, model: str) -> Iterator[tuple[Any, str]]:
        """Yield the providers that may list *model*, each with the name it may have there, the most specific first."""
        providers = self._package.get_snapshot().providers
        by_id = partial(self._package.find_provider_by_id, providers)
        of_endpoint = [each for each in providers if self._base_url and re.match(each.api_pattern, self._base_url)]
        model = model.removeprefix("models/")  # as Gemini names its own
        for name in dict.fromkeys((model, _DATE.sub("", model))):
            provider, slash, rest = name.partition("/")
            of_model = [each for each in providers if each.model_match is not None and each.model_match.is_match(name)]
            if not of_model and name.startswith(_EMBEDDINGS):
                of_model = [each for each in providers if each.id == "openai"]
            places = [*((each, name) for each in (*of_endpoint[:1], *of_model[:1]))]
            if slash:
                # OpenRouter's list has the names that gateways use.
                places += [(by_id(provider), rest), (by_id("openrouter"), name)]
            yield from (place for place in places if place[0] is not None)

    def __repr__(self) -> str:
        """Return the number of the user's prices."""
        return f"genai_prices(own=<{len(self.own)}>)"


def _as_price(model: Any, when: datetime, *, tiered: bool) -> Price | None:
    """Return the price of a listed model at a time, *tiered* with those of service tiers.

    None if it is not paid by the token, but by the image, the second, the request.
    """
    price = _without_tiers(model.get_prices(when))
    if price is None or not tiered:
        return price
    tiers: dict[str, Price] = {}
    for variant in getattr(model, "price_variants", None) or ():
        (key, tier), *more = variant.when.items()
        if key in ("service_tier", "processing") and not more:  # the latter of batches
            varied = _without_tiers(model.get_prices(when, variant.when))
            if varied is not None and varied != price:
                tiers[tier] = varied
    return msgspec.structs.replace(price, tiers=tiers)


def _without_tiers(listed: Any) -> Price | None:
    paid, generated, *cached = (
        getattr(listed, name, None) for name in ("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok")
    )
    if paid is None:
        return None
    generated = (
        0.0 if generated is None else generated
    )  # that of embedding models is not listed, as they generate nothing

    def at(prompt_tokens: int) -> Price:
        cached_input, cache_write = (_rate(rate, prompt_tokens) for rate in cached)
        return Price(_rate(paid, prompt_tokens), _rate(generated, prompt_tokens), cached_input, cache_write)  # type: ignore[arg-type]

    lengths = {tier.start for rate in (paid, generated, *cached) for tier in getattr(rate, "tiers", ())}
    return msgspec.structs.replace(at(0), above={length: at(length + 1) for length in sorted(lengths)})


def _rate(rate: Any, prompt_tokens: int) -> float | None:
    """Return a rate of the package for prompts of a length as a number."""
    passed = [tier.price for tier in getattr(rate, "tiers", ()) if prompt_tokens > tier.start]  # in ascending order
    rate = passed[-1] if passed else getattr(rate, "base", rate)
    return None if rate is None else float(rate)
