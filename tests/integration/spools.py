"""What tests of spools have in common."""

from __future__ import annotations

from microbatch.spool.records import Item, Name, Stage

FULL, HALF, ALONE = Stage
LONG = 60.0


def item(label, content="content", tenant=None):
    return Item(Name(tenant, label), f"digest of {content}".encode(), f"{content} of {label}".encode())


def items(number):
    return [item(f"p{each:04}") for each in range(number)]


def ids(deliveries):
    return [delivery.item.name.id for delivery in deliveries]


async def found(spool, label, tenant=None):
    return (await spool.find([Name(tenant, label)]))[0]
