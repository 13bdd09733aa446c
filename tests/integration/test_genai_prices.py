"""Prices from the installed genai-prices package: the same dollars, whose come first, what is not priced, and that the loop goes on."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from helpers import ask

import microbatch as mb
from microbatch.accounting import prices as module
from microbatch.accounting.prices import GenaiPrices, PriceBook
from microbatch.testing import ScriptedTransport

package = pytest.importorskip("genai_prices")
data_snapshot = pytest.importorskip("genai_prices.data_snapshot")

MINE = mb.Price(7.0, 9.0)


NOON = 1_798_113_600.0  # the 24th of December 2026
KINDS = {
    "plain": {"prompt_tokens": 1_234, "completion_tokens": 567},
    "cached": {"prompt_tokens": 5_000, "completion_tokens": 321, "cached_tokens": 4_096},
    "written": {"prompt_tokens": 9_000, "completion_tokens": 50, "cached_tokens": 1_000, "cache_write_tokens": 6_000},
    "reasoning": {"prompt_tokens": 800, "completion_tokens": 9_000, "reasoning_tokens": 8_500},
    "long": {"prompt_tokens": 300_000, "completion_tokens": 700, "cached_tokens": 100_000},
}
TIERS = {
    None: {},
    "flex": {"service_tier": "flex"},
    "priority": {"service_tier": "priority"},
    "batch": {"processing": "batch"},
    "default": {"service_tier": "default"},
}
MODELS = {
    "openai": ["gpt-5", "gpt-4.1-mini", "gpt-5.4", "o4-mini", "gpt-5-mini-2025-08-07"],
    "anthropic": ["claude-sonnet-4-5", "claude-opus-4-5-20251101", "claude-haiku-4-5"],
    "google": ["gemini-2.5-pro", "gemini-2.5-flash", "gemini-3-pro-preview"],
    "deepseek": ["deepseek-chat", "deepseek-reasoner"],
}


def reference(usage, model, provider, context, now=NOON):
    """Return the price of the package itself."""
    counts = {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_tokens": usage.cached_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
    }
    when = datetime.fromtimestamp(now, UTC)
    found = package.calc_price(
        package.Usage(**counts), model, provider_id=provider, price_context=context, genai_request_timestamp=when
    )
    return float(found.total_price)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("provider", MODELS)
def test_every_usage_costs_what_the_package_itself_says(provider, kind, tier):
    usage = mb.Usage(**KINDS[kind])
    for model in MODELS[provider]:
        price = GenaiPrices({}, now=lambda: NOON)(model)
        expected = reference(usage, model, provider, TIERS[tier])
        assert price.of_tier(tier).cost(usage) == pytest.approx(expected, rel=1e-3), model


def test_what_varies_does_vary_in_these_usages():
    """So that no case above is empty."""
    usage, long = mb.Usage(**KINDS["written"]), mb.Usage(**KINDS["long"])
    prices = GenaiPrices({}, now=lambda: NOON)
    for model, tier, factor in [("gpt-5", "flex", 0.5), ("gpt-5", "priority", 2), ("claude-haiku-4-5", "batch", 0.5)]:
        price = prices(model)
        assert price.of_tier(tier).cost(usage) == pytest.approx(factor * price.cost(usage))
    haiku, pro = prices("claude-haiku-4-5"), prices("gemini-2.5-pro")
    assert haiku.cache_write > haiku.input > haiku.cached_input
    assert pro.cost(long) > pro.for_prompt(1).cost(long)


@pytest.mark.parametrize("hour", [2, 12, 20])
def test_prices_change_with_the_time_of_day_while_a_batcher_is_open(hour):
    now = [NOON]
    book = PriceBook(GenaiPrices({}, now=lambda: now[0]))
    usage = mb.Usage(1_000, 1_000)
    assert book.for_model("deepseek-chat") is not None
    now[0] = NOON - 12 * 3_600 + hour * 3_600
    expected = reference(usage, "deepseek-chat", "deepseek", {}, now[0])
    assert book.for_model("deepseek-chat").cost(usage) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("model", "provider", "listed"),
    [
        ("openai/gpt-5", "openai", "gpt-5"),
        ("openai/gpt-5-2025-08-07", "openai", "gpt-5"),
        ("azure/gpt-4.1", "azure", "gpt-4.1"),
        ("models/gemini-2.5-flash", "google", "gemini-2.5-flash"),
        ("gemini/gemini-2.5-flash", "google", "gemini-2.5-flash"),
        ("anthropic/claude-sonnet-4-5-20250929", "anthropic", "claude-sonnet-4-5"),
        ("anthropic/claude-sonnet-4.5", "openrouter", "anthropic/claude-sonnet-4.5"),
        ("deepseek/deepseek-chat", "deepseek", "deepseek-chat"),
        ("groq/openai/gpt-oss-120b", "groq", "openai/gpt-oss-120b"),
    ],
)
def test_names_of_gateways_are_those_of_the_provider_in_them(model, provider, listed):
    usage = mb.Usage(1_000, 1_000, 500)
    found = GenaiPrices({}, now=lambda: NOON)(model)
    assert found.cost(usage) == pytest.approx(reference(usage, listed, provider, {}))


@pytest.mark.parametrize(
    ("base_url", "provider", "listed"),
    [
        ("https://api.groq.com/openai/v1", "groq", "openai/gpt-oss-120b"),
        ("https://API.Together.xyz/v1", "together", "openai/gpt-oss-120b"),
        ("https://openrouter.ai/api/v1", "openrouter", "openai/gpt-oss-120b"),
        ("http://127.0.0.1:8000/v1", "openai", "gpt-oss-120b"),  # an unknown endpoint
    ],
)
def test_the_endpoints_address_tells_whose_price_of_a_model_holds(base_url, provider, listed):
    usage = mb.Usage(1_000, 1_000)
    for prices in (None, GenaiPrices({}), {"other": MINE}):
        found = PriceBook(prices, base_url=base_url).for_model("openai/gpt-oss-120b")
        assert found.cost(usage) == pytest.approx(reference(usage, listed, provider, {}, time.time()))


def test_names_that_callers_make_up_fill_no_memory():
    prices = mb.genai_prices()
    for number in range(3_000):
        prices(f"gpt-{number}-x/y")
    snapshot = data_snapshot.get_snapshot()
    assert not any("-x/y" in str(key) for key in (*snapshot._provider_misses, *snapshot._provider_cache))
    assert prices._remembered.cache_info().currsize <= 1_024


@pytest.mark.parametrize(
    "model", ["claude-sonnet-4-5", "anthropic/claude-sonnet-4-5", "gemini-2.5-pro", "deepseek-chat"]
)
def test_models_of_other_providers_are_priced_by_whatever_name_is_in_use(model):
    found = mb.genai_prices()(model)
    assert found is not None
    assert found.cached_input is not None
    assert 0 < found.cached_input < found.input < found.output


def test_an_embedding_model_has_no_price_of_output():
    found = mb.genai_prices()("text-embedding-3-small")
    assert found is not None
    assert found.input > 0 == found.output


@pytest.mark.parametrize("model", ["no-such-model", "gpt-4.1-micro", "nobody/gpt-4.1", "/", ""])
def test_what_nobody_lists_by_the_token_has_no_price(model):
    assert mb.genai_prices()(model) is None


def listed(**prices):
    """Stands for a listed price where the package's data must not matter."""
    return SimpleNamespace(get_prices=lambda *_: SimpleNamespace(**prices), price_variants=None)


def test_a_price_of_output_alone_is_none():
    when = datetime.fromtimestamp(NOON, UTC)
    assert module._as_price(listed(input_mtok=None, output_mtok=3), when, tiered=True) is None
    assert module._as_price(listed(input_mtok=3, output_mtok=None), when, tiered=True) == mb.Price(3.0)
    assert module._as_price(listed(input_mtok=3, output_mtok=4), when, tiered=True) == mb.Price(3.0, 4.0)


def test_ones_own_prices_come_first_under_all_the_names_of_a_model_and_are_copied():
    table = {"gpt-4.1": MINE}
    prices = mb.genai_prices(table)
    table["gpt-4o"] = MINE
    assert prices("gpt-4.1-2025-04-14") is prices("openai/gpt-4.1") is MINE
    assert prices("gpt-4o") is not MINE
    assert "own=<1>" in repr(prices)


def test_ones_own_price_of_the_model_asked_for_comes_before_the_list_price_of_the_one_that_answered():
    for prices in ({"my-deployment": MINE}, mb.genai_prices({"my-deployment": MINE})):
        book = PriceBook(prices)
        assert book.for_model("gpt-4o-2024-08-06", "my-deployment") is MINE
        assert book.for_model("gpt-4o-2024-08-06", "other") == mb.genai_prices()("gpt-4o")


def test_without_prices_of_ones_own_the_list_prices_hold_and_fill_in_where_own_ones_are_missing():
    listed_price = mb.genai_prices()("gpt-4.1")
    for prices in (None, {"m": MINE}, lambda _: None):
        assert PriceBook(prices).for_model("gpt-4.1") == listed_price


def test_without_the_package_there_are_no_list_prices_and_the_log_says_how_to_get_them(monkeypatch, caplog):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    book = PriceBook()
    assert book.load is None
    assert book.for_model("gpt-4.1") is None
    assert "pip install 'microbatch[prices]'" in caplog.text


def test_a_package_that_fails_for_a_model_ends_no_call(monkeypatch, caplog):
    def fail(*_, **__):
        raise ValueError("bad data")

    for prices in (None, mb.genai_prices()):
        book = PriceBook(prices)
        assert book.for_model("gpt-4.1") is not None
        with monkeypatch.context() as patched:
            patched.setattr(module, "_as_price", fail)
            assert book.for_model("gpt-4o") is None
            assert "raised ValueError" in caplog.text
            assert PriceBook(prices).for_model("gpt-4o") is None  # it fails while it is loaded
        caplog.clear()


async def test_a_package_that_cannot_be_imported_ends_only_batchers_that_ask_for_it(monkeypatch, caplog):
    def fail(_self):
        raise ImportError("no such part")

    monkeypatch.setattr(GenaiPrices, "load", fail)
    for base_url in ("", "http://localhost/v1"):
        transport = ScriptedTransport()
        transport.base_url = base_url
        async with mb.Microbatcher(transport, tokens="bytes") as batcher:
            assert (await batcher.submit(ask("a"), model="gpt-4.1")).cost_usd is None
        assert "genai-prices cannot be used" in caplog.text
        caplog.clear()
    with pytest.raises(ImportError):
        await mb.Microbatcher(ScriptedTransport(), tokens="bytes", prices=mb.genai_prices()).open()


def test_a_table_that_is_none_is_refused():
    with pytest.raises(mb.ConfigError, match="must be a Price"):
        mb.genai_prices({"m": 3})


def test_where_the_package_is_missing_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(mb.ConfigError, match=r"pip install 'microbatch\[prices\]'"):
        mb.genai_prices()


async def test_a_batcher_loads_them_in_a_thread_before_it_is_open(monkeypatch):
    threads = []
    load = module.GenaiPrices.load
    monkeypatch.setattr(
        module.GenaiPrices, "load", lambda prices: (threads.append(threading.current_thread()), load(prices))
    )
    async with mb.Microbatcher(ScriptedTransport(), tokens="bytes", prices=mb.genai_prices({"own": MINE})) as batcher:
        assert len(threads) == 1
        assert threads[0] is not threading.main_thread()
        for model, price in {"own": MINE, "claude-sonnet-4-5": mb.genai_prices()("claude-sonnet-4-5")}.items():
            reply = await batcher.submit(ask("a"), model=model)
            assert reply.cost_usd == pytest.approx(price.cost(reply.usage)) != 0


@pytest.mark.parametrize("base_url", ["", "http://localhost/v1"])
async def test_without_prices_of_ones_own_they_are_loaded_in_a_thread_where_there_is_an_endpoint(base_url, monkeypatch):
    threads = []
    load = GenaiPrices.load
    monkeypatch.setattr(GenaiPrices, "load", lambda prices: (threads.append(threading.current_thread()), load(prices)))
    transport = ScriptedTransport()
    transport.base_url = base_url
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        assert [thread is threading.main_thread() for thread in threads] == ([False] if base_url else [])
        assert (await batcher.submit(ask("a"))).cost_usd is None
        assert len(threads) == bool(base_url)
        reply = await (await batcher.submit(ask("b"), model="gpt-4.1")).settled()
        assert reply.cost_usd == pytest.approx(mb.genai_prices()("gpt-4.1").cost(reply.usage))


async def test_models_without_a_price_are_told_once_a_batcher(caplog):
    with caplog.at_level(logging.DEBUG, "microbatch"):
        for number in range(2):
            async with mb.Microbatcher(ScriptedTransport(), tokens="bytes", prices={"own": MINE}) as batcher:
                for model in ("own", f"llama-{number}", "mistral", f"llama-{number}", None):
                    reply = await batcher.submit(ask("a"), model=model)
                    assert (reply.cost_usd is None) == (model != "own")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert [f"llama-{number}" in record.getMessage() for number, record in enumerate(caplog.records)] == [True, True]


async def test_a_transport_whose_address_is_none_is_one_without_an_address():
    transport = ScriptedTransport("x")
    transport.model, transport.base_url = "gpt-4.1-mini", None
    async with mb.Microbatcher(transport, cache=mb.MemoryCache(), audit=mb.AuditPolicy()) as batcher:
        assert (await batcher.submit(ask("a"))).cost_usd > 0


def test_nothing_is_imported_before_a_batcher_opens():
    code = "import sys, microbatch; microbatch.genai_prices(); sys.exit('genai_prices' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
