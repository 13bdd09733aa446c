"""The upstream's address, and where in it the paths of clients lead, those of Azure's SDKs included."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

import msgspec

from microbatch.gateway.errors import GatewayError
from microbatch.transports.addresses import CHAT_COMPLETIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp import web

API: Final = "/v1/"
AZURE: Final = "/openai/"
"""Beginnings of the paths that clients use: OpenAI's, and those of Azure OpenAI (learn.microsoft.com/azure/ai-services/openai)."""

_DEPLOYMENT: Final = re.compile(r"/deployments/([^/]+)")
_AZURE_HOST: Final = re.compile(r"\.(?:openai|cognitiveservices|services\.ai)\.azure\.(?:com|us|cn)\Z")


class Place(msgspec.Struct, frozen=True):
    """The destination of a request.

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
        """Additions to the headers of a call: the path, if it is not the usual one of this API."""
        return {} if self.path == self.api_path else {":path": self.path}


class Upstream:
    """The upstream's address.

    Args:
        address: As the operator gave it; a final `/chat/completions` is dropped, and a resource of Azure OpenAI means its `/openai`.
        query: Parameters of every call.

    Attributes:
        base_url: The address of the API.
    """

    def __init__(self, address: str, query: Mapping[str, str] | None = None) -> None:
        self.base_url: str = address
        self._serves_azure = False  # whether clients' paths of Azure are paths of the upstream, too
        try:
            parts = urlsplit(address)
            is_azures = _AZURE_HOST.search(parts.hostname or "") is not None
        except (AttributeError, ValueError):
            return  # which the transport reports
        path = parts.path.rstrip("/").removesuffix(CHAT_COMPLETIONS)
        if is_azures and not path:
            path = AZURE[:-1]
        self.base_url = parts._replace(path=path).geturl()
        # Others have an address that ends so, too: Gemini's and DeepInfra's, and any proxy's.
        self._serves_azure = path == AZURE[:-1] and (is_azures or "api-version" in (query or {}))

    def place(self, request: web.Request) -> Place:
        """Return where *request* goes.

        Raises:
            GatewayError: No such path is served.
        """
        raw, query = request.rel_url.raw_path, request.rel_url.raw_query_string
        prefix = next((prefix for prefix in (API, AZURE) if raw.startswith(prefix)), None)
        if prefix is None:  # the path that is checked must be the path that is sent
            raise GatewayError(404, "Spell /v1/ without percent signs.", code="not_found")
        path = raw[len(prefix) - 1 :]
        named = _DEPLOYMENT.match(path)
        if named is None:
            below = path.removeprefix(API[:-1]) if path.startswith(API) else path
            if not self._serves_azure:
                path = below
            elif prefix == API:
                path = f"{API[:-1]}{below}"
            return Place(f"{path}?{query}" if query else path, below)
        below = path[named.end() :]
        if not self._serves_azure:
            self._check_deployment(named[1])
            path = below
            # The version of Azure's paths means nothing elsewhere.
            query = "&".join(pair for pair in query.split("&") if not pair.startswith("api-version="))
        return Place(f"{path}?{query}" if query else path, below, unquote(named[1]))

    def _check_deployment(self, name: str) -> None:
        own = _DEPLOYMENT.search(self.base_url)
        if own is not None and own[1] != name:
            message = "--upstream names another deployment; give the address up to /openai to serve all of them."
            raise GatewayError(404, message, code="DeploymentNotFound")


def lacks_version(address: str) -> bool:
    """Return whether *address*, of an upstream, may lack its /v1."""
    return re.search(r"/v\d|/openai\b", Upstream(address).base_url) is None
