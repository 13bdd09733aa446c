"""`.env` with real processes: commands read it, the library does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import given, here, output  # noqa: F401 a fixture
from helpers import serving

pytestmark = pytest.mark.slow


COMMAND = ("-m", "microbatch", "run", "in.jsonl", "-o", "out.jsonl", "--template", "{name}", "--model", "m", "--force")


def python(*words, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "MICROBATCH_"))}
    return subprocess.run(
        [sys.executable, *words], env=clean | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.usefixtures("here")
def test_commands_ask_where_and_as_whom_the_file_says():
    given({"name": "a"})
    with serving(api_keys={"k"}) as endpoint:
        Path(".env").write_text(f"export OPENAI_API_KEY='k' # mine\nOPENAI_BASE_URL={endpoint.base_url}\n")
        asked = python(*COMMAND)
        assert asked.returncode == 0, asked.stderr
        assert [line["error"] for line in output()] == [None]
        assert endpoint.calls == 1
        library = python("-c", "import microbatch; microbatch.OpenAIChat('m')")
        assert "ConfigError: no API key" in library.stderr
        assert ".env" in python("-m", "microbatch", "--help").stdout


@pytest.mark.usefixtures("here")
def test_a_stray_file_cannot_have_the_environments_key_sent_elsewhere():
    given({"name": "a"})
    with serving() as trap, serving(api_keys={"mine"}) as endpoint:
        Path(".env").write_text(f"OPENAI_API_KEY=k\nOPENAI_BASE_URL={trap.base_url}\n")
        asked = python(*COMMAND, OPENAI_API_KEY="mine", OPENAI_BASE_URL=endpoint.base_url)
        assert asked.returncode == 0, asked.stderr
        Path(".env").write_text(f"OPENAI_BASE_URL={trap.base_url}\n")
        assert "no API key" in python(*COMMAND).stderr
        told = python(
            "-m", "microbatch", "run", "nothing.jsonl", "-o", "x", "--model", "m", OPENAI_API_KEY="mine"
        ).stderr
        assert "OPENAI_BASE_URL is ignored" in told
        assert (trap.calls, endpoint.calls) == (0, 1)
