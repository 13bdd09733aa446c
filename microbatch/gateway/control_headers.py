"""The `X-Microbatch-*` headers, which control the gateway and are not relayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast, get_args

import msgspec

from microbatch.gateway.errors import GatewayError
from microbatch.messages import Priority

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp import web

PREFIX: Final = "x-microbatch-"
TENANT_HEADER: Final = "X-Microbatch-Tenant"
_YES_OR_NO: Final = ("yes", "no")


class ControlHeaders(msgspec.Struct, frozen=True):
    """The control headers of a request.

    Attributes:
        priority: `X-Microbatch-Priority`: "high", "normal" or "low".
        use_cache: `X-Microbatch-Cache`: whether the answer may be that to an earlier request.
        batch: `X-Microbatch-Batch`: whether the request may be combined; if not, it is relayed byte for byte.
    """

    priority: Priority = "normal"
    use_cache: bool = True
    batch: bool = True


def read_control_headers(request: web.Request) -> ControlHeaders:
    """Return the control headers of *request*; raise for unknown values."""
    return ControlHeaders(
        cast("Priority", _word(request, "X-Microbatch-Priority", get_args(Priority), "normal")),
        _word(request, "X-Microbatch-Cache", _YES_OR_NO, "yes") == "yes",
        _word(request, "X-Microbatch-Batch", _YES_OR_NO, "yes") == "yes",
    )


def _word(request: web.Request, name: str, known: Sequence[str], default: str) -> str:
    word = request.headers.get(name, default).strip().lower()
    if word not in known:
        raise GatewayError(400, f"The header {name} must be one of {', '.join(known)}.", code="invalid_header")
    return word
