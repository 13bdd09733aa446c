"""Commands whose stdout or stderr is closed, full or left by its reader: what was paid for is kept all the same."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import QUESTION, here, output, products  # noqa: F401 a fixture
from ports import free_port

from microbatch.cli.main import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("here"),
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here"),
]

PATIENCE = 60
LABELS = (*QUESTION, "--labels", "a,b", "--simulate")
RUN = ("run", "in.jsonl", "-o", "out.jsonl", *LABELS)
WARM = ("warm", "in.jsonl", "--cache", "c.sqlite", *LABELS)
WORKER = ("worker", "s.sqlite", "--simulate", "--until-empty", "--low-max-wait", "0.1")
PUT = ("spool", "s.sqlite", "--put", "in.jsonl", *QUESTION)

# What the shell makes of stdout (1) and stderr (2), before the command.
STREAMS = {
    "stderr full": "2>/dev/full",
    "stderr closed": "2>&-",
    "stdout full": ">/dev/full",
    "stdout closed": ">&-",
    "both full": ">/dev/full 2>/dev/full",
    "all closed": "<&- >&- 2>&-",
    "stderr left": "2>&1 >/dev/null | head -c 1",
    "stdout left": "2>/dev/null | head -c 1",
    "both left": "2>&1 | true",
}


def shell(words, streams, **options):
    """Run the command with *streams*; return its own exit status and what came out of the pipe's end."""
    command = " ".join(f"'{word}'" for word in (sys.executable, "-m", "microbatch", *words))
    script = f"{command} {streams}; exit ${{PIPESTATUS[0]}}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return subprocess.run(
        ["bash", "-c", script],
        env=environment,
        capture_output=True,
        timeout=PATIENCE,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.parametrize("streams", STREAMS)
def test_a_run_writes_every_answer_and_its_status_is_that_of_the_answers(streams):
    products(200)
    ended = shell((*RUN, "--progress", *(["--json"] if "stdout" in streams else [])), STREAMS[streams])
    assert ended.returncode == 0, ended.stderr
    assert {line["custom_id"] for line in output()} == {f"p{number}" for number in range(200)}
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


@pytest.mark.parametrize("streams", ["both full", "both left"])
def test_a_run_with_failures_says_so_by_its_status(streams):
    Path("in.jsonl").write_text('{"name": "x"}\nbroken\n')
    assert shell((*RUN, "--progress"), STREAMS[streams]).returncode == 1
    assert [line["error"] is None for line in output()].count(True) == 1


def test_progress_without_tqdm_may_be_left_too(monkeypatch):
    products(200)
    Path("tqdm.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])]))
    assert shell((*RUN, "--progress"), "2>&1 >/dev/null | head -c 1").returncode == 0
    assert len(output()) == 200


def test_a_warming_and_a_worker_go_on_too(capsys):
    products(100)
    assert shell((*WARM, "--progress"), STREAMS["both full"]).returncode == 0
    assert shell(PUT, STREAMS["all closed"]).returncode == 0
    assert shell((*WORKER, "--progress", "--json"), STREAMS["both left"]).returncode == 0
    assert main([*WARM, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["known"] == 100
    assert main(["spool", "s.sqlite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 100


@pytest.mark.parametrize(
    "words", [("spool", "s.sqlite", "--export", "-"), ("spool", "s.sqlite"), ("spool", "s.sqlite", "--json")]
)
def test_a_result_that_cannot_be_written_to_stdout_is_no_success(words):
    products(2_000)
    assert main(PUT) == 0
    ended = shell(words, ">/dev/full")
    assert ended.returncode == 1
    assert ended.stderr.startswith("microbatch spool: cannot write to stdout: ")
    assert len(ended.stderr.splitlines()) == 1


def test_who_leaves_a_result_early_is_not_told(capsys):
    products(2_000)
    assert main(PUT) == 0
    ended = shell(("spool", "s.sqlite", "--export", "-"), "| head -1")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert json.loads(ended.stdout)["state"] == "waiting"


ON_STDOUT = ("run", "in.jsonl", "-o", "-", *LABELS)


@pytest.mark.parametrize("stream", [">/dev/full", "| head -n 1"])
def test_a_run_whose_answers_cannot_be_written_to_stdout_ends_and_says_so_once(stream):
    products(5_000)
    ended = shell(ON_STDOUT, stream)
    assert ended.returncode == 1
    assert ended.stderr.count("microbatch run: cannot write to stdout: ") == 1
    assert "--resume" not in ended.stderr
    assert "Traceback" not in ended.stderr
    if stream == ">/dev/full":
        assert "left unasked" in ended.stderr
    else:
        assert len(ended.stdout.splitlines()) == 1


def test_a_reader_that_pauses_does_not_hold_up_the_calls():
    products(1_000)
    words = [sys.executable, "-m", "microbatch", *ON_STDOUT]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any(line.startswith("1,000 of 1,000 items answered") for line in process.stderr)
            assert process.poll() is None  # most of it is more than a pipe holds
            lines = process.stdout.readlines()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert len({json.loads(line)["custom_id"] for line in lines}) == 1_000


@pytest.mark.parametrize("streams", ["both full", "all closed"])
def test_a_server_whose_words_nobody_reads_goes_on(streams):
    port = free_port()
    command = f"exec '{sys.executable}' -m microbatch simulate --port {port} {STREAMS[streams]}"
    with subprocess.Popen(["bash", "-c", command]) as process:
        try:
            end = time.monotonic() + PATIENCE
            while not listens(port):
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
