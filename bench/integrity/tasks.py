"""The questions whose answers are compared: messages to a bank and products of a shop, each with its right label."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from microbatch.demo import LABELS, Product, catalogue

BESIDE = Path(__file__).parent.parent.parent.parent / "shared" / "data"
"""The data sets, where they lie beside the project."""

INTENTS = {
    "card_arrival": ("My {thing} has not arrived yet", "When will the {thing} that I ordered get here"),
    "exchange_rate": ("What rate do you apply when I change {money}", "The rate for {money} looks wrong to me"),
    "lost_or_stolen_card": ("Somebody took my {thing}, what now", "I left my {thing} on a train and cannot find it"),
    "change_pin": ("How do I set another PIN for my {thing}", "I would like a new PIN for the {thing}"),
    "declined_card_payment": ("The shop would not take my {thing}", "Paying with my {thing} was refused today"),
    "cancel_transfer": ("Stop the transfer of {money} that I made", "I sent {money} to the wrong account, undo it"),
    "top_up_failed": ("Adding {money} to my account did not work", "My top-up of {money} was not accepted"),
    "terminate_account": (
        "Close my account and pay me out in {money}",
        "I want to leave you, delete my {money} account",
    ),
    "verify_my_identity": (
        "Which papers prove who I am for the {thing}",
        "How do I show my identity to get the {thing}",
    ),
    "card_payment_fee_charged": ("Why was there a fee for paying {money}", "I paid in {money} and you took a charge"),
    "age_limit": ("Can my daughter of 15 have a {thing}", "How old must one be to get the {thing}"),
    "Refund_not_showing_up": ("The shop returned {money}, and I do not see it", "Where is my refund of {money}"),
}
"""The labels, a sixth of banking77's, with what messages are made from where the data set is missing."""

FILLS = {
    "thing": ("card", "debit card", "new card", "bank card", "Visa card", "second card"),
    "money": ("euros", "20 pounds", "100 dollars", "some yen", "my francs", "300 kroner"),
}


class Task(NamedTuple):
    """Questions with their right labels.

    Attributes:
        source: Where they come from.
        gold: The label of each question.
    """

    instructions: str
    labels: tuple[str, ...]
    source: str
    gold: dict[str, str]


def banking(folder: Path | None, count: int, seed: int) -> Task:
    """Return *count* messages to a bank, from banking77 in *folder*, or generated ones with None."""
    labels = tuple(INTENTS)
    if folder is None:
        made = [
            (form.format(thing=thing, money=money) + end, label)
            for label, forms in INTENTS.items()
            for form, thing, money, end in itertools.product(forms, *FILLS.values(), "?.")
        ]
        source, gold = "generated messages", dict(made)
    else:
        rows = _rows(folder / "banking77_test.jsonl")
        source, gold = "banking77", {row["text"]: row["label"] for row in rows if row["label"] in INTENTS}
    told = "You classify messages from customers of a bank. Answer with the one label that fits the message best: "
    return Task(f"{told}{', '.join(labels)}.", labels, source, _drawn(gold, count, seed))


def products(folder: Path | None, count: int, seed: int) -> Task:
    """Return *count* products of a shop, from *folder*, or of the bundled catalogue with None."""
    source = "bundled catalogue" if folder is None else "retail-demo-store"
    found = catalogue() if folder is None else msgspec.convert(_rows(folder / "products.jsonl"), list[Product])
    told = (
        "You sort the products of a shop into departments. Answer with the one label that fits the product best: electronics, "
        "clothing (shoes, bags and jewellery too), home (furniture, decoration, kitchen), beauty, sports (outdoors too), other."
    )
    return Task(told, LABELS, source, _drawn({product.question: product.label for product in found}, count, seed))


TASKS = {"banking": banking, "products": products}


def folder_of(data: str) -> Path | None:
    """Return the folder of the data sets named *data*; "" for the one beside the project, None if there is none."""
    if data:
        return Path(data)
    return BESIDE if BESIDE.is_dir() else None


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        return msgspec.json.Decoder(dict[str, Any]).decode_lines(file.read_bytes())
    except OSError as error:
        raise SystemExit(f"bench integrity: --data: cannot read {file}: {error.strerror}") from None


def _drawn(gold: dict[str, str], count: int, seed: int) -> dict[str, str]:
    if count > len(gold):
        raise SystemExit(f"bench integrity: --items {count}: there are only {len(gold)} different questions")
    return dict(random.Random(seed).sample(list(gold.items()), count))
