"""Templates: a question with the fields of a record in braces."""

from __future__ import annotations

from string import Formatter
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


class MissingField(Exception):
    """The record lacks the field *name* of the template."""

    def __init__(self, name: str) -> None:
        super().__init__(f'the field "{name}" is missing')
        self.name = name


class Template:
    """A text with names of fields in braces, as `Product: {name}`; `{{` and `}}` are braces.

    A name with dots reaches into nested objects, unless a field has exactly that name. Empty braces stand for a value that is not a
    record.

    Attributes:
        text: The template as it was given.
        fields: The names in braces, each once, in order.

    Raises:
        ConfigError: It is malformed, or has no field.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"{text!r}: {error}; a brace itself is written {{{{ or }}}}") from None
        if any(form or conversion or (name or "").isspace() for _, name, form, conversion in parsed):
            raise ConfigError(f"{text!r}: braces hold the name of a field and nothing else, as in {{name}}")
        self._parts = [(literal, name) for literal, name, _, _ in parsed]
        self.fields: tuple[str, ...] = tuple(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.fields:
            raise ConfigError(f"{text!r} names no field: every question would be the same; write {{name}}")

    def render(self, record: Mapping[str, Any]) -> str:
        """Return the text with the fields of *record* filled in, values that are not strings as JSON.

        Raises:
            MissingField: *record* lacks a field.
        """
        texts = []
        for literal, name in self._parts:
            texts.append(literal)
            if name is not None:
                value = value_of(record, name)
                if value is msgspec.UNSET:
                    raise MissingField(name)
                texts.append(value if isinstance(value, str) else msgspec.json.encode(value).decode())
        return "".join(texts)


def value_of(record: Mapping[str, Any], name: str) -> Any:
    """Return a field of *record*; UNSET if there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part, msgspec.UNSET) if isinstance(value, dict) else msgspec.UNSET
    return value
