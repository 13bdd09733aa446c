"""The commands as processes: killed, stopped, served, piped."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from microbatch.cli import demo
from microbatch.cli.main import main
from microbatch.testing import Latency, Quota, SimulatedEndpoint

pytestmark = pytest.mark.slow


MICROBATCH = [sys.executable, "-m", "microbatch"]
PATIENCE = 30
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
ITEMS = 64
FASTER = ("--max-concurrent-batches", "16")


def start(*words, **options):
    return subprocess.Popen([*MICROBATCH, *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def endpoint():
    """Return the base URL of a slow simulated endpoint that runs as a process; check that it ends well."""
    process = start(
        "simulate", "--first-token", "0.4", "--tokens-per-second", "0", "--cached-prefixes", stdout=subprocess.PIPE
    )
    try:
        yield process.stdout.readline().strip()
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert re.search(r"served [\d,]+ calls?: .* combined prompts? and .* single calls?", told)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def words(endpoint, tmp_path):
    """Return the command that asks 64 questions, two batches of 4 at a time: more than three seconds' work."""
    lines = [json.dumps({"id": f"p{number}", "name": f"thing {number}"}) for number in range(ITEMS)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return [
        *("run", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--template", r"Sort:\n{name}"),
        *("--labels", "a,b", "--model", "gpt-4.1-mini", "--base-url", endpoint),
        *("--max-batch-size", "4", "--max-concurrent-batches", "2"),
    ]


def wait_for_lines(path, number, process):
    end = time.monotonic() + PATIENCE
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def finish(process):
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


@pytest.mark.parametrize("output", ["out.jsonl", "out.csv", "out.tsv.gz"])
def test_after_a_kill_in_mid_run_resume_ends_with_one_good_line_for_every_id(words, tmp_path, capsys, output):
    words[words.index("-o") + 1] = str(tmp_path / output)
    path = tmp_path / (output if output == "out.jsonl" else f"{output}.journal.jsonl")
    for part, torn in ((4, b'{"custom_id":"p0","output":"a","err'), (16, b"{")):
        process = start(*words, "--resume")
        wait_for_lines(path, part, process)
        process.kill()
        process.communicate()
        assert path.read_bytes().count(b"\n") < ITEMS, "it was over before it was killed"
        # What a kill in the middle of a write leaves; waiting for one to happen by itself would take for ever.
        with path.open("ab") as file:
            file.write(torn)
    kept = path.read_bytes().count(b"\n")
    assert output == "out.jsonl" or not (tmp_path / output).exists()
    assert main([*words, *FASTER, "--resume", "--json"]) == 0
    shown = capsys.readouterr()
    assert f"resuming: {kept} of {ITEMS} items answered before" in shown.err
    assert json.loads(shown.out.splitlines()[-1])["items"] == ITEMS - kept
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert Counter(line["custom_id"] for line in lines) == {f"p{number}": 1 for number in range(ITEMS)}
    assert all(line["error"] is None for line in lines)
    if output == "out.csv":
        rows = [*csv.DictReader((tmp_path / output).read_text().splitlines())]
        assert [(row["custom_id"], row["output"]) for row in rows] == [
            (line["custom_id"], line["output"]) for line in lines
        ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_keeps_the_answers_and_tells_how_to_go_on(words, tmp_path, number):
    path = tmp_path / "out.jsonl"
    process = start(*words, "--json", stdout=subprocess.PIPE)
    wait_for_lines(path, 8, process)
    process.send_signal(number)
    status, out, err = finish(process)
    assert status == 130
    assert "Traceback" not in err
    answered = json.loads(out.splitlines()[-1])["answered"]
    lines = path.read_bytes()
    assert lines.endswith(b"\n")
    assert 8 <= answered == lines.count(b"\n") < ITEMS
    assert err.splitlines()[-1].endswith("--resume")
    assert main([*words, *FASTER, "--resume"]) == 0
    assert path.read_bytes().count(b"\n") == ITEMS


def test_an_output_in_use_is_refused(words, tmp_path):
    first = start(*words)
    try:
        wait_for_lines(tmp_path / "out.jsonl", 1, first)
        first.send_signal(signal.SIGSTOP)  # or it might be done before the second one has started
        status, _, err = finish(start(*words, "--resume"))
        assert status == 2
        assert "another run is writing" in err
    finally:
        first.kill()
        first.communicate()


def test_a_port_that_is_taken_is_told(endpoint):
    port = endpoint.removesuffix("/v1").rpartition(":")[2]
    status, _, err = finish(start("simulate", "--port", port))
    assert status == 2
    assert "--port" in err


def test_the_simulated_endpoint_goes_wrong_as_it_is_told(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"q": 1}\n')
    process = start(
        "simulate", "--first-token", "0", "--fault", "http_400", "--fault-rate", "1", stdout=subprocess.PIPE
    )
    try:
        base_url = process.stdout.readline().strip()
        output = str(tmp_path / "out.jsonl")
        words = [
            "run",
            str(tmp_path / "in.jsonl"),
            "-o",
            output,
            "--template",
            "{q}",
            "--model",
            "m",
            "--base-url",
            base_url,
        ]
        assert main(words) == 1
        process.send_signal(signal.SIGINT)
        status, _, err = finish(process)
        assert (status, "spoiled on purpose" in err) == (0, True)
    finally:
        process.kill()
        process.communicate()
    assert json.loads(Path(output).read_text())["error"]["status"] == 400


@pytest.mark.parametrize(
    ("words", "quota", "obeys"),
    [
        ([], None, False),
        (["--rpm", "30"], Quota(rpm=30), False),
        (["--tpm", "9000", "--rpm", "2"], Quota(rpm=2, tpm=9_000), False),
        (["--tpm", "40000", "--obey"], Quota(tpm=40_000), True),
    ],
)
def test_the_simulated_endpoint_keeps_the_quota_and_obeys_as_it_is_told(words, quota, obeys, monkeypatch, capsys):
    opened = []

    async def seen(self, real=SimulatedEndpoint.open):
        await real(self)
        opened.append(self)
        self.quota_refusals = 1_234
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)

    monkeypatch.setattr(SimulatedEndpoint, "open", seen)
    assert main(["simulate", *words]) == 0
    assert [(each.quota, each.obey) for each in opened] == [(quota, obeys)]
    told = capsys.readouterr().err
    assert ("served 0 calls, 1,234 refused for the quota: " in told) == (quota is not None)


@pytest.mark.parametrize(("command", "status"), [("simulate", 0), ("demo", 130)])
def test_a_signal_ends_a_command_that_serves(command, status, monkeypatch, capsys):
    async def opened(self, real=SimulatedEndpoint.open):
        await real(self)
        asyncio.get_running_loop().call_later(0.05, signal.raise_signal, signal.SIGTERM)

    monkeypatch.setattr(SimulatedEndpoint, "open", opened)
    assert main([command]) == status
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_demo_compares_and_says_what_is_simulated(monkeypatch, capsys):
    monkeypatch.setattr(demo, "LATENCY", Latency(first_token=0.05, tokens_per_second=2_000))
    assert main(["demo"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "SIMULATED" in shown
    assert "329 of 329 products got the same answer both ways." in shown
    rows = {line[:17].strip(): line for line in shown.splitlines()}
    assert rows["calls"].split() == ["calls", "329", "21", "-94", "%"]
    saved = int(rows["prompt tokens"].split()[-2])
    assert saved < -60
    for row in ("completion tokens", "cost at gpt-4.1-m", "wall time"):
        assert row in rows
