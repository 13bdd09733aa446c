"""Joins the pieces in which a stream brings calls of tools."""

from __future__ import annotations

from typing import Any

from microbatch.transports.lenient import as_object, is_array, sound


class ToolCalls:
    """The calls of tools in a streamed reply, as far as they have arrived."""

    def __init__(self) -> None:
        self._calls: list[
            tuple[int, dict[str, Any], list[str]]
        ] = []  # indices, members and the pieces of the arguments
        self._latest: dict[int, int] = {}  # the place in `_calls` of the latest call with an index

    def take(self, pieces: Any) -> None:
        """Take the `tool_calls` of one event; a piece without an index belongs to the call at its place.

        Where an endpoint gives several calls one index, or none (huggingface/smolagents#1569), a piece with a name and another id
        begins the next one. An id alone does not: some endpoints send a new one with each piece.
        """
        for place, piece in enumerate(pieces if is_array(pieces) else ()):
            members = {**as_object(piece)}
            given = members.pop("index", None)
            index = int(given) if isinstance(given, int) or (isinstance(given, str) and given.isdecimal()) else place
            function = {**as_object(members.pop("function", None))}
            written = function.pop("arguments", None)
            call, arguments = self._call(index, members.get("id") if function.get("name") else None)
            call |= {name: value for name, value in members.items() if value}
            call["function"] |= {name: value for name, value in function.items() if value}
            if isinstance(written, str):
                arguments.append(written)

    def _call(self, index: int, id_: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the members and arguments of the call to which a piece with *index* belongs; *id_* is None unless it may begin one."""
        at = self._latest.get(index)
        if at is not None:
            _, call, arguments = self._calls[at]
            if not id_ or call.get("id", id_) == id_:
                return call, arguments
        self._latest[index] = len(self._calls)
        self._calls.append((index, {"type": "function", "function": {}}, []))
        return self._calls[-1][1:]

    def joined(self) -> list[dict[str, Any]]:
        """Return the calls as a whole message has them."""
        ordered = sorted(self._calls, key=lambda each: each[0])
        return sound(
            [
                {**call, "function": {**call["function"], "arguments": "".join(arguments)}}
                for _, call, arguments in ordered
            ]
        )
