"""Joins the pieces in which a stream brings calls of tools."""

from __future__ import annotations

from typing import Any

from microbatch.transports.lenient import as_object, is_array, sound


class ToolCalls:
    """The calls of tools in a streamed reply, as far as they have arrived."""

    def __init__(self) -> None:
        self._calls: dict[int, dict[str, Any]] = {}
        self._arguments: dict[int, list[str]] = {}

    def take(self, pieces: Any) -> None:
        """Take the `tool_calls` of one event; a piece without an index belongs to the call at its place."""
        for place, piece in enumerate(pieces if is_array(pieces) else ()):
            members = {**as_object(piece)}
            given = members.pop("index", None)
            index = int(given) if isinstance(given, int) or (isinstance(given, str) and given.isdecimal()) else place
            function = {**as_object(members.pop("function", None))}
            arguments = function.pop("arguments", None)
            call = self._calls.setdefault(index, {"type": "function", "function": {}})
            call |= {name: value for name, value in members.items() if value}
            call["function"] |= {name: value for name, value in function.items() if value}
            if isinstance(arguments, str):
                self._arguments.setdefault(index, []).append(arguments)

    def joined(self) -> list[dict[str, Any]]:
        """Return the calls as a whole message has them."""
        return sound(
            [
                {**call, "function": {**call["function"], "arguments": "".join(self._arguments.get(index, ()))}}
                for index, call in sorted(self._calls.items())
            ]
        )
