"""A web service under uvicorn that is told to stop while requests are under way."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import aiohttp
import pytest
from ports import free_port

from microbatch.testing import Latency, SimulatedEndpoint

pytestmark = pytest.mark.slow


SERVED_APP = Path(__file__).parent / "served_app.py"
REQUESTS = 40
PATIENCE = 30


class Service:
    """The service in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url

    async def ended(self) -> tuple[int, str, str]:
        async with asyncio.timeout(PATIENCE):
            out, err = await self.process.communicate()
        return self.process.returncode, out.decode(), err.decode()


async def start(how: str, base_url: str) -> Service:
    if how == "program":
        words, url = [str(SERVED_APP)], None
    else:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        words = ["-m", "uvicorn", "--app-dir", str(SERVED_APP.parent), "--port", str(port), "--log-level", "warning"]
        words.append("served_app:app")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", *words),
        env={**os.environ, "OPENAI_BASE_URL": base_url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    return Service(process, url or (await process.stdout.readline()).decode().strip())


async def get(session: aiohttp.ClientSession, url: str) -> tuple[int, dict]:
    async with session.get(url) as response:
        if response.status != 200:  # the traceback is on stderr, which is looked at in the end
            return response.status, {"text": await response.text(), "route": None}
        return response.status, await response.json()


async def until_all_are_in(service: Service, session: aiohttp.ClientSession, number: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            assert service.process.returncode is None, await service.ended()
            try:
                if (await get(session, f"{service.url}/stats"))[1]["queued"] == number:
                    return
            except aiohttp.ClientConnectionError:  # it is not up yet
                pass
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("how", "clean"),
    # uvicorn's command ends with the signal that stopped it, since 0.29; that is its clean end (Kludex/uvicorn#1600).
    [("program", 0), ("command", -signal.SIGTERM)],
)
@pytest.mark.promise(of="close")
async def test_sigterm_ends_the_service_after_all_requests_under_way_are_answered(how: str, clean: int) -> None:
    latency = Latency(first_token=2, tokens_per_second=0)  # a loaded machine must manage to ask them all meanwhile
    async with (
        SimulatedEndpoint(latency=latency, answer=lambda text, schema: text.upper()) as endpoint,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        service = await start(how, endpoint.base_url)
        try:
            await until_all_are_in(service, session, 0)
            texts = [f"word{number}" for number in range(REQUESTS)]
            asked = [asyncio.create_task(get(session, f"{service.url}/shout/{text}")) for text in texts]
            await until_all_are_in(service, session, REQUESTS)
            service.process.send_signal(signal.SIGTERM)
            answers = await asyncio.gather(*asked)
            status, out, err = await service.ended()
        finally:
            if service.process.returncode is None:
                service.process.kill()
                await service.process.wait()
        assert [(code, answer["text"]) for code, answer in answers] == [(200, text.upper()) for text in texts], err
        assert {answer["route"] for _, answer in answers} <= {"batch", "single"}
        # Two calls at a time were under way, so most requests had not even been sent when the signal came.
        assert endpoint.combined_calls >= REQUESTS // 8
        assert (status, err) == (clean, "")
        assert "closed, tasks left: []" in out
        assert how == "command" or "served, tasks left: []" in out
