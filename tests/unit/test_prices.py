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

from microbatch.accounting import prices as module
from microbatch.accounting.prices import Price, PriceBook
from microbatch.errors import ConfigError
from microbatch.messages import Usage

MINE = Price(7.0, 9.0)


@pytest.fixture(autouse=True)
def no_list_prices(monkeypatch):
    """The user's prices are meant here; see test_genai_prices for those of the package."""
    monkeypatch.setattr(module, "find_spec", lambda _: None)


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
    price = Price(0.4, 1.6, 0.1)
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


@each("wrong", [{"flex": 2.0}, {1: MINE}, [MINE], {"flex": {"input": 1, "output": 2}}])
def test_tiers_and_long_prompts_need_prices(wrong):
    with pytest.raises(ConfigError, match=r"^tiers must be"):
        Price(1.0, 1.0, tiers=wrong)
    with pytest.raises(ConfigError, match=r"^above must be"):
        Price(1.0, 1.0, above={"200000": MINE})


def test_a_tier_has_its_own_price_and_any_other_the_usual_one():
    price = Price(2.0, 8.0, tiers={"flex": Price(1.0, 4.0)})
    assert price.of_tier("flex") == Price(1.0, 4.0)
    assert price.of_tier(None) is price.of_tier("priority") is price.of_tier("default") is price


def test_cache_writes_have_their_own_price_and_are_part_of_the_prompt():
    usage = Usage(1_000, 0, 300, cache_write_tokens=500)
    assert Price(4.0, 8.0, 0.4, 5.0).cost(usage) == pytest.approx((200 * 4 + 300 * 0.4 + 500 * 5) / 1e6)
    assert Price(4.0, 8.0, 0.4).cost(usage) == pytest.approx((700 * 4 + 300 * 0.4) / 1e6)
    assert Price(4.0, 8.0, 0.4, 0.0).cost(usage) == pytest.approx((200 * 4 + 300 * 0.4) / 1e6)


def test_beyond_a_length_of_the_prompt_all_its_tokens_have_another_price():
    price = Price(1.0, 2.0, above={1_000: Price(3.0, 4.0), 5_000: Price(5.0, 6.0)})
    assert price.cost(Usage(1_000, 10)) == pytest.approx((1_000 * 1 + 10 * 2) / 1e6)
    assert price.cost(Usage(1_001, 10)) == pytest.approx((1_001 * 3 + 10 * 4) / 1e6)
    assert price.cost(Usage(5_001, 10)) == pytest.approx((5_001 * 5 + 10 * 6) / 1e6)


def test_a_part_of_a_long_call_costs_what_the_whole_call_does():
    price = Price(1.0, 2.0, above={1_000: Price(3.0, 4.0)})
    assert price.for_prompt(1_500).cost(Usage(500, 10)) == pytest.approx((500 * 3 + 10 * 4) / 1e6)
    assert price.for_prompt(900).cost(Usage(1_500, 10)) == pytest.approx((1_500 * 1 + 10 * 2) / 1e6)


def test_batches_cost_what_their_tier_says_or_half():
    assert Price(2.0, 8.0, tiers={"batch": MINE}).of_batches() is MINE
    long = Price(2.0, 8.0, 0.5, above={9: Price(4.0, 16.0)})
    assert long.of_batches() == Price(1.0, 4.0, 0.25, above={9: Price(2.0, 8.0)})


@pytest.mark.parametrize(
    "model",
    ["m", "m-2025-04-14", "m-20250414", "openai/m", "openai/m-2025-04-14", "gateway/openai/m", "accounts/x/models/m"],
)
def test_dated_and_prefixed_names_are_the_same_model(model):
    assert PriceBook({"m": MINE}).for_model(model) is MINE


@pytest.mark.parametrize(
    "model",
    ["m-micro", "m-2025", "m-2025-04-14-preview", "n", "M", "ft:m-2025-04-14:us::x", "xm", "m/n", "", None],
)
def test_a_name_that_only_looks_alike_has_no_price(model):
    assert PriceBook({"m": MINE}).for_model(model) is None


def test_the_name_in_the_reply_comes_before_the_one_that_was_asked_for():
    book = PriceBook({"asked": MINE, "answered": Price(1.0, 2.0)})
    assert book.for_model("answered", "asked") == Price(1.0, 2.0)
    assert book.for_model("unknown", "asked") is MINE
    assert book.for_model(None, "asked") is MINE


def test_only_a_trailing_date_is_taken_off():
    assert PriceBook({"m-preview": MINE}).for_model("m-2025-04-14-preview") is None


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
        assert book.for_model("gpt-4.1") is None
        assert book.for_model(None) is None
    assert asked == ["openai/gpt-4.1-2025-04-14", "gpt-4.1"]


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


def test_where_a_function_knows_the_name_asked_for_it_may_fail_for_that_in_the_reply():
    assert PriceBook({"asked": MINE}.__getitem__).for_model("asked-2025-01-01-x", "asked") is MINE


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
    assert book._own.cache_info().currsize <= 1_024
    assert book.for_model("m") is MINE
