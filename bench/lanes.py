"""Memory over many lanes: every submit has a system message of its own, so every submit opens and closes a lane.

Also `map` over as many requests of one lane. Prints the process's memory as it goes; flat is right.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from pathlib import Path

import microbatch as mb

LINE = re.compile(r"^\[(\d+[a-z]{5})\] ", re.MULTILINE)


class Echo:
    """Answers every request with one word, and keeps nothing."""

    model = base_url = None

    def __init__(self) -> None:
        self.calls = self.items = 0

    async def send(self, call, on_text):
        ids = LINE.findall(call.messages[-1]["content"])
        self.calls += 1
        self.items += len(ids) or 1
        await asyncio.sleep(0)
        on_text('{"results":[' + ",".join(f'{{"id":"{name}","answer":"ok"}}' for name in ids) + "]}" if ids else "ok")
        return mb.Completion("stop", usage=mb.Usage(100, 10))

    async def aclose(self) -> None:
        pass


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def lanes(count: int, marks: int = 10) -> list[float]:
    """Submit *count* requests over as many lanes; return the memory in MiB at *marks* points on the way."""
    memory = []
    policy = mb.FlushPolicy(max_queued=1_000)
    async with mb.Microbatcher(Echo(), policy=policy, tokens="bytes") as batcher:

        async def worker(numbers) -> None:
            for number in numbers:
                system = f"System {number}: " + "x" * 400
                await batcher.submit([{"role": "system", "content": system}, {"role": "user", "content": f"{number}"}])

        numbers = iter(range(count))
        for _ in range(marks):
            part = iter([next(numbers) for _ in range(count // marks)])
            await asyncio.gather(*(worker(part) for _ in range(64)))
            memory.append(resident_mib())
        assert batcher.stats().answered == count // marks * marks
        assert not list(batcher._collector.lanes)
    return memory


async def mapped(count: int, marks: int = 10) -> tuple[list[float], float]:
    """Map over *count* requests; return the memory in MiB on the way, and the mean batch size."""
    memory = []
    transport = Echo()
    async with mb.Microbatcher(transport, tokens="bytes") as batcher:
        source = (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"item {n}"}] for n in range(count)
        )
        seen = 0
        async for result in batcher.map(source):
            result.unwrap()
            seen += 1
            if seen % (count // marks) == 0:
                memory.append(resident_mib())
        assert seen == count
    return memory, transport.items / transport.calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    options = parser.parse_args()
    start = time.perf_counter()
    memory = asyncio.run(lanes(options.count))
    print(f"{options.count} submits over {options.count} lanes, {time.perf_counter() - start:.0f} s; MiB on the way:")
    print("  " + " ".join(f"{mib:.1f}" for mib in memory))
    start = time.perf_counter()
    memory, size = asyncio.run(mapped(options.count))
    print(
        f"map over {options.count} requests, {time.perf_counter() - start:.0f} s, {size:.2f} a batch; MiB on the way:"
    )
    print("  " + " ".join(f"{mib:.1f}" for mib in memory))


if __name__ == "__main__":
    main()
