"""The code in README.md and microbatch/docs runs, its links lead somewhere, and the README's two commands are one line each."""

import asyncio
import importlib.util
import os
import re
import shlex
import sys
import textwrap
from pathlib import Path

import aiohttp
import pytest
from ports import free_port

from microbatch.testing import SimulatedEndpoint

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "microbatch" / "docs").glob("*.md")), ROOT / ".github" / "CONTRIBUTING.md"]
PYTHON = {
    f"{page.stem} {number}": code
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL), 1)
}
SERVED = re.compile(r"# (\w+)\.py, served by: (.+)\n")
WORKED = re.compile(r"# (\w+)\.py, run by: (.+)\n")
SERVICES = {name: code for name, code in PYTHON.items() if SERVED.match(code)}
WORKERS = {name: code for name, code in PYTHON.items() if WORKED.match(code)}
SCRIPTS = {name: code for name, code in PYTHON.items() if name not in {*SERVICES, *WORKERS}}
IN_NOTEBOOK = "# in a notebook\n"


def environment(endpoint, tmp_path):
    return {
        **os.environ,
        "OPENAI_API_KEY": "test",
        "OPENAI_BASE_URL": endpoint.base_url,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
    }


@pytest.mark.parametrize("code", SCRIPTS.values(), ids=SCRIPTS)
async def test_python_blocks_run_as_they_stand(code, tmp_path):
    ray = "import ray" in code
    if ray and importlib.util.find_spec("ray") is None:
        complaint = pytest.fail if os.environ.get("MICROBATCH_REQUIRE_RAY") else pytest.skip
        complaint("ray is not installed")
    if code.startswith(IN_NOTEBOOK):  # whose cells run on an event loop
        code = f"import asyncio\nasync def cell():\n    exec({code!r}, {{}})\nasyncio.run(cell())"
    async with SimulatedEndpoint() as endpoint:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *([] if ray else ["-W", "error"]), "-c", code),
            cwd=tmp_path,
            env=environment(endpoint, tmp_path),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, complaints = await process.communicate()
        assert process.returncode == 0, complaints.decode()
        assert ray or complaints == b""  # Ray tells its progress there
        assert output
        if "one upstream call" in code:
            assert endpoint.calls == 1


@pytest.mark.parametrize("code", SERVICES.values(), ids=SERVICES)
async def test_services_answer_concurrent_requests_in_few_calls(code, tmp_path):
    name, command = SERVED.match(code).groups()
    (tmp_path / f"{name}.py").write_text(code)
    port = free_port()
    words = shlex.split(command.removeprefix("python -m "))
    flags = {
        "uvicorn": ["--port", str(port), "--log-level", "warning"],
        "aiohttp.web": ["--port", str(port), "-H", "127.0.0.1"],
        "gunicorn": ["--bind", f"127.0.0.1:{port}", "--log-level", "warning"],
    }[words[0]]
    async with SimulatedEndpoint() as endpoint, aiohttp.ClientSession() as session:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-m", words[0], *flags, *words[1:]),
            cwd=tmp_path,
            env=environment(endpoint, tmp_path),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            first = await asked(session, f"http://127.0.0.1:{port}/label/chair")
            labels = await asyncio.gather(
                *(asked(session, f"http://127.0.0.1:{port}/label/chair{number}") for number in range(20))
            )
            assert all(label for label in [first, *labels])
            assert endpoint.calls < 12
        finally:
            process.terminate()
            _, complaints = await process.communicate()
        assert "Error" not in complaints.decode()


@pytest.mark.parametrize("code", WORKERS.values(), ids=WORKERS)
async def test_tasks_of_a_worker_share_calls(code, tmp_path, redis_url):
    name, command = WORKED.match(code).groups()
    (tmp_path / f"{name}.py").write_text(code)
    ask = f"""
        import celery, {name}
        results = celery.group({name}.label.s(f"chair {{number}}") for number in range(60)).apply_async().get(timeout=60)
        print(len(results), set(results) <= {{"furniture", "kitchen"}})
    """
    async with SimulatedEndpoint() as endpoint:
        given = environment(endpoint, tmp_path) | {"REDIS_URL": redis_url}
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *shlex.split(command)),
            cwd=tmp_path,
            env=given,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            asking = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", textwrap.dedent(ask)), cwd=tmp_path, env=given, stdout=asyncio.subprocess.PIPE
            )
            output, _ = await asking.communicate()
        finally:
            worker.terminate()
            await worker.wait()
        assert output.split() == [b"60", b"True"]
        assert endpoint.calls <= 20


pytestmark = pytest.mark.slow


async def asked(session, url):
    """Ask a service that may still be starting for a label."""
    async with asyncio.timeout(30):
        while True:
            try:
                async with session.get(url) as response:
                    assert response.status == 200, await response.text()
                    return (await response.json())["label"]
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("title", ["Run it", "Test it"])
def test_each_command_is_one_line(title):
    section = README.split(f"## {title}\n")[1].split("\n## ")[0]
    first = re.search(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[1]
    assert len(first.strip().splitlines()) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_savings_in_the_readme_are_those_of_the_results():
    shown = list(table_rows(README, "instructions"))
    assert len(shown) == 6
    measured = list(table_rows((ROOT / "bench" / "RESULTS.md").read_text(), "instructions"))
    assert [row for row in shown if not any(row.items() <= other.items() for other in measured)] == []


def table_rows(text, first):
    """Yield the rows of the tables whose first column is *first*, as dicts by column."""
    columns = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
        elif columns[0] == first and not set(cells[0]) <= set("-:"):
            yield dict(zip(columns, cells, strict=True))
