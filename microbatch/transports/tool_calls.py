"""Calls of tools whose arguments come in the pieces of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from microbatch.transports.lenient import as_object, is_array

if TYPE_CHECKING:
    from collections.abc import Iterator


class CallPieces:
    """Joins the pieces of calls by their index; a piece without one belongs to the first call."""

    def __init__(self) -> None:
        self._calls: dict[str, dict[str, Any]] = {}

    def take(self, pieces: Any) -> None:
        """Take the `tool_calls` of a delta."""
        for piece in map(as_object, pieces if is_array(pieces) else ()):
            call = self._calls.setdefault(str(piece.get("index") or 0), {})
            call.update((name, piece[name]) for name in ("id", "type") if piece.get(name))
            function = as_object(piece.get("function"))
            known = call.setdefault("function", {"name": "", "arguments": ""})
            known["name"] = function.get("name") or known["name"]
            arguments = function.get("arguments")
            known["arguments"] += arguments if isinstance(arguments, str) else ""

    def joined(self) -> list[dict[str, Any]]:
        """Return the calls as a whole message has them."""
        return list(self._whole())

    def _whole(self) -> Iterator[dict[str, Any]]:
        for call in self._calls.values():
            yield {"id": call.get("id", ""), "type": call.get("type", "function"), "function": call["function"]}
