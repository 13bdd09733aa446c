"""Reads the arguments of a request: what it has in common with others, and whether it may share a prompt at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from microbatch.batching.ticket import NORMAL, Spec
from microbatch.errors import ConfigError
from microbatch.messages import Message, Priority
from microbatch.policy import one_of, whole
from microbatch.prompt.codec import Settings
from microbatch.prompt.compose import is_combined
from microbatch.schema.answer_type import answer_type, asked_answer_type
from microbatch.schema.asked_form import FIELDS

if TYPE_CHECKING:
    from collections.abc import Hashable

    from microbatch.messages import Messages
    from microbatch.schema.answer_type import AnswerType

OURS = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "stream", "stream_options"}
)
"""Request fields that `submit` has an argument for or decides itself, and that `params` must not hold."""

ALONE = frozenset({
    "audio", "function_call", "functions", "logit_bias", "logprobs", "modalities", "n", "parallel_tool_calls", "prediction",
    "response_format", "seed", "stop", "tool_choice", "tools", "top_logprobs", "web_search_options",
})  # fmt: skip
"""Request fields whose meaning is one answer's, so that a request with one of them goes alone, unless it asks for the form of an
answer: a schema, any object, or a tool that must be called."""

_ABOUT_TOOLS = frozenset({"tool_choice", "parallel_tool_calls"})
"""Fields that mean nothing without tools."""

_PLAIN_FIELDS = 2
"""Fields of the usual message: a role and a content."""

_PRIORITIES: tuple[object, ...] = get_args(Priority)

_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class Options(Settings, frozen=True):
    """`submit`'s options, checked and brought into the form that lanes compare.

    Attributes:
        content: All that two requests must have in common to be the same question, except their messages.
        combinable: Whether the options allow a shared prompt.
        rank: The priority as a number: 0 high, 1 normal, 2 low.
        cold: Whether the temperature is 0, so that equal requests may well get equal answers.
    """

    content: tuple[Hashable, ...]
    priority: Priority = "normal"
    combinable: bool = True
    tenant: str | None = None
    rank: int = NORMAL
    cold: bool = False


def read_options(
    output_type: Any,
    model: str | None,
    max_tokens: int | None,
    temperature: float | None,
    params: Mapping[str, Any] | None,
    headers: Mapping[str, str] | None,
    tenant: str | None,
    priority: Priority,
) -> Options:
    """Check the options of `submit`, and return them as `Options`.

    Raises:
        ConfigError: One is wrong; the message names it.
    """
    whole(1, max_tokens=max_tokens)
    one_of(Priority, priority=priority)
    for name, word in (("model", model), ("tenant", tenant)):
        if word is not None and not isinstance(word, str):
            raise ConfigError(f"{name} must be a string, got {type(word).__name__}")
    fields: dict[str, Any] = {}
    response_format = None
    if params is not None:
        if not isinstance(params, Mapping):
            raise ConfigError(f"params must be a mapping of request fields, got {type(params).__name__}")
        taken = sorted(OURS & params.keys())
        if taken:
            raise ConfigError(f"params: {', '.join(taken)}: submit() has an argument for this or decides it itself")
        fields.update(params)
        asked = fields.get("response_format")
        if isinstance(asked, Mapping) and asked.get("type") == "json_schema":
            response_format = fields.pop("response_format")
        elif isinstance(asked, Mapping) and asked.get("type") == "text":
            del fields["response_format"]
    form = asked_answer_type(fields) if fields and output_type is str and response_format is None else None
    own = _beside(fields, form)
    combinable = not any(_means_one_answer(name, value) for name, value in own.items())
    if temperature is not None:
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or math.isnan(temperature):
            raise ConfigError(f"temperature must be a number, got {temperature!r}")
        fields["temperature"] = temperature
    answer = form or answer_type(output_type, response_format)
    sent = _headers(headers)
    return Options(
        answer=answer,
        content=(answer.key, model, max_tokens, _canonical(fields, "params"), sent, tenant),
        priority=priority,
        combinable=combinable,
        params=fields,
        headers=dict(sent),
        model=model,
        max_tokens=max_tokens,
        tenant=tenant,
        rank=rank_of(priority),
        cold=temperature == 0,
    )


def rank_of(priority: object) -> int:
    """Return *priority* as a number, 0 for the most urgent; that of "normal" if it is not one of them."""
    return _PRIORITIES.index(priority) if priority in _PRIORITIES else NORMAL


def _beside(fields: Mapping[str, Any], form: AnswerType | None) -> Mapping[str, Any]:
    """Return *fields* without those that only ask for the *form* of an answer, or mean nothing as there are no tools."""
    if form is None and fields.get("tools"):
        return fields
    idle = _ABOUT_TOOLS if form is None else FIELDS
    return {name: value for name, value in fields.items() if name not in idle}


def _means_one_answer(name: str, value: Any) -> bool:
    # `n: 1` and `logprobs: false` only spell out a default.
    return name in ALONE and not (value is None or value is False or (name == "n" and value == 1))


def _headers(headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    if headers is None:
        return ()
    if not isinstance(headers, Mapping) or not all(
        isinstance(name, str) and isinstance(value, str) for name, value in headers.items()
    ):
        raise ConfigError("headers must be a mapping of strings to strings")
    return tuple(sorted((name.lower(), value) for name, value in headers.items()))


def _canonical(value: Any, name: str) -> bytes:
    """Return *value* as JSON that is equal for equal values only; 1, 1.0 and true differ."""
    if not value:
        return b""
    try:
        return _encode_sorted(value)
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise ConfigError(f"{name} must be JSON values: {error}") from error


def read_messages(messages: Messages, options: Options) -> tuple[tuple[Hashable, ...], str] | None:
    """Return all that *messages* must share with others to travel with them, and their own text; None if they go alone.

    They can travel with others if every message is plain text and the last one is the user's, and no combined prompt itself.
    """
    # The usual case first, and the texts are referred to, never copied.
    last = messages[-1]
    if type(last) is dict and len(last) == _PLAIN_FIELDS:
        text = last.get("content")
        if last.get("role") != "user" or type(text) is not str:
            return None
    elif isinstance(last, Message) and last.role == "user" and last.name is None and isinstance(last.content, str):
        text = last.content
    else:
        return None
    if is_combined(text):
        return None
    # The priority is in the key: a lane of low-priority work must not delay others.
    key: list[Hashable] = [options.priority, options.content]
    for message in messages[:-1]:
        if type(message) is dict and len(message) == _PLAIN_FIELDS:
            role, content = message.get("role"), message.get("content")
            if type(role) is str and type(content) is str:
                key.append(role)
                key.append(content)
                continue
        if not _is_text(message):
            return None
        key.append(_canonical(message, "messages"))
    return tuple(key), text


def own_text(messages: Messages, plain: list[dict[str, Any]] | None) -> str | None:
    """Return the text that *messages* end in if those before it equal *plain*; None if only `read_messages` can tell.

    Most submits of a service ask the same kind of thing again: comparing costs a fraction of making a key.
    """
    last = messages[-1]
    if type(last) is dict and len(last) == _PLAIN_FIELDS and messages[:-1] == plain:
        text = last.get("content")
        if type(text) is str and last.get("role") == "user" and not is_combined(text):
            return text
    return None


def _is_text(message: Mapping[str, Any] | Message) -> bool:
    if isinstance(message, Message):
        return isinstance(message.content, str)
    return (
        isinstance(message, Mapping)
        and isinstance(message.get("content"), str)
        and message.keys() <= {"role", "content", "name"}
    )


def check_messages(messages: Messages) -> None:
    """Check that *messages* are a non-empty sequence of messages.

    Raises:
        ConfigError: They are not.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError(
            f"messages must be a non-empty list of chat messages, got {_kind(messages)}; "
            'a single text is [{"role": "user", "content": text}]'
        )
    for position, message in enumerate(messages):
        if not isinstance(message, Message) and not (
            isinstance(message, Mapping) and isinstance(message.get("role"), str)
        ):
            raise ConfigError(f"messages[{position}] must be a Message or a dict with a role, got {_kind(message)}")


def _kind(value: object) -> str:
    return f"an empty {type(value).__name__}" if value in ([], ()) else type(value).__name__


def spec_of(messages: Messages, options: Options, key: tuple[Hashable, ...] = ()) -> Spec:
    """Return a spec with *messages*, as a copy that the caller cannot change any more; see `Spec`.

    *key* is what `read_messages` returned; of a request that goes alone, what equal ones find it by, () if they do not.
    """
    shared = copy_of(messages)
    plain = all(len(message) == _PLAIN_FIELDS and set(map(type, message.values())) == {str} for message in shared)
    return Spec(
        key=key,
        content=key[1:],
        model=options.model,
        shared=shared,
        plain=shared if plain else None,
        answer=options.answer,
        max_tokens=options.max_tokens,
        params=options.params,
        headers=options.headers,
        tenant=options.tenant,
        rank=options.rank,
        shared_chars=sum(len(content) for each in shared if isinstance(content := each.get("content"), str)),
    )


def canonical_messages(messages: Messages) -> bytes:
    """Return *messages* as JSON that is equal for equal messages only.

    Raises:
        ConfigError: They hold something that JSON cannot carry.
    """
    return _canonical(messages, "messages")


def copy_of(messages: Messages) -> list[dict[str, Any]]:
    """Return *messages* as plain dicts of their own, keys in the order given.

    Raises:
        ConfigError: They hold something that JSON cannot carry.
    """
    try:
        copies: list[dict[str, Any]] = msgspec.json.decode(msgspec.json.encode(messages))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"messages must be JSON values: {error}") from error
    return copies


def remembering(read: Callable[..., Options]) -> Callable[..., Options]:
    """Return *read*, which is `read_options`, with a memory of its latest arguments: most of a service's submits have the same.

    They are compared by identity, which costs a tenth of reading them and trusts no `__eq__`. A mapping may change, so arguments
    with one are always read.
    """
    # One tuple, as a caller in another thread, who is refused later, comes by here too.
    latest: tuple[Any, ...] = (str, None, None, None, None, "normal", PLAIN)

    def read_or_know(
        output_type: Any,
        model: str | None,
        max_tokens: int | None,
        temperature: float | None,
        params: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None,
        tenant: str | None,
        priority: Priority,
    ) -> Options:
        nonlocal latest
        if params is None and headers is None:
            type_, model_, max_tokens_, temperature_, tenant_, priority_, known = latest
            if (
                output_type is type_
                and model is model_
                and max_tokens is max_tokens_
                and temperature is temperature_
                and tenant is tenant_
                and priority is priority_
            ):
                options: Options = known
                return options
        options = read(output_type, model, max_tokens, temperature, params, headers, tenant, priority)
        if params is None and headers is None:
            latest = output_type, model, max_tokens, temperature, tenant, priority, options
        return options

    return read_or_know


PLAIN = read_options(str, None, None, None, None, None, None, "normal")
"""The options of a submit that gives none, read once."""
