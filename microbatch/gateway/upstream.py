"""The upstream's address, and where in it the paths of clients lead, those of Azure's SDKs included."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import msgspec

from microbatch.gateway.errors import GatewayError
from microbatch.transports.addresses import CHAT_COMPLETIONS

if TYPE_CHECKING:
    from aiohttp import web

API: Final = "/v1/"
AZURE: Final = "/openai/"
"""Beginnings of the paths that clients use: OpenAI's, and those of Azure OpenAI (learn.microsoft.com/azure/ai-services/openai)."""

_DEPLOYMENT: Final = re.compile(r"/openai/deployments/([^/]+)")
_AZURE_HOST: Final = re.compile(r"\.azure\.(?:com|us|cn)\Z")


class Place(msgspec.Struct, frozen=True):
    """Where a request goes.

    Attributes:
        path: Path below the upstream's address, with the query.
        api_path: The path below /v1 that it stands for, without the query.
        model: The deployment in the path, which stands for the model of requests that name none; or None.
    """

    path: str
    api_path: str
    model: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What is added to the headers of a call that goes to another path than the usual one; see `ChatCall.headers`."""
        return {} if self.path == CHAT_COMPLETIONS else {":path": self.path}


class Upstream:
    """The upstream's address.

    Args:
        address: As the operator gave it; a final `/chat/completions` is dropped, and an Azure resource means its `/openai`.

    Attributes:
        base_url: The address of the API.
    """

    def __init__(self, address: str) -> None:
        base_url: Any = address
        if isinstance(address, str):
            base_url = address.rstrip("/").removesuffix(CHAT_COMPLETIONS)
            try:
                parts = urlsplit(base_url)
                resource = not parts.path and _AZURE_HOST.search(parts.hostname or "") is not None
            except ValueError:
                resource = False  # which the transport reports
            if resource and not parts.query:
                base_url += AZURE.rstrip("/")
        self.base_url: str = base_url

    def place(self, request: web.Request) -> Place:
        """Return where *request* goes.

        Raises:
            GatewayError: Nowhere.
        """
        raw, query = request.rel_url.raw_path, request.rel_url.raw_query_string
        if raw.startswith(API):
            below, model = raw.removeprefix(API.rstrip("/")), None
            path = f"{API.rstrip('/')}{below}" if self._serves_azure else below
        elif raw.startswith(AZURE):
            path, below, model = self._azure_place(raw)
            if path == below:  # the version of Azure's paths means nothing elsewhere
                query = "&".join(pair for pair in query.split("&") if not pair.startswith("api-version="))
        else:  # the path that is checked must be the path that is sent
            raise GatewayError(404, "Spell /v1/ without percent signs.", code="not_found")
        return Place(f"{path}?{query}" if query else path, below, model)

    @property
    def _serves_azure(self) -> bool:
        return self.base_url.endswith(AZURE.rstrip("/"))

    def _azure_place(self, raw: str) -> tuple[str, str, str | None]:
        """Return the path below `base_url` for one of Azure's, the path below /v1 that it stands for, and the deployment."""
        named = _DEPLOYMENT.match(raw)
        model = None if named is None else unquote(named[1])
        below = raw.removeprefix(AZURE.rstrip("/")) if named is None else raw[named.end() :]
        below = below.removeprefix(API.rstrip("/")) if named is None else below
        own = _DEPLOYMENT.search(self.base_url)
        if own is not None and named is not None and own[1] != named[1]:
            message = "--upstream names another deployment; give the address up to /openai to serve all of them."
            raise GatewayError(404, message, code="DeploymentNotFound")
        path = raw.removeprefix(AZURE.rstrip("/")) if self._serves_azure else below
        return path, below, model


def lacks_version(address: str) -> bool:
    """Return whether *address*, of an upstream, may lack its /v1."""
    return AZURE.rstrip("/") not in address and _AZURE_HOST.search(address) is None and not re.search(r"/v\d", address)
