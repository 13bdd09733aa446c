"""What a client asks of the gateway itself, in headers that go no further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast, get_args

import msgspec

from microbatch.gateway.errors import Refusal
from microbatch.messages import Priority

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp import web

PREFIX: Final = "x-microbatch-"
_YES_OR_NO: Final = ("yes", "no")


class Wishes(msgspec.Struct, frozen=True):
    """How a request is to be served.

    Attributes:
        priority: `X-Microbatch-Priority`: "high", "normal" or "low".
        use_cache: `X-Microbatch-Cache`: whether somebody else's answer will do.
        batch: `X-Microbatch-Batch`: whether it may be combined; if not, it is relayed byte for byte.
    """

    priority: Priority = "normal"
    use_cache: bool = True
    batch: bool = True


def read_wishes(request: web.Request) -> Wishes:
    """Return what the headers of *request* ask for.

    Raises:
        Refusal: A value is none of those known.
    """
    priority = _word(request, "X-Microbatch-Priority", get_args(Priority), "normal")
    return Wishes(
        cast("Priority", priority),
        _word(request, "X-Microbatch-Cache", _YES_OR_NO, "yes") == "yes",
        _word(request, "X-Microbatch-Batch", _YES_OR_NO, "yes") == "yes",
    )


def _word(request: web.Request, name: str, known: Sequence[str], usual: str) -> str:
    word = request.headers.get(name, usual).strip().lower()
    if word not in known:
        raise Refusal(400, f"The header {name} must be one of {', '.join(known)}.", code="invalid_header")
    return word
