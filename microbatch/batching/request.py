"""Reads the arguments of a request: what it has in common with others, and whether it may share a prompt at all."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, Final, get_args

import msgspec

from microbatch.batching.ticket import NORMAL, Spec
from microbatch.checking import is_number, one_of, shown, whole
from microbatch.errors import ConfigError
from microbatch.messages import Message, Priority
from microbatch.prompt.codec import Settings
from microbatch.prompt.compose import is_combined
from microbatch.prompt.message_forms import COMBINED, as_texts, copy_of, encoded, plainly
from microbatch.prompt.parameters import HARMLESS, kept_alone, without_defaults
from microbatch.schema.answer_type import answer_type, asked_answer_type
from microbatch.schema.asked_form import FIELDS

if TYPE_CHECKING:
    from collections.abc import Hashable

    from microbatch.messages import Messages, Request
    from microbatch.schema.answer_type import AnswerType

OURS = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "stream", "stream_options"}
)
"""Request fields that `submit` has an argument for or decides itself, and that `params` must not hold."""

_ABOUT_TOOLS = frozenset({"tool_choice", "parallel_tool_calls"})
"""Fields that mean nothing without tools."""

_SDKS: Final = {"extra_headers": "headers=", "extra_query": "OpenAIChat(query=)"}
"""Arguments of OpenAI's SDK that are no request fields, and what stands for them here."""

_PLAIN_FIELDS = 2
"""Fields of the usual message: a role and a content."""

_PRIORITIES: tuple[object, ...] = get_args(Priority)


class Options(Settings, frozen=True):
    """`submit`'s options, checked and brought into the form that lanes compare.

    Attributes:
        content: All that two requests must have in common to be the same question, except their messages: the answer's form, model,
            max_tokens, the further fields as JSON, headers and tenant.
        alone: What keeps the request out of a combined prompt: names of request fields. None of them if it is combinable.
        rank: The priority as a number: 0 high, 1 normal, 2 low.
        cold: Whether the temperature is 0, so that equal requests may well get equal answers.
    """

    content: tuple[Hashable, str | None, int | None, bytes, tuple[tuple[str, str], ...], str | None]
    priority: Priority = "normal"
    alone: tuple[str, ...] = ()
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
    harmless: Collection[str] = HARMLESS,
) -> Options:
    """Check the options of `submit`, and return them as `Options`; parameters other than the *harmless* keep the request alone.

    Raises:
        ConfigError: One is wrong; the message names it.
    """
    if isinstance(max_tokens, numbers.Integral):
        max_tokens = plainly(max_tokens, "max_tokens")
    whole(1, max_tokens=max_tokens)
    one_of(Priority, priority=priority)
    model, tenant = as_word("model", model), as_word("tenant", tenant)
    fields = {} if params is None else request_fields(params)
    response_format = None
    if fields:
        asked = fields.get("response_format")
        if isinstance(asked, Mapping) and asked.get("type") == "json_schema":
            response_format = fields.pop("response_format")
        elif isinstance(asked, Mapping) and asked.get("type") == "text":
            del fields["response_format"]
    form, fields, alone = _read_form(fields, harmless, may_ask=output_type is str and response_format is None)
    if temperature is not None:
        if not is_number(temperature):
            raise ConfigError(f"temperature must be a number, got {shown(temperature)}")
        temperature = plainly(temperature, "temperature")
        fields["temperature"] = temperature
    answer = form or answer_type(output_type, response_format)
    sent = as_headers(headers)
    return Options(
        answer=answer,
        content=(
            answer.key,
            model,
            max_tokens,
            encoded(fields, "params", ordered=True) if fields else b"",
            sent,
            tenant,
        ),
        priority=priority,
        alone=alone,
        params=fields,
        headers=dict(sent),
        model=model,
        max_tokens=max_tokens,
        tenant=tenant,
        rank=rank_of(priority),
        cold=temperature == 0,
    )


def arguments_of(request: Request[Any]) -> tuple[Any, ...]:
    """Return the options of *request* as the arguments of `read_options`, in their order, without `harmless`."""
    return (
        request.output_type,
        request.model,
        request.max_tokens,
        request.temperature,
        request.params,
        request.headers,
        request.tenant,
        request.priority,
    )


def as_word(name: str, value: object) -> str | None:
    """Return *value*, an argument that is a string or None, as a plain string.

    Raises:
        ConfigError: It is something else.
    """
    if value is None or type(value) is str:
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a string, got {type(value).__name__}")
    return str.__str__(value)


def request_fields(params: object, ours: Collection[str] = OURS, method: str = "submit") -> dict[str, Any]:
    """Return the request fields that *params* stands for, a copy; they must not be among *ours*, which *method* decides.

    Raises:
        ConfigError: They are, or are no request fields.
    """
    if not isinstance(params, Mapping) or not all(isinstance(name, str) for name in params):
        raise ConfigError(f"params must be a mapping of request fields, got {type(params).__name__}")
    # JSON that is given as such is sent as such.
    fields = {name: value if type(value) is msgspec.Raw else plainly(value, "params") for name, value in params.items()}
    extra = fields.pop("extra_body", None)
    if extra is not None:
        if not isinstance(extra, dict):
            raise ConfigError(f"params: extra_body must be a mapping of request fields, got {type(extra).__name__}")
        fields |= extra  # as OpenAI's SDK does
    taken = sorted(fields.keys() & ours)
    if taken:
        raise ConfigError(f"params: {', '.join(taken)}: {method}() has an argument for this or decides it itself")
    for name in _SDKS.keys() & fields.keys():
        raise ConfigError(f"params: {name} is no request field: use {_SDKS[name]}")
    return fields


def rank_of(priority: object) -> int:
    """Return *priority* as a number, 0 for the most urgent; that of "normal" if it is not one of them."""
    return _PRIORITIES.index(priority) if priority in _PRIORITIES else NORMAL


def _read_form(
    fields: dict[str, Any], harmless: Collection[str], *, may_ask: bool
) -> tuple[AnswerType | None, dict[str, Any], tuple[str, ...]]:
    """Return the form of an answer that *fields* ask for, if they do and may, what to send, and what keeps the request alone."""
    if not fields:
        return None, fields, ()
    form = asked_answer_type(fields) if may_ask else None
    idle: Collection[str] = FIELDS if form is not None else () if fields.get("tools") else _ABOUT_TOOLS
    own = {name: value for name, value in fields.items() if name not in idle}
    alone = kept_alone(own, harmless)
    if not alone:
        asking = {} if form is None else {name: fields[name] for name in FIELDS if name in fields}
        fields = without_defaults(own, harmless) | asking
    return form, fields, alone


def as_headers(headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Return names, in lower case, and values of *headers*, sorted.

    Raises:
        ConfigError: They are no mapping of strings.
    """
    if headers is None:
        return ()
    if not isinstance(headers, Mapping) or not all(
        isinstance(name, str) and isinstance(value, str) for name, value in headers.items()
    ):
        raise ConfigError("headers must be a mapping of strings to strings")
    return tuple(sorted((name.lower(), value) for name, value in headers.items()))


Shared = tuple[tuple["Hashable", ...], str, "Messages"]


def read_messages(messages: Messages, options: Options) -> Shared | str:
    """Return what *messages* share with those they may travel with, or what keeps them alone.

    They can travel with others if every message is a text and the last one is the user's, and no combined prompt itself.

    Returns:
        The key of their lane, their own text, and the messages as texts: *messages* itself if they are in the usual form.
    """
    # The usual case first, and the texts are referred to, never copied.
    role, text = _usual(messages[-1])
    # The priority is in the key: a lane of low-priority work must not delay others.
    key: list[Hashable] = [options.priority, options.content]
    for message in messages[:-1] if role == "user" else ():
        pair = _usual(message)
        if pair is _UNUSUAL:
            return _read_unusual(messages, options)
        key += pair
    if text is None or role != "user":
        return _read_unusual(messages, options)
    return COMBINED if is_combined(text) else (tuple(key), text, messages)


_UNUSUAL: Final = (None, None)


def _usual(message: Mapping[str, Any] | Message) -> tuple[str, str] | tuple[None, None]:
    """Return role and text of a message that is nothing but these."""
    if type(message) is dict and len(message) == _PLAIN_FIELDS:
        role, content = message.get("role"), message.get("content")
    elif isinstance(message, Message) and message.name is None:
        role, content = message.role, message.content
    else:
        return _UNUSUAL
    return (role, content) if type(role) is str and type(content) is str else _UNUSUAL


def _read_unusual(messages: Messages, options: Options) -> Shared | str:
    check_messages(messages)
    texts = as_texts(copy_of(messages))
    if isinstance(texts, str):
        return texts
    key: list[Hashable] = [options.priority, options.content]
    for message in texts[:-1]:
        usual = len(message) == _PLAIN_FIELDS and isinstance(message["content"], str)
        key += (message["role"], message["content"]) if usual else (encoded(message, "messages", ordered=True),)
    text: str = texts[-1]["content"]
    return COMBINED if is_combined(text) else (tuple(key), text, texts)


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
        role = message.get("role") if isinstance(message, Mapping) else getattr(message, "role", None)
        if not isinstance(role, str) or not _may_be_message(message):
            raise ConfigError(f"messages[{position}] must be a Message or a dict with a role, got {_kind(message)}")


def _may_be_message(message: object) -> bool:
    if isinstance(message, type):
        return False
    return isinstance(message, Mapping | msgspec.Struct) or hasattr(message, "model_dump") or is_dataclass(message)


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
    return encoded(messages, "messages", ordered=True)


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
