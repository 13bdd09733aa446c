"""A real Chromium without a window, told what to do through its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import tempfile
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

PATIENCE = 60.0
FLAGS = (
    "--headless",
    "--no-sandbox",  # which the root of a container cannot have
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1280,1000",
)


def program():
    """Its path; without it, the test is skipped, or fails where MICROBATCH_REQUIRE_CHROMIUM is set."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        complaint = pytest.fail if os.environ.get("MICROBATCH_REQUIRE_CHROMIUM") else pytest.skip
        complaint("there is no chromium: apt-get install chromium")
    return found


class Page:
    """A page, and what happened in it.

    Attributes:
        loaded: Set once it is there.
        requests: Addresses that it asked for.
        complaints: What the browser or the page wrote to the console: errors, warnings, breaches of the policy.
    """

    def __init__(self, socket):
        self._socket = socket
        self._answers = {}
        self._number = 0
        self.loaded = asyncio.Event()
        self.requests = []
        self.complaints = []

    async def listen(self):
        async for message in self._socket:
            told = message.json()
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            elif told["method"] == "Page.loadEventFired":
                self.loaded.set()
            elif told["method"] == "Network.requestWillBeSent":
                self.requests.append(told["params"]["request"]["url"])
            elif told["method"] == "Log.entryAdded":
                self.complaints.append(told["params"]["entry"]["text"])
            elif told["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.complaints.append(str(told["params"]))

    async def tell(self, method, **parameters):
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        told = await answer
        assert "error" not in told, told
        return told["result"]

    async def value(self, script):
        """What *script* comes to in the page."""
        told = await self.tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def text(self, selector):
        return await self.value(f"document.querySelector({selector!r}).innerText")

    async def until(self, script):
        """Wait until *script* is true in the page."""
        async with asyncio.timeout(PATIENCE):
            while not await self.value(script):  # noqa: ASYNC110 nothing tells
                await asyncio.sleep(0.05)

    async def screenshot(self):
        picture = await self.tell("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(picture["data"])


@asynccontextmanager
async def browser():
    """Start Chromium; gives a function that opens an address in a page, as another context manager."""
    path = program()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            *(path, *FLAGS, f"--user-data-dir={folder}", "about:blank"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            # Else it writes into the home of whoever runs the tests.
            env=os.environ | {"HOME": folder, "XDG_CONFIG_HOME": folder, "XDG_CACHE_HOME": folder},
        )
        try:
            port = await _port(Path(folder) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession() as session:
                yield lambda address: _page(session, port, address)
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def _port(file, process):
    async with asyncio.timeout(PATIENCE):
        while True:
            assert process.returncode is None, "chromium does not start"
            with suppress(OSError, ValueError, IndexError):
                return int(file.read_text().splitlines()[0])
            await asyncio.sleep(0.05)


@asynccontextmanager
async def _page(session, port, address):
    base = f"http://127.0.0.1:{port}/json"
    async with session.put(f"{base}/new?about:blank") as answer:
        target = await answer.json()
    async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
        page = Page(socket)
        listening = asyncio.ensure_future(page.listen())
        try:
            async with asyncio.timeout(PATIENCE):
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page.tell(f"{domain}.enable")
                await page.tell("Page.navigate", url=address)
                await page.loaded.wait()
            await page.until(f"document.readyState === 'complete' && location.href === {address!r}")
            yield page
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
