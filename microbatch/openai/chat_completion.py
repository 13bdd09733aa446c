"""Chat completions as JSON: a request body as arguments of `submit`, and a `Reply` as a completion.

The gateway and the client in this package share these functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from microbatch.transports.chat_wire import completion_object, usage_object
from microbatch.transports.lenient import as_object, is_array

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microbatch.messages import Reply

_NAMED: Final = frozenset({"messages", "model", "temperature", "max_tokens", "max_completion_tokens"})
"""Fields that `submit` has an argument for."""


def submit_arguments(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `submit` that a request body stands for; fields without an argument of their own are in `params`."""
    limit = body.get("max_completion_tokens")
    params = {name: value for name, value in body.items() if name not in _NAMED}
    if "extra_body" in params:
        params["extra_body"] = {"extra_body": params["extra_body"]}  # a field of Gemini's, not the argument of the SDK
    return {
        "messages": body.get("messages"),
        "model": body.get("model"),
        "temperature": body.get("temperature"),
        "max_tokens": body.get("max_tokens") if limit is None else limit,
        "params": params or None,
    }


def usage_share(reply: Reply[Any]) -> dict[str, Any]:
    """Return the `usage` of *reply*: the endpoint's own object if its token counts are all this caller's, else the share."""
    share = usage_object(reply.usage)
    reported = as_object(as_object(reply.body).get("usage"))
    # The total is not compared: endpoints differ in what it includes.
    own = all(reported.get(name) == share[name] for name in ("prompt_tokens", "completion_tokens"))
    return dict(reported) if own else share


def completion_of(reply: Reply[Any], model: str | None) -> dict[str, Any]:
    """Return the text of *reply* as a chat completion; *model* is the requested one, for replies that name none."""
    # An answer in a combined reply is complete, however the rest of that reply ends.
    finish_reason = reply.finish_reason if reply.batch_size == 1 else None
    return completion_object(
        reply.text, model=reply.model or model, usage=reply.usage, finish_reason=finish_reason or "stop"
    )


def first_choice(completion: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first choice of a completion; empty if there is none."""
    choices = completion.get("choices")
    return as_object(choices[0]) if is_array(choices) and choices else {}


def first_message(completion: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message of a completion's first choice; empty if there is none."""
    return as_object(first_choice(completion).get("message"))
