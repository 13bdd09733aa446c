"""Runs of one file with one `--id-seed`: what goes over the wire is the same, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from command_line import QUESTION, here, output, products  # noqa: F401 a fixture
from helpers import serving

from microbatch.cli.main import main
from microbatch.testing import Faults

pytestmark = pytest.mark.usefixtures("here")

ITEMS = 120


def bodies(*words, seed="a seed", faults=None, hashes="0"):
    """Run a command in a process of its own; return the bodies of its requests, in order, and the output."""
    with serving(record=True, faults=faults) as endpoint:
        flags = [
            "--base-url",
            endpoint.base_url,
            "--model",
            "m",
            "--max-concurrent-batches",
            "1",
            "--force",
            "--no-progress",
        ]
        flags += ["--id-seed", seed] if seed else []
        subprocess.run(
            [sys.executable, "-m", "microbatch", "run", "in.jsonl", "-o", "out.jsonl", *QUESTION, *flags, *words],
            check=True,
            capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": hashes},
        )
    return endpoint.requests, sorted(output(), key=lambda line: line["custom_id"])


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (None, ("--labels", "home,other")),
        (None, ("--canary",)),
        (Faults(("missing", "broken_json", "truncated", "unknown", "refusal"), rate=0.5), ("--labels", "home,other")),
        (Faults(("missing", "shifted_back", "http_400", "filtered"), rate=0.5), ("--canary",)),
    ],
    ids=["labels", "canary", "labels and faults", "canary and faults"],
)
def test_the_same_file_twice_with_one_seed_is_the_same_to_the_byte(faults, words):
    products(ITEMS)
    first, answers = bodies(*words, faults=faults, hashes="1")
    second, again = bodies(*words, faults=faults, hashes="2")
    assert len(answers) == len(again) == ITEMS
    assert len(first) >= (ITEMS // 16 if faults is None else 20)
    assert first == second
    for line in (*answers, *again):
        del line["lane_kind"]  # it is of the endpoint, which has another port in each run
    assert answers == again


def test_without_a_seed_or_with_another_every_id_differs():
    products(32)
    texts = [[body["messages"][-1]["content"] for body in bodies(seed=seed)[0]] for seed in (None, None, "a")]
    for place in range(2):
        assert len({text[place] for text in texts}) == 3
        assert len({text[place].partition("\n[")[0] for text in texts}) == 1


def test_an_empty_seed_is_refused_before_anything_is_sent(capsys):
    products(3)
    with pytest.raises(SystemExit) as ended:
        main(["run", "in.jsonl", "-o", "out.jsonl", *QUESTION, "--simulate", "--id-seed", ""])
    assert ended.value.code == 2
    assert "--id-seed: must not be empty" in capsys.readouterr().err


COMMANDS = {
    "warm": ("warm", "in.jsonl", *QUESTION, "--cache", "PLACE.cache", "--max-concurrent-batches", "1"),
    "worker": ("worker", "PLACE.spool", "--until-empty", "--max-concurrent-batches", "1"),
    "provider batches": ("worker", "PLACE.spool", "--until-empty", "--provider-batch", "--poll", "0.05"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_other_commands_that_ask_take_a_seed_as_well(command):
    products(32)

    def prompts(name, seed):
        assert main(["spool", f"{name}.spool", "--put", "in.jsonl", *QUESTION]) == 0
        words = [word.replace("PLACE", name) for word in COMMANDS[command]]
        with serving(record=True) as endpoint:
            written, real = [], endpoint.read

            def read(body):
                written.append(body["messages"])
                return real(body)

            endpoint.read = read
            assert main([*words, "--base-url", endpoint.base_url, "--model", "m", "--id-seed", seed]) == 0
        return sorted(map(str, written))

    first, again, other = prompts("one", "s"), prompts("two", "s"), prompts("three", "t")
    assert len(first) >= 2
    assert first == again
    assert not {*first} & {*other}
