"""The bundled catalogue and what `microbatch demo` does with it."""

from __future__ import annotations

from importlib import resources

import msgspec

LABELS = ("electronics", "clothing", "home", "beauty", "sports", "other")


class Product(msgspec.Struct, frozen=True):
    """A product of the catalogue.

    Attributes:
        id: Its id.
        name: Its name.
        description: What the shop says of it, in any language.
        label: The department it belongs to.
    """

    id: str
    name: str
    description: str
    label: str

    @property
    def question(self) -> str:
        """What the model is asked about it."""
        return f"Product: {self.name}\nDescription: {self.description}"


def catalogue() -> list[Product]:
    """Return the products."""
    lines = (resources.files(__name__) / "catalogue.jsonl").read_bytes()
    return msgspec.json.Decoder(Product).decode_lines(lines)


def instructions() -> str:
    """Return what the model is told about all of them."""
    return (resources.files(__name__) / "instructions.txt").read_text(encoding="utf-8").rstrip("\n")
