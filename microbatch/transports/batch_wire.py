"""Chat completions as lines of a provider's batch file, with the same bodies, replies and refusals as live calls."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from microbatch.errors import BadRequest, ConfigError
from microbatch.protocols import ChatCall
from microbatch.transports.capabilities import Capabilities, Plan, Rung
from microbatch.transports.chat_wire import compose
from microbatch.transports.error_parsing import Fault, has_failed, read_failure, to_error
from microbatch.transports.lenient import as_object
from microbatch.transports.reply_reader import ReplyReader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from microbatch.errors import StatusError
    from microbatch.protocols import Completion

# Fields that may be left out or renamed.
_OPTIONAL: Final = ("temperature", "max_tokens", "max_completion_tokens")
_RUNGS: Final = {"json_schema": Rung.JSON_SCHEMA, "json_object": Rung.JSON_OBJECT}


class BatchWire:
    """Writes and reads the lines of batch files.

    What the endpoint does not support is learned from refused lines, and left out of the lines of later files.

    Args:
        model: Model of calls that name none.
        where: Host and port of the endpoint, for errors.

    Attributes:
        model: As given.
    """

    def __init__(self, model: str | None, *, where: str) -> None:
        self.model = model
        self._where = where
        self._capabilities = Capabilities()

    def body(self, call: ChatCall) -> dict[str, Any]:
        """Return the body of the line for *call*.

        Raises:
            ConfigError: No model is named anywhere.
        """
        model = call.model or self.model
        if not model:
            raise ConfigError("no model: name one for the worker, or in the requests")
        return compose(call, model, self._plan(call, model))

    def read(
        self, status: int, raw: bytes, *, request_id: str | None, sent: Callable[[], Mapping[str, Any]]
    ) -> tuple[str, Completion]:
        """Return the text of a reply, and how it ended; *sent* returns the request body, and is called for refusals only.

        Raises:
            StatusError: It is a refusal. With `again`, `body` returns something else for the same call from now on.
            ServerError: It is no chat completion, or one without an answer.
        """
        reader = ReplyReader()
        text = read_failure(raw, status) if has_failed(status) else reader.whole(raw)
        if isinstance(text, Fault):
            error = to_error(text, where=self._where, headers={})
            if type(error) is BadRequest:
                error = self._capabilities.learn(self._plan_of(sent()), text, error, asyncio.get_running_loop().time())
            raise error
        completion = reader.completion(request_id)
        if reader.finish is None:
            completion.finish_reason = None  # a provider that writes files always gives a finish reason
        return text, completion

    def refusal(self, status: int, headers: Mapping[str, str], raw: bytes) -> StatusError:
        """Return the error for a failed response of the provider's API."""
        return to_error(read_failure(raw, status), where=self._where, headers=headers)

    def _plan(self, call: ChatCall, model: str) -> Plan:
        now = asyncio.get_running_loop().time()
        return self._capabilities.plan(call, base_url=self._where, model=model, credentials=(), stream=None, now=now)

    def _plan_of(self, body: Mapping[str, Any]) -> Plan:
        """Return the plan by which *body* was made, however long ago."""
        form = as_object(body.get("response_format"))
        schema = as_object(form.get("json_schema")).get("schema")
        call = ChatCall(messages=(), model=body["model"], schema=schema)
        today = self._plan(call, body["model"])
        sent = frozenset(name for name in _OPTIONAL if name in body)
        return Plan(call, today.entry, _RUNGS.get(form.get("type", "")), sent, today.digest)

    def __repr__(self) -> str:
        """Return the model and the endpoint."""
        return f"BatchWire(model={self.model!r}, where={self._where!r})"
