"""Many clients of `serve --workers`, which is told to reload and to stop meanwhile, and the account of every request in the end.

As a program: `python tests/integration/worker_storm.py --requests 20000 --clients 64 --workers 2`.

A client sends one request after the other on its connection. An attempt has an id, which is in the access log if the gateway took it.
It is sent again under the same id if its connection was closed without an answer, as HTTP clients do when the server has closed it
between two requests; had the gateway taken the attempt, its id would be there twice, or with another ending than the client saw. One
that the gateway refused because it was stopping is repeated under another id.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import aiohttp
from gateway_world import MODEL, serve

from microbatch.testing import Latency, SimulatedEndpoint

KEY = "sk-someone-s-own-key"


@dataclass
class Outcome:
    """What a storm came to.

    Attributes:
        answered: Requests with the right answer.
        wrong: Ids of those with another one.
        seen: The status that clients saw, by id.
        logged: The lines of the access log: id and status.
        resent: Attempts that were sent again on another connection.
        resent_for_reloads: Those of them before the gateway was stopped.
        refused: Attempts that were refused because the gateway was stopping.
        calls: Calls to the endpoint.
        statuses: Exit statuses of the gateway.
        counted: Answered requests by the figures of the last gateway.
        after: Requests that it has answered, as clients saw them.
        said: What the gateways wrote to stderr in the end.
    """

    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    logged: list[tuple[str, int]] = field(default_factory=list)
    resent: int = 0
    resent_for_reloads: int = 0
    refused: int = 0
    calls: int = 0
    statuses: list[int] = field(default_factory=list)
    counted: int = 0
    after: int = 0
    said: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """What is not as it should be."""
        lines = Counter(self.logged)
        found = [f"wrong answer: {name}" for name in self.wrong]
        found += [f"not in the log, or with another status: {pair}" for pair in self.seen.items() if not lines[pair]]
        found += [f"{number} times in the log: {pair}" for pair, number in lines.items() if number > 1]
        found += [f"only in the log: {pair}" for pair in lines if pair not in self.seen.items()]
        found += [f"exit status {status}" for status in self.statuses if status]
        if self.counted != self.after:
            found.append(f"the figures have {self.counted} answers, the clients {self.after}")
        return found


class Clients:
    """Clients that together send at least so many requests to whatever listens at *port*, and more until `enough` is set."""

    def __init__(self, port: int, requests: int, outcome: Outcome) -> None:
        self.address = f"http://127.0.0.1:{port}/v1/chat/completions"
        self.outcome = outcome
        self.requests = requests
        self.waiting = itertools.count()
        self.enough = asyncio.Event()
        self.milestones: dict[int, asyncio.Event] = {}

    def at(self, answered: int) -> asyncio.Event:
        """Return an event that is set when so many requests have been answered."""
        return self.milestones.setdefault(answered, asyncio.Event())

    async def run(self) -> None:
        """Send requests until none is left."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
            for number in self.waiting:
                if number >= self.requests and self.enough.is_set():
                    return
                attempt = 0
                while not await self.send(session, number, f"{number}.{attempt}"):
                    attempt += 1

    async def send(self, session: aiohttp.ClientSession, number: int, name: str) -> bool:
        """Send a request until there is an answer to it; return whether it is a completion."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": f"item {number}"}], "stream": number % 5 == 0}
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": name}
        while True:
            try:
                async with session.post(self.address, json=body, headers=headers) as answer:
                    text = await answer.text()
                    status = answer.status
                break
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.05)  # nothing listens between two gateways
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                self.outcome.resent += 1
        self.outcome.seen[name] = status
        if status != 200:
            self.outcome.refused += 1
            assert (status, json.loads(text)["error"]["code"]) == (503, "shutting_down"), text
            return False
        if _content(text) != f"re: item {number}":
            self.outcome.wrong.append(name)
        self.outcome.answered += 1
        self.outcome.after += 1
        if self.outcome.answered in self.milestones:
            self.milestones[self.outcome.answered].set()
        return True


async def _said(served, word: bytes) -> None:
    """Wait until the gateway has written a line with *word* to stderr."""
    async with asyncio.timeout(120):
        while word not in (line := await served.process.stderr.readline()):
            assert line, "it has ended"


def _content(text: str) -> str:
    """Return the content of a completion, or of the events of a stream."""
    if text.startswith("{"):
        return json.loads(text)["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])


async def storm(*, requests: int, clients: int, workers: int, folder: Path) -> Outcome:
    """Serve *requests* with SIGHUP after a quarter and the half of them, and SIGTERM and another start after three quarters."""
    outcome, log = Outcome(), folder / "access.jsonl"
    latency = Latency(first_token=0.02, tokens_per_second=0)
    upstream = SimulatedEndpoint(latency=latency, answer=lambda text, _schema: f"re: {text}")
    async with upstream:
        flags = ("--upstream", upstream.base_url, "--workers", str(workers), "--access-log", str(log))
        async with contextlib.AsyncExitStack() as first:
            served = await first.enter_async_context(serve(*flags, "--port", "0"))
            crowd = Clients(served.port, requests, outcome)
            marks = [crowd.at(requests * quarter // 4) for quarter in (1, 2, 3)]
            async with asyncio.TaskGroup() as group:
                for _ in range(clients):
                    group.create_task(crowd.run())
                for number, mark in enumerate(marks[:2]):
                    await mark.wait()
                    log.rename(folder / f"access.{number}.jsonl")
                    served.process.send_signal(signal.SIGHUP)
                    await _said(served, b"Reloaded")
                    outcome.resent_for_reloads = outcome.resent
                await marks[2].wait()
                served.process.send_signal(signal.SIGTERM)
                status, _, said = await served.ended()
                outcome.statuses.append(status)
                outcome.said.append(said)
                outcome.after = 0
                served = await first.enter_async_context(serve(*flags, "--port", str(served.port)))
                crowd.enough.set()
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{served.port}/stats") as answer,
            ):
                outcome.counted = (await answer.json())["answered"]
            served.stop()
            status, _, said = await served.ended()
            outcome.statuses.append(status)
            outcome.said.append(said)
        outcome.calls = upstream.calls
    outcome.logged = _logged(folder)
    return outcome


def _logged(folder: Path) -> list[tuple[str, int]]:
    lines = [line for path in folder.glob("access*.jsonl") for line in path.read_text("utf-8").splitlines()]
    return [(line["id"], line["status"]) for line in map(json.loads, lines)]


def main() -> int:
    """Run one storm and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = asyncio.run(storm(**vars(options), folder=Path(folder)))
    faults = outcome.faults
    print(  # noqa: T201 the result
        f"{outcome.answered:,} answered in {outcome.calls:,} calls, {len(outcome.wrong)} wrong; "
        f"{outcome.refused:,} refused while stopping and asked again; "
        f"{outcome.resent:,} sent again on another connection, {outcome.resent_for_reloads:,} of them because of reloads; "
        f"{len(outcome.logged):,} lines in the log; {len(faults)} faults",
        *faults[:20],
        sep="\n  ",
    )
    return 1 if faults or outcome.answered < options.requests else 0


if __name__ == "__main__":
    sys.exit(main())
