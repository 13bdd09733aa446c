"""`run` weighs what combining costs where that is known, says so, and goes on with a run whatever was weighed before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import QUESTION, here, output, products, summary  # noqa: F401 a fixture
from helpers import serving

from microbatch.cli.main import main
from microbatch.testing import Quota

pytestmark = pytest.mark.usefixtures("here")

PRICED, UNPRICED = "gpt-4.1-mini", "a-model-of-ours"
LONG = ("--system", "You sort the products of a shop. Read name and description, and answer with the category. " * 40)


def run(capsys, endpoint, *words, model=PRICED, status=0):
    """Run with short instructions, with which nothing is cheaper together; return the summary and what it says about merging."""
    where = ("--simulate",) if endpoint is None else ("--base-url", endpoint.base_url)
    flags = ("--model", model, *where, "--max-concurrent-batches", "2")
    assert main(["run", "in.jsonl", "-o", "out.jsonl", *QUESTION, *flags, *words]) == status
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.startswith("merge: ")]
    return shown, lines[0].removeprefix("merge: ") if lines else None


@pytest.mark.parametrize(
    ("words", "model", "said", "calls"),
    [
        ((), PRICED, "when-cheaper, because prices are known", 20),
        (LONG, PRICED, "when-cheaper, because prices are known", 2),
        ((), UNPRICED, "always, because no price is known for the model", 2),
        (("--rpm", "100000"), PRICED, "always, because --rpm limits the requests", 2),
        (("--rpm", "100000"), UNPRICED, "always, because --rpm limits the requests", 2),
        (("--tpm", "100000000"), PRICED, "when-cheaper, because prices are known", 20),
        (("--merge", "always"), PRICED, "always, because --merge says so", 2),
        (("--merge", "when-cheaper", "--rpm", "100000"), PRICED, "when-cheaper, because --merge says so", 20),
        (("--merge", "when-cheaper"), UNPRICED, "when-cheaper, because --merge says so", 20),
        (("--single",), PRICED, None, 20),
        (("--merge", "auto"), PRICED, "when-cheaper, because prices are known", 20),
    ],
    ids=str,
)
@pytest.mark.parametrize("simulated", [False, True], ids=["served", "simulated"])
def test_costs_are_weighed_where_they_are_known_and_requests_are_free(words, model, said, calls, simulated, capsys):
    products(20)
    with serving() as endpoint:
        _, merge = run(capsys, None if simulated else endpoint, *words, model=model)
        assert simulated or endpoint.calls == calls
    assert (merge or "").startswith(said or "")
    assert (merge is None) == (said is None)
    alone = sum(line["route"] == "single" for line in output())
    assert alone == (20 if calls == 20 else 0)


def test_the_lines_own_models_are_weighed_each_by_its_price(capsys):
    lines = [
        {"custom_id": f"{number}", "body": {"model": model, "messages": [{"role": "user", "content": f"{number}?"}]}}
        for number, model in enumerate([PRICED, UNPRICED] * 8)
    ]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with serving() as endpoint:
        assert main(["run", "in.jsonl", "-o", "out.jsonl", "--base-url", endpoint.base_url, "--json"]) == 0
        assert endpoint.calls == 8 + 1
    assert summary(capsys)["merge_rules"] == {"priced": 8, "unpriced": 8}
    assert main(["run", "in.jsonl", "-o", "two.jsonl", "--simulate"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "merge: when-cheaper for 8 items, because prices are known and nothing limits the requests; always for 8 items"
        in shown
    )


def test_a_limit_on_requests_that_the_endpoint_reports_ends_the_weighing(capsys):
    """Of 200 requests a minute 160 may go alone; then the other 340 items would have to wait for the next minute."""
    products(500)
    with serving(quota=Quota(rpm=200)) as endpoint:
        shown, merge = run(capsys, endpoint)
        assert endpoint.quota_refusals == 0
        assert 160 <= endpoint.calls < 200
    assert merge.startswith("when-cheaper for 16")
    assert "the endpoint's limit on requests was nearly used up" in " ".join(shown.out.split())
    assert len(output()) == 500


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ((), ("--rpm", "100000"), False),
        (("--rpm", "100000"), (), False),
        ((), ("--merge", "always"), False),
        (("--merge", "when-cheaper"), (), False),
        (("--merge", "always"), ("--merge", "always"), False),
        (("--merge", "always"), ("--merge", "when-cheaper"), True),
        (("--merge", "when-cheaper"), ("--merge", "always"), True),
    ],
    ids=str,
)
def test_a_run_goes_on_whatever_was_weighed_unless_another_merge_is_asked_for(before, after, refused, capsys):
    products(4)
    with serving() as endpoint:
        run(capsys, endpoint, *before)
        calls = endpoint.calls
        shown, _ = run(capsys, endpoint, *after, "--resume", status=2 if refused else 0)
        assert endpoint.calls == calls
    assert ("--merge (was" in shown.err) == refused


def test_a_run_of_a_release_that_always_combined_goes_on(capsys):
    """It recorded its default as if it had been asked for."""
    products(4)
    with serving() as endpoint:
        run(capsys, endpoint)
        kept = json.loads(Path("out.jsonl.digest").read_text())
        assert kept["--merge"] is None
        Path("out.jsonl.digest").write_text(json.dumps(kept | {"--merge": "always"}))
        run(capsys, endpoint, "--resume")
        run(capsys, endpoint, "--resume", "--merge", "when-cheaper")


@pytest.mark.parametrize(
    ("command", "default"), [("run", "auto"), ("warm", "always"), ("worker", "always"), ("serve", "always")]
)
def test_the_help_names_the_default(command, default, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"otherwise always (default: {default})" in shown.replace('"', "")
