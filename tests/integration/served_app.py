"""A web service that answers through microbatch, as its README says to write one. `test_uvicorn` runs it and stops it.

`python served_app.py` serves until SIGTERM; `uvicorn served_app:app` is the same from uvicorn's command line. Both write the
tasks that are left at the end to stdout, which should be none.
"""

# ruff: noqa: T201 - its test reads what it prints
from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

import microbatch as mb

POLICY = mb.FlushPolicy(max_batch_size=8, max_wait=0.05, max_concurrent_batches=2)


@asynccontextmanager
async def lifespan(application: FastAPI):
    before = asyncio.all_tasks()
    transport = mb.OpenAIChat("gpt-4.1-mini", base_url=os.environ["OPENAI_BASE_URL"], api_key="k")
    async with mb.Microbatcher(transport, policy=POLICY, tokens="bytes") as application.state.batcher:
        yield
    print("closed, tasks left:", sorted(task.get_name() for task in asyncio.all_tasks() - before), flush=True)


app = FastAPI(lifespan=lifespan)


@app.get("/shout/{text}")
async def shout(text: str) -> dict[str, str]:
    reply = await app.state.batcher.submit(
        [{"role": "system", "content": "Shout."}, {"role": "user", "content": text}], timeout=20.0
    )
    return {"text": reply.output, "route": reply.route}


@app.get("/stats")
async def stats() -> dict[str, int]:
    return {"queued": app.state.batcher.stats().queued}


async def main() -> None:
    # uvicorn raises the signal that stopped it once more when it is done (0.29 and later), for whoever handled it before. By
    # default that ends the process with the signal's own status instead of 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await server.serve([listener])
    print("served, tasks left:", sorted(task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}))


if __name__ == "__main__":
    asyncio.run(main())
