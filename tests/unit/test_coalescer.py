"""The coalescer ends every request, also those that are not awaited any more."""

from __future__ import annotations

import asyncio
import gc

import pytest

from microbatch.errors import StorageError
from microbatch.storage.coalescer import Coalescer


async def test_closing_ends_what_waits_and_complains_of_nothing_that_is_not_awaited():
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    started = asyncio.Event()

    async def hang(items):
        started.set()
        await asyncio.Event().wait()
        return items

    coalescer = Coalescer(hang, max_trips=1)
    serving = asyncio.create_task(coalescer.serve())
    await asyncio.sleep(0)
    futures = [coalescer.submit(1)]
    await started.wait()
    futures.append(coalescer.submit(2))
    reader = asyncio.create_task(asyncio.wait(futures))
    await asyncio.sleep(0)
    reader.cancel()
    serving.cancel()
    await asyncio.wait([reader, serving])
    assert all(map(asyncio.Future.done, futures))
    awaited = futures.pop()
    del futures, coalescer, serving, reader
    gc.collect()
    with pytest.raises(StorageError):
        await awaited
    assert complaints == []
