"""Prices: whose table wins, which names are the same model, and that a user's function can break nothing."""

from __future__ import annotations

import logging
import math
from types import MappingProxyType

import msgspec
import pytest
from helpers import each
from hypothesis import given
from hypothesis import strategies as st

from microbatch.accounting.prices import PRICES, Price, PriceBook
from microbatch.errors import ConfigError
from microbatch.messages import Usage

MINE = Price(7.0, 9.0)


class RustPanicError(BaseException):
    """Stands for pyo3's PanicException, which is no Exception either."""


def test_a_million_tokens_of_each_kind_cost_what_the_price_says():
    price = Price(2.0, 8.0, 0.5)
    assert price.cost(Usage(1_000_000, 0)) == 2.0
    assert price.cost(Usage(0, 1_000_000)) == 8.0
    assert price.cost(Usage(1_000_000, 0, 1_000_000)) == 0.5


def test_cached_tokens_are_part_of_the_prompt_and_not_paid_twice():
    assert Price(2.0, 8.0, 0.5).cost(Usage(1_000, 100, 400)) == pytest.approx((600 * 2 + 400 * 0.5 + 100 * 8) / 1e6)


def test_without_a_cached_price_cached_tokens_cost_as_much_as_others():
    assert Price(2.0, 8.0).cost(Usage(1_000, 0, 400)) == Price(2.0, 8.0).cost(Usage(1_000, 0, 0))


def test_a_cached_price_of_zero_is_not_taken_for_none():
    assert Price(2.0, 8.0, 0.0).cost(Usage(1_000, 0, 1_000)) == 0.0


def test_an_endpoint_that_reports_more_cached_than_prompt_tokens_does_not_make_money():
    assert Price(2.0, 8.0, 0.5).cost(Usage(1_000, 0, 5_000)) == pytest.approx(1_000 * 0.5 / 1e6)


@given(
    st.lists(
        st.builds(
            lambda prompt, completion, cached: Usage(prompt, completion, min(cached, prompt)),
            *[st.integers(0, 10**6)] * 3,
        )
    )
)
def test_the_cost_of_a_sum_is_the_sum_of_the_costs(usages):
    price = PRICES["gpt-4.1-mini"]
    assert price.cost(sum(usages, Usage())) == pytest.approx(math.fsum(map(price.cost, usages)), abs=1e-9)


@each("field", ["input", "output", "cached_input"])
@each("wrong", [-0.01, math.nan, math.inf, "2", True])
def test_a_price_that_is_no_price_is_refused_by_name(field, wrong):
    with pytest.raises(ConfigError, match=rf"^{field} must be"):
        Price(**{"input": 1.0, "output": 1.0, field: wrong})


def test_a_price_can_be_read_from_json_and_cannot_be_changed():
    price = msgspec.json.decode(b'{"input": 2, "output": 8}', type=Price)
    assert price == Price(2, 8)
    with pytest.raises(AttributeError):
        price.input = 0.0


def test_the_built_in_table_holds_the_list_prices():
    assert {name: msgspec.structs.astuple(price) for name, price in PRICES.items()} == {
        "gpt-4.1": (2.0, 8.0, 0.5),
        "gpt-4.1-mini": (0.4, 1.6, 0.1),
        "gpt-4.1-nano": (0.1, 0.4, 0.025),
        "gpt-4o": (2.5, 10.0, 1.25),
        "gpt-4o-2024-05-13": (5.0, 15.0, None),
        "gpt-4o-mini": (0.15, 0.6, 0.075),
        "o3": (2.0, 8.0, 0.5),
        "o4-mini": (1.1, 4.4, 0.275),
        "gpt-5": (1.25, 10.0, 0.125),
        "gpt-5-mini": (0.25, 2.0, 0.025),
        "gpt-5-nano": (0.05, 0.4, 0.005),
        "o1": (15.0, 60.0, 7.5),
        "gpt-3.5-turbo": (0.5, 1.5, None),
    }


def test_the_built_in_table_cannot_be_changed_under_other_batchers():
    with pytest.raises(TypeError):
        PRICES["gpt-4.1"] = MINE


@pytest.mark.parametrize(
    ("model", "listed"),
    [
        ("gpt-4.1-mini", "gpt-4.1-mini"),
        ("gpt-4.1-mini-2025-04-14", "gpt-4.1-mini"),
        ("openai/gpt-4.1-mini", "gpt-4.1-mini"),
        ("openai/gpt-4.1-mini-2025-04-14", "gpt-4.1-mini"),
        ("gpt-4.1-2025-04-14", "gpt-4.1"),
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("gpt-4o-2024-05-13", "gpt-4o-2024-05-13"),
    ],
)
def test_dated_and_prefixed_names_are_the_same_model(model, listed):
    assert PriceBook().for_model(model) is PRICES[listed]


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4.1-micro",
        "gpt-4.1-mini-2025",
        "gpt-4.1-mini-2025-04-14-preview",
        "gpt-4",
        "GPT-4.1",
        "azure/gpt-4.1",
        "openai/openai/gpt-4.1",
        "ft:gpt-4.1-2025-04-14:us::x",
        "o3-pro",
        "",
        None,
    ],
)
def test_a_name_that_only_looks_alike_has_no_price(model):
    assert PriceBook().for_model(model) is None


def test_only_a_trailing_date_is_taken_off():
    assert PriceBook({"m-preview": MINE}).for_model("m-2025-04-14-preview") is None


def test_the_users_table_wins_and_the_built_in_one_fills_in():
    book = PriceBook({"gpt-4.1": MINE, "llama": Price(0, 0)})
    assert book.for_model("gpt-4.1-2025-04-14") is MINE
    assert book.for_model("openai/gpt-4.1") is MINE
    assert book.for_model("gpt-4.1-mini") is PRICES["gpt-4.1-mini"]
    assert book.for_model("llama") == Price(0, 0)


def test_the_most_specific_name_in_the_users_table_wins():
    dated = Price(1.0, 1.0)
    book = PriceBook({"gpt-4.1": MINE, "gpt-4.1-2025-04-14": dated})
    assert book.for_model("gpt-4.1-2025-04-14") is dated
    assert book.for_model("gpt-4.1") is MINE


def test_the_users_table_is_copied_so_that_later_changes_do_not_count():
    table = {"m": MINE}
    book = PriceBook(MappingProxyType(table))
    table["n"] = MINE
    assert (book.for_model("m"), book.for_model("n")) == (MINE, None)


@pytest.mark.parametrize(
    ("prices", "message"),
    [
        ({"m": 2.0}, "the price of 'm' must be a Price, got float"),
        ({"m": (1.0, 2.0)}, "must be a Price, got tuple"),
        ({None: MINE}, "model names, got None"),
        ([MINE], "a mapping, a function or None, got list"),
        (MINE, "a mapping, a function or None, got Price"),
    ],
)
def test_wrong_types_are_refused_at_construction(prices, message):
    with pytest.raises(ConfigError, match=message):
        PriceBook(prices)


def test_a_function_is_asked_first_with_the_name_as_it_is_and_once_a_model():
    asked = []

    def prices(model):
        asked.append(model)
        return MINE if model.startswith("openai/") else None

    book = PriceBook(prices)
    for _ in range(3):
        assert book.for_model("openai/gpt-4.1-2025-04-14") is MINE
        assert book.for_model("gpt-4.1") is PRICES["gpt-4.1"]
        assert book.for_model("unknown") is None
        assert book.for_model(None) is None
    assert asked == ["openai/gpt-4.1-2025-04-14", "gpt-4.1", "unknown"]


@pytest.mark.parametrize("error", [ValueError("sk-canary-1234"), RustPanicError("sk-canary-1234"), GeneratorExit()])
def test_a_function_that_raises_leaves_the_price_unknown_and_warns_once(error, caplog):
    asked = []

    def prices(model):
        asked.append(model)
        raise error

    book = PriceBook(prices)
    with caplog.at_level(logging.DEBUG, "microbatch"):
        assert [book.for_model(model) for model in ("gpt-4.1", "gpt-4.1", "gpt-4o")] == [None, None, None]
    assert asked == ["gpt-4.1", "gpt-4o"]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("microbatch", "WARNING")
    assert f"raised {type(error).__name__} for model 'gpt-4.1'" in record.getMessage()
    assert "canary" not in caplog.text


def test_a_function_that_returns_no_price_leaves_it_unknown_and_warns_once(caplog):
    book = PriceBook(lambda _: 2.0)
    assert (book.for_model("gpt-4.1"), book.for_model("gpt-4o")) == (None, None)
    (record,) = caplog.records
    assert "returned float instead of a Price" in record.getMessage()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_inside_the_function_is_not_swallowed(interrupt):
    def prices(_model):
        raise interrupt

    with pytest.raises(interrupt):
        PriceBook(prices).for_model("gpt-4.1")


def test_remembered_models_are_bounded():
    book = PriceBook({"m": MINE})
    for number in range(5_000):
        book.for_model(f"model-{number}")
    assert book._resolved.cache_info().currsize <= 1_024
    assert book.for_model("m") is MINE
