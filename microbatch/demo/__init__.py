"""The bundled catalogue of products that `microbatch demo` sorts into departments."""

from __future__ import annotations

from importlib import resources

import msgspec

LABELS = ("electronics", "clothing", "home", "beauty", "sports", "other")


class Product(msgspec.Struct, frozen=True):
    """A product of the catalogue; *description* may be in any language, *label* is its department."""

    id: str
    name: str
    description: str
    label: str

    @property
    def question(self) -> str:
        """The question that asks for its department."""
        return f"Product: {self.name}\nDescription: {self.description}"


def catalogue() -> list[Product]:
    """Return the products."""
    lines = (resources.files(__name__) / "catalogue.jsonl").read_bytes()
    return msgspec.json.Decoder(Product).decode_lines(lines)


def instructions() -> str:
    """Return the instructions that all questions share."""
    return (resources.files(__name__) / "instructions.txt").read_text(encoding="utf-8").rstrip("\n")
