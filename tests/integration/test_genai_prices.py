"""Prices from the installed genai-prices package: whose come first, what is not priced, and that the loop goes on meanwhile."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from helpers import ask

import microbatch as mb
from microbatch.accounting import prices as module
from microbatch.accounting.prices import PRICES, PriceBook
from microbatch.testing import ScriptedTransport

MINE = mb.Price(7.0, 9.0)


@pytest.mark.parametrize("model", [*PRICES, "gpt-4.1-mini-2025-04-14"])
def test_what_the_built_in_table_knows_is_known_here_too(model):
    found = mb.genai_prices()(model)
    assert found is not None
    assert found.input > 0 < found.output


@pytest.mark.parametrize(
    "model", ["claude-sonnet-4-5", "anthropic/claude-sonnet-4-5", "gemini-2.5-pro", "deepseek-chat"]
)
def test_models_of_other_providers_are_priced_by_whatever_name_is_in_use(model):
    found = mb.genai_prices()(model)
    assert found is not None
    assert found.cached_input is not None
    assert 0 < found.cached_input < found.input < found.output


@pytest.mark.parametrize(
    "model", ["no-such-model", "gpt-4.1-micro", "nobody/gpt-4.1", "/", "", "text-embedding-3-small"]
)
def test_what_nobody_lists_by_the_token_has_no_price(model):
    assert mb.genai_prices()(model) is None


def package(**prices):
    """Stands for the package where its data must not matter."""

    def calc_price(_usage, _model, *, provider_id=None):
        return SimpleNamespace(model_price=SimpleNamespace(**({"cache_read_mtok": None} | prices)))

    return SimpleNamespace(Usage=SimpleNamespace, calc_price=calc_price)


def test_of_a_tiered_price_the_first_tier_counts():
    prices = mb.genai_prices()
    prices._package = package(input_mtok=SimpleNamespace(base=3, tiers=[6]), output_mtok=15)
    assert prices("m") == mb.Price(3.0, 15.0)


@pytest.mark.parametrize("half", [{"input_mtok": 3, "output_mtok": None}, {"input_mtok": None, "output_mtok": 3}])
def test_half_a_price_is_none(half):
    prices = mb.genai_prices()
    prices._package = package(**half)
    assert prices("m") is None


def test_ones_own_prices_come_first_under_all_the_names_of_a_model_and_are_copied():
    table = {"gpt-4.1": MINE}
    prices = mb.genai_prices(table)
    table["gpt-4o"] = MINE
    assert prices("gpt-4.1-2025-04-14") is prices("openai/gpt-4.1") is MINE
    assert prices("gpt-4o") is not MINE
    assert "own=<1>" in repr(prices)


def test_what_the_package_does_not_know_comes_from_the_built_in_table():
    prices = mb.genai_prices()
    prices._package = SimpleNamespace(Usage=SimpleNamespace, calc_price=unknown)
    assert PriceBook(prices).for_model("gpt-4.1") is PRICES["gpt-4.1"]


def unknown(*_arguments, **_options):
    raise LookupError


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


async def test_models_without_a_price_are_told_once_a_batcher(caplog):
    with caplog.at_level(logging.DEBUG, "microbatch"):
        for number in range(2):
            async with mb.Microbatcher(ScriptedTransport(), tokens="bytes", prices={"own": MINE}) as batcher:
                for model in ("own", f"llama-{number}", "mistral", f"llama-{number}", None):
                    reply = await batcher.submit(ask("a"), model=model)
                    assert (reply.cost_usd is None) == (model != "own")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert [f"llama-{number}" in record.getMessage() for number, record in enumerate(caplog.records)] == [True, True]


def test_nothing_is_imported_before_a_batcher_opens():
    code = "import sys, microbatch; microbatch.genai_prices(); sys.exit('genai_prices' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
