"""Which types have a JSON form, and whose library finds it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
import pydantic
import pytest
from helpers import each
from msgspec import Struct
from output_types import Cat, Category, Checked, Colour, Plain

from microbatch.errors import ConfigError
from microbatch.schema.answer_type import answer_type


class Doubtful(Struct):
    plain: Plain


Twin = msgspec.defstruct("Twin", [("a", int)], module="m")


OtherTwin = msgspec.defstruct("Twin", [("a", str)], module="m")


@each(
    ("output_type", "words"),
    [
        (Plain, "Plain"),
        (object, "object"),
        (list[Plain], "list"),
        (Doubtful, "Doubtful"),
        (Category("home"), "must be a type, not an instance of Category"),
        (len, "must be a type, not an instance of builtin_function"),
        (None, "must be a type, not an instance of NoneType"),
        ("Category", "must be a type, not an instance of str"),
        (5, "must be a type, not an instance of int"),
        (Callable[[int], str], "Callable"),
        (Category | Cat, "Category.*Cat"),
        (list["Nowhere"], "Nowhere"),  # noqa: F821
        (Literal[Colour.RED], "Literal"),
        (complex, "complex"),
        (list[Literal[Colour.RED]], "Literal"),
    ],
)
def test_a_type_without_a_json_form_is_a_config_error_that_names_it(output_type, words) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        answer_type(output_type)
    assert "\n" not in str(caught.value)
    assert "home" not in str(caught.value)


def test_two_types_of_one_name_are_told_apart_or_refused() -> None:
    """msgspec tells them apart from 0.23 on."""
    try:
        kind = answer_type(tuple[Twin, OtherTwin])
    except ConfigError as error:
        assert "Twin" in str(error)  # noqa: PT017 either outcome is right
        return
    one, other = kind.schema["prefixItems"]
    assert one != other
    output, _ = kind.decode('[{"a":1},{"a":"x"}]')
    assert output == (Twin(1), OtherTwin("x"))
    with pytest.raises(ValueError, match=r"^\$\[1\]\.a: wrong type$"):
        kind.decode('[{"a":1},{"a":1}]')


def test_a_field_whose_type_cannot_be_found_is_a_config_error() -> None:
    class Lost(Struct):
        inner: Nowhere  # noqa: F821

    with pytest.raises(ConfigError, match=r"Lost.*Nowhere"):
        answer_type(Lost)


def test_a_pydantic_model_that_is_not_finished_is_a_config_error() -> None:
    class Unfinished(pydantic.BaseModel):
        inner: Nowhere  # noqa: F821

    with pytest.raises(ConfigError, match="Unfinished"):
        answer_type(Unfinished)


def test_a_panic_while_compiling_is_a_config_error_and_an_interrupt_is_not() -> None:
    def compile_raising(error: BaseException) -> None:
        class Raising(pydantic.BaseModel):
            @classmethod
            def __get_pydantic_json_schema__(cls, core_schema, handler):
                raise error

        answer_type(Raising)

    class PanicException(BaseException):
        pass

    with pytest.raises(ConfigError, match="Raising"):
        compile_raising(PanicException("the core panicked"))
    with pytest.raises(ConfigError, match="PanicException"):
        compile_raising(PanicException())
    with pytest.raises(KeyboardInterrupt):
        compile_raising(KeyboardInterrupt())


def test_pydantic_is_never_imported_and_is_found_once_the_caller_has_imported_it() -> None:
    script = """
import sys, msgspec
from microbatch.schema.answer_type import answer_type
class Category(msgspec.Struct):
    a: int
assert answer_type(Category).decode('{"a":1}')[0].a == 1
assert "pydantic" not in sys.modules
import pydantic
class Model(pydantic.BaseModel):
    a: int
assert answer_type(list[Model]).decode('[{"a":1}]')[0] == [Model(a=1)]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("output_type", [Checked, list[Checked], Annotated[int, pydantic.Field(gt=0)]])
def test_pydantic_constraints_hold_without_a_model(output_type) -> None:
    kind = answer_type(output_type)
    for raw in ("-1", '{"x":-1}', '[{"x":-1}]'):
        with pytest.raises(ValueError, match=r"greater_than|_type"):
            kind.decode(raw)


def test_a_default_that_is_not_json_is_nothing_to_warn_of() -> None:
    class Odd(pydantic.BaseModel):
        anything: Any = object()

    assert answer_type(Odd).decode('{"anything":[1]}')[0].anything == [1]
