"""The README's code runs, and its two commands are one line each."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from microbatch.testing import SimulatedEndpoint

README = (Path(__file__).parents[2] / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", PYTHON, ids=[f"block {number}" for number in range(1, len(PYTHON) + 1)])
async def test_python_blocks_run_as_they_stand(code, tmp_path):
    async with SimulatedEndpoint() as endpoint:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-W",
            "error",
            "-c",
            code,
            cwd=tmp_path,
            env={"OPENAI_API_KEY": "test", "OPENAI_BASE_URL": endpoint.base_url},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, complaints = await process.communicate()
        assert (process.returncode, complaints.decode()) == (0, "")
        assert output
        assert endpoint.calls == ("one upstream call" in code)  # as the comment says


@pytest.mark.parametrize("title", ["Run it", "Test it"])
def test_each_command_is_one_line(title):
    section = README.split(f"## {title}\n")[1].split("\n## ")[0]
    first = re.search(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[1]
    assert len(first.strip().splitlines()) == 1
