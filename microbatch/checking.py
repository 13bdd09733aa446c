"""Checks the arguments of constructors against their annotations, and those of methods one by one: a wrong one is a `ConfigError`."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from functools import cache, wraps
from typing import Annotated, Any, Literal, TypeAlias, TypeGuard, TypeVar, Union, cast

from microbatch.errors import ConfigError

F = TypeVar("F", bound=Callable[..., None])


@dataclasses.dataclass(frozen=True, slots=True)
class AtLeast:
    """In an `Annotated` number: the smallest value."""

    minimum: float


@dataclasses.dataclass(frozen=True, slots=True)
class AtMost:
    """In an `Annotated` number: the largest value."""

    maximum: float


Count: TypeAlias = Annotated[int, AtLeast(1)]
Seconds: TypeAlias = Annotated[float, AtLeast(0)]
Positive: TypeAlias = Annotated[float, AtLeast(0.001)]
Share: TypeAlias = Annotated[float, AtLeast(0), AtMost(1)]


def is_number(value: object) -> TypeGuard[float]:
    """Return whether *value* is a real number of any class in the range of floats, infinite or not; NaN and bools are none."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
    except OverflowError:
        return False


_KINDS: dict[object, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "True or False"),
    int: (lambda value: isinstance(value, numbers.Integral) and is_number(value), "a whole number"),
    float: (is_number, "a number"),
    str: (lambda value: isinstance(value, str), "a string"),
}
"""The test and the name of types that are more, or less, than the instances of a class."""

_CONTENT: dict[tuple[object, ...], str] = {
    (str,): " of strings",
    (int,): " of whole numbers",
    (str, str): " of strings",
    (int, Share): " of whole numbers to numbers from 0 to 1",
}
"""Descriptions of the content of collections and mappings, by the arguments of their types; that of other mappings is not checked."""


def checks_arguments(init: F) -> F:
    """Return an `__init__` that first checks its arguments against their annotations.

    Raises:
        ConfigError: One does not fit; the message names it.
    """
    signature = inspect.signature(init)

    @wraps(init)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # Python says it better
        check_given(init, given)
        init(*args, **kwargs)

    return cast("F", wrapper)


def check_given(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Check the arguments *given* of *function* by name; raise `ConfigError` if one does not fit."""
    parameters = inspect.signature(function).parameters
    for name, hint in hints_of(function).items():
        if name in given:
            several = parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            for value in given[name] if several else (given[name],):
                check(name, value, hint)


def check_fields(instance: object) -> None:
    """Check the fields of a dataclass or a Struct against their annotations; raise `ConfigError` if one does not fit."""
    kind: Any = type(instance)
    hints = hints_of(kind)
    for name in getattr(kind, "__struct_fields__", None) or [field.name for field in dataclasses.fields(kind)]:
        check(name, getattr(instance, name), hints[name])


@cache
def hints_of(annotated: Any) -> dict[str, Any]:
    """Return the types of the arguments of a function, or of the fields of a class; `Any` where a name is known to checkers only."""
    hints: dict[str, Any] = {}
    for each in reversed(annotated.__mro__) if isinstance(annotated, type) else [annotated]:
        names = {**vars(collections.abc), **vars(sys.modules[each.__module__])}
        for name, hint in getattr(each, "__annotations__", {}).items():
            try:
                hints |= typing.get_type_hints(_Holder({name: hint}), names, include_extras=True)
            except NameError:
                hints[name] = Any
    hints.pop("return", None)
    return hints


class _Holder:
    def __init__(self, annotations: dict[str, Any]) -> None:
        self.__annotations__ = annotations


def check(name: str, value: object, hint: Any) -> None:
    """Check that *value* fits the type *hint*; raise `ConfigError` that names *name* if not."""
    wanted = _lack(value, hint)
    if wanted is not None:
        words = isinstance(value, str) and ("number" in wanted or wanted.startswith("one of"))
        known = value is None or isinstance(value, numbers.Number) or words  # any other text may be a key
        kind = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        wanted = wanted if wanted.startswith("have ") else f"be {wanted}"
        raise ConfigError(f"{name} must {wanted}, got {shown(value) if known else kind}")


def shown(value: object) -> str:
    """Return *value* as a message shows it."""
    # Python refuses to write integers of thousands of digits.
    return "a number out of range" if isinstance(value, numbers.Integral) and not is_number(int(value)) else repr(value)


def _lack(value: Any, hint: Any) -> str | None:
    """Return what is wanted if *value* does not fit *hint*, else None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        lack = _lack(value, args[0])
        for rule in args[1:]:
            if isinstance(rule, AtLeast) and (lack == "a number" or (lack is None and value < rule.minimum)):
                return f"a number of at least {rule.minimum}"
            if isinstance(rule, AtMost) and (lack == "a number" or (lack is None and value > rule.maximum)):
                return f"a number of at most {rule.maximum}"
        return lack
    if origin in (Union, types.UnionType):
        lacks = [_lack(value, each) for each in args]
        if None in lacks:
            return None
        wanted = [lack for each, lack in zip(args, lacks, strict=True) if lack and each is not types.NoneType]
        return " or ".join(dict.fromkeys(wanted))
    if origin is Literal:
        known = any(value == each and type(value) is type(each) for each in args)
        return None if known else f"one of {', '.join(map(repr, args))}"
    kind = origin or hint
    if kind in (Any, object) or isinstance(kind, TypeVar):
        return None
    if kind in (None, types.NoneType):
        return None if value is None else "None"
    if kind in (collections.abc.Callable, Callable):
        return None if callable(value) else "a function"
    if kind in _KINDS:
        test, words = _KINDS[kind]
        return None if test(value) else words
    return _lack_of_class(value, kind, args)


def _lack_of_class(value: Any, kind: type, args: tuple[Any, ...]) -> str | None:
    words = f"{'an' if kind.__name__[0] in 'AEIO' else 'a'} {kind.__name__}"
    fits = isinstance(value, kind) and not isinstance(value, type)
    if issubclass(kind, Collection) and kind is not tuple:
        fits = fits and (not isinstance(value, str | bytes) or kind in (str, bytes))
        words = f"a {kind.__name__.lower()}{_CONTENT.get(args, '')}"
        if fits and args and not issubclass(kind, Mapping):
            fits = all(_lack(each, args[0]) is None for each in value)
        elif fits and args in _CONTENT:
            fits = all(_lack(name, args[0]) is None and _lack(each, args[1]) is None for name, each in value.items())
    elif getattr(kind, "_is_protocol", False):
        methods = [name for name in vars(kind) if not name.startswith("_") and callable(getattr(kind, name))]
        # From Python 3.12 on `isinstance` does not see what `__getattr__` hands on, as wrappers of a transport do.
        fits = not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in methods)
        words = f"have {', '.join(f'{name}()' for name in methods[:-1])} and {methods[-1]}()"
    return None if fits else words


# --- single arguments


def at_least(minimum: float, *, optional: bool = True, **settings: float | None) -> None:
    """Check that numbers, given by name, are at least *minimum*, or None if *optional*.

    Raises:
        ConfigError: One is no number in the range of floats, is NaN or is below the minimum.
    """
    for name, value in settings.items():
        if value is None and optional:
            continue
        if not is_number(value) or value < minimum:
            raise ConfigError(f"{name} must be a number of at least {minimum}, got {shown(value)}")


def plain_function(function: object, **settings: str) -> None:
    """Check that *function*, None allowed, is no async one; the setting, by its name, says what it has to return.

    Raises:
        ConfigError: It is.
    """
    for name, returned in settings.items():
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
            raise ConfigError(f"{name} must be a plain function from two outputs to {returned}, not an async one")


def as_seconds(name: str, value: float | None) -> float | None:
    """Return a caller's number of seconds, of any class, as a float; raise `ConfigError` if it is none or negative."""
    settings: dict[str, Any] = {name: value}
    at_least(0, **settings)
    return None if value is None else float(value)


def whole(minimum: int, *, optional: bool = True, **settings: int | None) -> None:
    """Check that whole numbers, given by name, are at least *minimum*, or None if *optional*.

    Raises:
        ConfigError: One is no int or is below the minimum.
    """
    for name, value in settings.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise ConfigError(f"{name} must be a whole number, got {shown(value)}")
    at_least(minimum, optional=optional, **settings)


def one_of(kind: object, **settings: str | None) -> None:
    """Check that strings, given by name, are values of the `Literal` *kind*; None is allowed.

    Raises:
        ConfigError: One is not.
    """
    for name, value in settings.items():
        if value is not None and value not in typing.get_args(kind):
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, typing.get_args(kind)))}, got {value!r}")
