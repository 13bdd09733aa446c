"""`--prices FILE`: whose prices are shown, and what is wrong with a file; and of which model the prices of a simulation are."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import pytest
from command_line import QUESTION, given, here, output, products, summary  # noqa: F401 a fixture
from helpers import serving

from microbatch.accounting.prices import Price, genai_prices
from microbatch.cli.main import main, make_parser
from microbatch.cli.prices import read_prices
from microbatch.cli.serve import make_gateway
from microbatch.messages import Usage
from microbatch.testing import SimulatedEndpoint

pytestmark = pytest.mark.usefixtures("here")

MINE = Price(2.0, 8.0, 0.2, 2.5, tiers={"flex": Price(1.0, 4.0, above={9: Price(3.0, 5.0)})})
ENTRY = {
    "input": 2,
    "output": 8.0,
    "cached_input": 0.2,
    "cache_write": 2.5,
    "tiers": {"flex": {"input": 1, "output": 4, "above": {"9": {"input": 3, "output": 5}}}},
}


def run(*words, out="out.jsonl"):
    return main(["run", "in.jsonl", "-o", out, *words])


def prices(text):
    Path("prices.json").write_text(text if isinstance(text, str) else json.dumps(text), "utf-8")
    return "--prices", "prices.json"


def usage_of(figures):
    return Usage(figures["prompt_tokens"], figures["completion_tokens"])


def test_the_file_holds_what_a_price_does():
    prices("\ufeff" + json.dumps({"mine": ENTRY, "other": {"input": 0, "output": 0}}))
    args = make_parser().parse_args(["run", "in.jsonl", "-o", "x", "--prices", "prices.json"])
    assert read_prices(args) == {"mine": MINE, "other": Price(0.0, 0.0)}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "an entry for each model"),
        ("{", "an entry for each model"),
        ({"m": 3}, "the entry 'm' must be an object"),
        ({"ok": ENTRY, "m": {"input": 3}}, "the entry 'm' lacks output"),
        ({"m": {}}, "the entry 'm' lacks input and output"),
        ({"m": {"input": 3, "output": None}}, "the entry 'm' lacks output"),
        ({"m": {"input": 3, "output": 4, "inputs": 3}}, "the entry 'm' has an unknown field 'inputs'"),
        ({"m": {"input": "3", "output": 4}}, "the entry 'm': input must be"),
        ({"m": {"input": 3, "output": -4}}, "the entry 'm': output must be"),
        ({"m": {"input": True, "output": 4}}, "the entry 'm': input must be"),
        ({"m": {**ENTRY, "tiers": {"flex": {"input": 3}}}}, "the entry 'm', tier flex lacks output"),
        ({"m": {**ENTRY, "tiers": [1]}}, "tiers of the entry 'm' must be an object"),
        ({"m": {**ENTRY, "above": {"many": ENTRY}}}, "above of the entry 'm' must have whole numbers"),
        ('{"m": {"input": 1e999, "output": 1}}', "prices.json"),
        ('{"m": {"input": NaN, "output": 1}}', "prices.json"),
    ],
)
@pytest.mark.parametrize("command", ["run", "worker", "serve"])
def test_a_wrong_file_ends_a_command_with_the_entry_in_words_and_nothing_sent(command, text, told, capsys):
    products(3)
    assert main(["spool", "spool.sqlite", "--put", "in.jsonl", *QUESTION, "--model", "m"]) == 0
    words = {
        "run": ["run", "in.jsonl", "-o", "out.jsonl", *QUESTION, "--simulate"],
        "worker": ["worker", "spool.sqlite", "--simulate", "--until-empty"],
        "serve": ["serve", "--upstream", "http://127.0.0.1:9/v1", "--port", "0"],
    }
    assert main([*words[command], *prices(text)]) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert "--prices" in shown
    assert "Traceback" not in shown


def test_a_file_that_is_not_there_is_told_with_its_name(capsys):
    products(3)
    assert run(*QUESTION, "--simulate", "--prices", "none.json") == 2
    assert "--prices: cannot read 'none.json'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_prices_of_the_file_come_before_list_prices(capsys):
    products(20)
    assert run(*QUESTION, "--simulate", "--json", "--model", "gpt-4.1", *prices({"gpt-4.1": ENTRY})) == 0
    told = summary(capsys)
    assert told["cost_usd"] == pytest.approx(MINE.cost(usage_of(told)), abs=1e-8)
    assert sum(line["cost_usd"] for line in output()) == pytest.approx(told["cost_usd"], abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["warm", "calibrate", "worker"])
def test_every_command_that_shows_dollars_takes_them(command, capsys):
    products(20)
    words = [*QUESTION, "--model", "mine", "--simulate", "--json", *prices({"mine": ENTRY})]
    if command == "worker":
        assert main(["spool", "s.sqlite", "--put", "in.jsonl", *QUESTION, "--model", "mine"]) == 0
        words = ["s.sqlite", "--until-empty", *words[words.index("--model") :]]
    else:
        words = [
            "in.jsonl",
            *words,
            *(["--cache", "c.sqlite"] if command == "warm" else ["--sizes", "2", "--max-excess", "0.3"]),
        ]
    capsys.readouterr()
    assert main([command, *words]) == (command == "calibrate")  # which has nothing to recommend here
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    told = told["alone"] if command == "calibrate" else told
    assert told["cost_usd"] == pytest.approx(MINE.cost(usage_of(told)), abs=1e-8)


async def test_the_gateway_takes_them_and_shows_what_has_no_price():
    async with SimulatedEndpoint() as endpoint:
        words = ["serve", "--upstream", endpoint.base_url, "--port", "0", *prices({"mine": ENTRY})]
        async with make_gateway(make_parser().parse_args(words)) as gateway, aiohttp.ClientSession() as session:

            async def ask(model):
                body = {"model": model, "messages": [{"role": "user", "content": "Hi."}], "service_tier": "priority"}
                async with session.post(f"{gateway.base_url}/chat/completions", json=body) as response:
                    assert response.status == 200
                async with session.get(f"http://127.0.0.1:{gateway.port}/metrics") as response:
                    return (await response.text()).splitlines()

            assert not [line for line in await ask("llama-9") if line.startswith("microbatch_cost_usd_total")]
            metrics = dict(
                line.split() for line in await ask("mine") if line.startswith("microbatch_") and "{" not in line
            )
            stats = gateway.stats()
            paid = Usage(stats.prompt_tokens // 2, stats.completion_tokens // 2)  # both calls were alike
            assert stats.cost_usd == pytest.approx(MINE.cost(paid), rel=0.1)
            assert float(metrics["microbatch_cost_usd_total"]) == pytest.approx(stats.cost_usd)
            assert float(metrics["microbatch_unpriced_calls_total"]) == stats.unpriced_calls == 1


# --- of which model the prices of a simulation are


def batch_lines(*models):
    lines = []
    for number, model in enumerate(models):
        named = {} if model is None else {"model": model}
        body = {**named, "messages": [{"role": "user", "content": f"Sort thing {number}."}]}
        lines.append({"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body})
    given(*lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "words", "model"),
    [
        ([None] * 4, ("--model", "gpt-4o"), "gpt-4o"),
        (["o3"] * 4, (), "o3"),
        (["o3"] * 4, ("--model", "gpt-4o"), "o3"),
        ([None] * 4, (), "gpt-4.1-mini"),
    ],
)
def test_a_simulation_is_priced_by_the_model_named_and_says_which(lines, words, model, capsys):
    batch_lines(*lines)
    assert run("--simulate", "--json", *words) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out.splitlines()[-1])
    assert told["cost_usd"] == pytest.approx(genai_prices()(model).cost(usage_of(told)), abs=1e-8)
    assert f"dollars are the price of {model} for them" in " ".join(captured.err.split())


@pytest.mark.slow
def test_a_simulation_with_several_models_names_them_and_what_has_no_price(capsys):
    batch_lines("gpt-4o", "gpt-4o", "llama-9", "o3")
    assert run("--simulate", "--json") == 0
    captured = capsys.readouterr()
    told, words = json.loads(captured.out.splitlines()[-1]), " ".join(captured.err.split())
    assert told["unpriced_calls"] == 1
    assert told["cost_usd"] == pytest.approx(sum(line["cost_usd"] or 0 for line in output()), abs=1e-8)
    assert "the price of gpt-4o, llama-9 and o3" in words
    assert "1 call of unpriced models is not included in the dollars" in words


@pytest.mark.slow
def test_a_run_at_a_service_tier_is_priced_by_what_the_endpoint_reports(capsys, monkeypatch):
    products(8)
    prices({"mine": ENTRY})
    with serving() as endpoint:
        lines = [json.loads(line) for line in Path("in.jsonl").read_text().splitlines()]
        body = {"model": "mine", "service_tier": "flex"}
        given(
            *(
                {"custom_id": line["id"], "body": {**body, "messages": [{"role": "user", "content": line["name"]}]}}
                for line in lines
            )
        )
        monkeypatch.setenv("OPENAI_API_KEY", "any")
        assert run("--base-url", endpoint.base_url, "--json", "--prices", "prices.json", "--single") == 0
    told = summary(capsys)
    flex = MINE.of_tier("flex")
    assert told["cost_usd"] == pytest.approx(flex.above[9].cost(usage_of(told)), abs=1e-8)


@pytest.mark.slow
def test_of_many_models_a_few_are_named(capsys):
    batch_lines(*(f"m{number}" for number in range(9)))
    assert run("--simulate", "--json", "--max-concurrent-batches", "1", *prices({"m0": ENTRY})) == 0
    assert "the price of m0, m1, m2, m3 and others for them" in " ".join(capsys.readouterr().err.split())
