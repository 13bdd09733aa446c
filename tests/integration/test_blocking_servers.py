"""`BlockingMicrobatcher` in servers that fork: Flask under gunicorn, which imports the application before it forks its workers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from helpers import until
from ports import free_port

from microbatch.testing import Latency, SimulatedEndpoint

ROOT = Path(__file__).parents[2]
APP = """
import os

from flask import Flask

import microbatch as mb

app = Flask(__name__)
policy = mb.FlushPolicy(idle="wait", max_wait=0.5, max_batch_size=16)
batcher = mb.BlockingMicrobatcher(mb.OpenAIChat("gpt-4.1-mini"), policy=policy)
shout = batcher.bind("Shout.", template="Say {name}")
print("imported", flush=True)


@app.get("/shout/<name>")
def shouted(name):
    return {"text": shout({"name": name}), "pid": os.getpid()}
"""

pytestmark = pytest.mark.slow


@asynccontextmanager
async def served(endpoint, folder, *flags):
    """Serve the application, and yield its address and its process."""
    (folder / "shop.py").write_text(APP)
    port = free_port()
    environment = os.environ | {
        "OPENAI_API_KEY": "test",
        "OPENAI_BASE_URL": endpoint.base_url,
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", *flags, "shop:app"),
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert await process.stdout.readline() == b"imported\n"
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def answer(session, url):
    """Return the answer of a server that may still be starting."""
    while True:
        try:
            async with session.get(url) as response:
                assert response.status == 200, await response.text()
                return await response.json()
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.05)


async def ask_all(session, url, count):
    """Ask *count* questions with 20 clients; return the number of answers by process."""
    names, by_process = iter(range(count)), Counter()

    async def client():
        for number in names:
            said = await answer(session, f"{url}/shout/word{number}")
            assert said["text"] == f"SAY WORD{number}"
            by_process[said["pid"]] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(client())
    return by_process


async def test_twenty_threads_of_a_flask_application_share_prompts(tmp_path):
    async with (
        SimulatedEndpoint(answer=lambda text, _: text.upper()) as endpoint,
        served(endpoint, tmp_path, "--threads", "20") as (url, _),
        aiohttp.ClientSession() as session,
    ):
        assert (await ask_all(session, url, 400)).total() == 400
        assert endpoint.calls <= 40


async def test_a_global_of_a_module_works_in_each_worker_of_a_preloaded_application(tmp_path):
    async with (
        SimulatedEndpoint(answer=lambda text, _: text.upper()) as endpoint,
        served(endpoint, tmp_path, "--preload", "--workers", "3", "--threads", "10") as (url, _),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
    ):
        by_process = await ask_all(session, url, 100)
        while len(by_process) < 3:  # the kernel chooses who takes a connection
            by_process += await ask_all(session, url, 40)


async def test_a_server_that_is_stopped_answers_what_it_has_accepted(tmp_path):
    async with (
        SimulatedEndpoint(answer=lambda text, _: text.upper(), latency=Latency(first_token=0.5)) as endpoint,
        served(endpoint, tmp_path, "--threads", "10") as (url, process),
        aiohttp.ClientSession() as session,
    ):
        await answer(session, f"{url}/shout/first")
        asked = asyncio.gather(*(answer(session, f"{url}/shout/word{number}") for number in range(8)))
        await until(lambda: endpoint.calls >= 2)
        process.send_signal(signal.SIGTERM)
        assert [said["text"] for said in await asked] == [f"SAY WORD{number}" for number in range(8)]
        async with asyncio.timeout(60):
            assert await process.wait() == 0
