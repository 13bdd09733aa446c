"""Processes that put into a spool and work for it until they are killed, for `test_spool_processes.py`.

Run as a program it forks one for each line it reads (role, place of the spool, folder for logs, seed) and writes its process id: so
each is there in no time. What a process has done is in the folder, line by line, written when the spool had acknowledged it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import redis.asyncio  # noqa: F401 once and for all

from microbatch.errors import ConfigError, StorageError
from microbatch.spool.records import Item, Name, Stage
from microbatch.spool.redis import RedisSpool
from microbatch.spool.sqlite import SQLiteSpool

NEVER = 10_000
LEASE = 0.3
LONG = 60.0
TAKERS = 3


def spool_at(place):
    kind = RedisSpool if place.startswith("redis://") else SQLiteSpool
    return kind(place, max_alone=NEVER)  # whoever is lost that often here, it is not its fault


def item(label):
    return Item(Name(None, label), f"digest of {label}".encode(), f"question {label}".encode())


def answer(item, nonce):
    return item.payload.replace(b"question", b"answer") + f" {nonce}".encode()


def log(folder, name, *lines):
    """Append lines in one write, which a kill does not tear."""
    file = os.open(Path(folder) / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, "".join(json.dumps(line) + "\n" for line in lines).encode())
    os.close(file)


def logged(folder, name):
    path = Path(folder) / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def put(spool, folder, chance):
    """Put requests, some together and some again; tell which were acknowledged."""
    for number in itertools.count(0, 5):
        some = [f"{os.getpid()}-{each}" for each in range(number, number + chance.randint(1, 20))]
        assert set(await spool.put([item(label) for label in some])) <= {"new", "known"}
        log(folder, "acknowledged", *some)


async def work(spool, folder, chance):
    """Take and answer, put back or forget; tell what answer was found after one was stored."""
    while True:
        for stage in Stage:
            slow = chance.random() < 0.2  # so others take and answer the same meanwhile
            deliveries = await spool.take(stage, chance.randint(1, 40), lease=0.01 if slow else LEASE)
            await asyncio.sleep(chance.random() * (0.04 if slow else 0.01))
            await spool.renew(deliveries[:3], lease=LEASE)
            fate = chance.random()
            if fate < 0.1:
                await spool.give_back(deliveries, error="no luck", counted=fate < 0.05)
            elif fate < 0.95:
                await spool.finish([(each, answer(each.item, chance.getrandbits(32))) for each in deliveries])
                names = [each.item.name for each in deliveries]
                found = await spool.find(names)
                log(folder, "found", *[[n.id, f.result.decode()] for n, f in zip(names, found, strict=True)])


async def take(spool, folder, _chance):
    """Take all there is together with two others, and tell what it was."""

    async def some():
        deliveries = await spool.take(Stage.FULL, 7, lease=LONG)
        log(folder, f"taken-{os.getpid()}", *[each.item.name.id for each in deliveries])
        return deliveries

    await some()
    log(folder, "began", os.getpid())
    while len(logged(folder, "began")) < TAKERS:  # noqa: ASYNC110 the others are processes of their own
        await asyncio.sleep(0.005)
    while await some():
        pass
    log(folder, "ended", os.getpid())


async def live(role, place, folder, seed):
    chance = random.Random(seed)
    while True:
        spool = spool_at(place)
        try:
            await spool.open()
            return await role(spool, folder, chance)
        except (StorageError, ConfigError):
            if not place.startswith("redis://"):
                raise
            await asyncio.sleep(0.02)  # the server has been killed
        finally:
            await spool.aclose()


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        role, place, folder, seed = line.split("\t")
        child = os.fork()
        if child:
            print(child, flush=True)  # noqa: T201 to whoever asked
            continue
        try:
            asyncio.run(live({"put": put, "work": work, "take": take}[role], place, folder, int(seed)))
        except BaseException:
            log(folder, "crashed", traceback.format_exc())
            raise
        finally:
            os._exit(0)


if __name__ == "__main__":
    main()
