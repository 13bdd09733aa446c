"""The questions of these tests, the type of their answers, and the right answer to each."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, Field

from microbatch.testing import embedded

MODEL = "gpt-4.1-mini"
EMBEDDER = "text-embedding-3-small"
SYSTEM = "You are a geographer."
TEXT = "text"
TYPED = "typed"
VECTOR = "vector"

_NUMBER = re.compile(r"city has number (\d+)")


class City(BaseModel):
    """A city of the list."""

    name: str = Field(description="Its usual name.")
    size: Literal["small", "large"]
    population: int
    twins: list[str] = Field(default_factory=list)
    mayor: str | None = None


def question(number: int) -> str:
    return f"Which city has number {number}?"


def messages(number: int) -> list[Any]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question(number)}]


def right_city(number: int) -> City:
    return City(
        name=f'Town "{number}"',
        size="large" if number % 2 else "small",
        population=1_000 + number,
        twins=[f"Twin {number}"],
        mayor=None if number % 3 else f"Mayor {number}",
    )


def right_text(number: int) -> str:
    return f"It is town {number}."


def model_answer(text: str, schema: dict[str, Any] | None) -> Any:
    """Answer as the simulated model: an object if there is any schema, else a sentence."""
    found = _NUMBER.search(text)
    if found is None:
        return "This is no question about a city."
    number = int(found.group(1))
    return right_text(number) if schema is None else right_city(number).model_dump()


def right_vector(number: int) -> list[float]:
    return embedded(question(number), EMBEDDER).tolist()


def is_right(answer: object, number: int, kind: str) -> bool:
    if kind == VECTOR:
        return answer == right_vector(number)
    if kind == TEXT:
        return answer == right_text(number)
    # Some frameworks add private attributes, by which equal models differ.
    return isinstance(answer, City) and answer.model_dump() == right_city(number).model_dump()
