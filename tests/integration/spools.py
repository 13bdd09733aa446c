"""What tests of spools have in common."""

from __future__ import annotations

from contextlib import asynccontextmanager

from microbatch.spool.records import Item, Name, Stage

FULL, HALF, ALONE = Stage
LONG = 60.0


@asynccontextmanager
async def open_spool(spool):
    await spool.open()
    try:
        yield spool
    finally:
        await spool.aclose()


def item(label, content="content"):
    return Item(Name(None, label), f"digest of {content}".encode(), f"{content} of {label}".encode())


def items(number):
    return [item(f"p{each:04}") for each in range(number)]


def ids(deliveries):
    return [delivery.item.name.id for delivery in deliveries]


async def found(spool, label):
    return (await spool.find([Name(None, label)]))[0]
