"""Identifies callers, and decides what they may do: hosts, keys, tokens, tenants.

A web page cannot use the gateway through its visitor's browser: requests that pages can send without a CORS preflight carry no key
and no JSON, so requests without a key or token must be JSON; a page whose own host name is made to resolve to the gateway (DNS
rebinding) is refused by its Host header; and answers carry no CORS headers.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

import msgspec

from microbatch.errors import ConfigError
from microbatch.gateway.errors import GatewayError
from microbatch.transports.credentials import AMBIENT, credentials_in, hold_credentials, is_credential, says_who
from microbatch.transports.http import FRAMING, checked

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from aiohttp import web

    from microbatch.transports.api_key import KeyFunction


PREFIX: Final = "x-microbatch-"
"""Beginning of the headers that control the gateway, which are not relayed."""

_LANE_HEADERS: Final = frozenset({"openai-beta"})
"""Headers that are sent with combined requests, like those that identify the caller and those in the settings. Others, such as trace
ids, are not."""

_NO_KEY: Final = frozenset({"bearer", "bearer microbatch", "microbatch"})
"""Credentials that stand for none: many clients insist on a key."""

JSON: Final = "application/json"

_PRIVATE: Final = AMBIENT | {"cf-connecting-ip", "forwarded", "true-client-ip", "via", "x-client-ip", "x-real-ip"}
_MODELS: Final = re.compile(r"/models(/[\w.:@-]+)*", re.ASCII)
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Caller(msgspec.Struct, frozen=True):
    """The sender of a request.

    Attributes:
        headers: Headers that are sent upstream with a combined request, in lower case, the key in use included.
        tenant: Digest of all the caller's credentials and tenant header, None for callers without any. Requests of different tenants
            share nothing.
        own_key: Whether the gateway's key is used.
        credentials: Whether the caller gave a credential that no browser sends by itself.
        in_address: Whether a credential is in the query, so that the request can only be relayed.
    """

    headers: dict[str, str]
    tenant: str | None
    own_key: bool
    credentials: bool
    in_address: bool = False

    def __repr__(self) -> str:
        """Return the rights, without headers."""
        return f"Caller(own_key={self.own_key}, credentials={self.credentials})"


class Access:
    """Identifies callers and checks their rights. The arguments are those of `Gateway` and `GatewaySettings`.

    Attributes:
        secret: Key of the tenants' digests; set before the first request.

    Raises:
        ConfigError: Other machines could use the key, or a header cannot be a lane header.
    """

    def __init__(
        self,
        *,
        host: str,
        api_key: str | KeyFunction | None,
        access_token: str | None,
        lane_headers: Sequence[str],
        allowed_hosts: Collection[str],
        trust_tenant_header: bool,
    ) -> None:
        self.loopback: bool = is_loopback(host)
        if api_key and not access_token and not self.loopback:
            raise ConfigError(
                f"with a key of its own and on {host}, the gateway would let other machines use that key: give it an access token "
                "(--access-token-file), or listen on 127.0.0.1"
            )
        checked(dict.fromkeys(lane_headers, ""))
        self._has_own_key = bool(api_key)
        # Of a function, the transport adds the key.
        self._own_headers = {"authorization": f"Bearer {api_key}"} if api_key and not callable(api_key) else {}
        self._token = None if access_token is None else check_token(access_token)
        self._lane_headers = _LANE_HEADERS | {name.lower() for name in lane_headers}
        self._hosts = {name.lower().strip("[]") for name in (*allowed_hosts, host)} | _LOOPBACK
        self._trust_tenant_header = trust_tenant_header
        self.secret = b""

    def __repr__(self) -> str:
        """Return the rules without keys."""
        return f"Access(own_key={self._has_own_key}, token={self._token is not None}, loopback={self.loopback})"

    def replace_token(self, token: str) -> None:
        """Take *token* in place of the one given before; raise `ConfigError` if it cannot be one."""
        self._token = check_token(token)

    def check_host(self, request: web.Request) -> None:
        """Raise unless the Host header names this gateway."""
        given = request.headers.getall("Host", [])
        if len(given) == 1 and ("*" in self._hosts or self._is_ours(given[0])):
            return
        message = "The Host header does not name this gateway; --allowed-host adds names."
        raise GatewayError(421, message, code="unknown_host", close=True)

    def _is_ours(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            name, _port = parts.hostname, parts.port
        except ValueError:
            return False
        if name is None or parts.username is not None or parts.path or parts.query or parts.fragment:
            return False
        # DNS rebinding needs a name, so addresses are safe; and off loopback the gateway may have many of them.
        return name in self._hosts or (not self.loopback and _address(name) is not None)

    def caller(self, request: web.Request) -> Caller:
        """Return the sender of *request*, whose credentials are sent upstream; without any, the gateway's own key is.

        Raises:
            GatewayError: A header is repeated or cannot be sent, or the caller may not use the gateway's key.
        """
        given = self._identifying_headers(request)
        in_query = credentials_in(f"?{request.rel_url.raw_query_string}")
        if any(map(self._is_token, map(unquote, in_query.values()))):
            raise _no_key()  # it would be relayed with the rest of the address
        tokens = [name for name, value in given.items() if is_credential(name) and self._is_token(value)]
        for name in tokens:
            del given[name]
        found = {name: value for name, value in given.items() if is_credential(name)} | in_query
        withheld = {name for name in given if is_private(name) and name not in self._lane_headers}
        keys = found.keys() - withheld
        if not keys and not tokens:
            # A cookie is meant for the host that the client addresses, so it is relayed only if nothing else could be a key.
            keys = found.keys() & AMBIENT
        headers = {name: value for name, value in given.items() if name not in withheld - keys}
        tenant = self._tenant(request, "\n".join(f"{name}: {value}" for name, value in sorted(found.items())))
        if not self._has_own_key or keys:
            credentials = bool(keys - AMBIENT - in_query.keys())
            return Caller(headers, tenant, own_key=False, credentials=credentials, in_address=bool(in_query))
        if self._token is not None and not tokens:
            raise _no_key()
        # A caller of the gateway's key does not choose the organization or project that pays.
        kept = {name: value for name, value in headers.items() if name in self._lane_headers or not says_who(name)}
        return Caller({**kept, **self._own_headers}, tenant, own_key=True, credentials=False)

    def callers_pay(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request sent upstream with *headers* is paid for by its caller, not with the gateway's own key."""
        if self._own_headers and self._own_headers.items() <= headers.items():
            return False
        return hold_credentials(headers)

    def _identifying_headers(self, request: web.Request) -> dict[str, str]:
        """Return the headers that identify the caller or are lane headers, each of which may occur once."""
        found: dict[str, str] = {}
        for written in request.headers:
            name = written.lower()
            if name in FRAMING or name.startswith(PREFIX) or not (name in self._lane_headers or says_who(name)):
                continue
            values = request.headers.getall(name)
            if len(values) > 1:
                raise GatewayError(400, f"The header {name} is there more than once.", code="repeated_header")
            value = values[0].strip()
            if value and not (is_credential(name) and value.lower() in _NO_KEY):
                found[name] = value
        try:
            return checked(found)
        except ConfigError as error:
            raise GatewayError(400, str(error), code="invalid_header") from None

    def _is_token(self, value: str) -> bool:
        """Return whether a credential header's *value* is the access token, with or without "Bearer"."""
        scheme, _, rest = value.partition(" ")
        token = rest.strip() if scheme.lower() == "bearer" else value
        return self._token is not None and hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self._token)

    def _tenant(self, request: web.Request, credentials: str) -> str | None:
        tenant = request.headers.get("X-Microbatch-Tenant", "") if credentials or self._trust_tenant_header else ""
        if not credentials and not tenant:
            return None
        # Headers have no zero bytes, so different pairs never give the same text.
        text = f"{credentials}\0{tenant}".encode("utf-8", "surrogateescape")
        return hmac.digest(self.secret, text, "sha256").hex()

    def check_relayed(self, request: web.Request, path: str, caller: Caller) -> None:
        """Raise if *request* for *path*, below /v1, may not be relayed.

        It is not if *caller* uses the gateway's key, except to list models, nor if a web page could have sent the body without a
        preflight and there are no credentials.
        """
        if caller.own_key and not (request.method == "GET" and _MODELS.fullmatch(path)):
            raise GatewayError(
                403,
                "With the gateway's key, only POST /v1/chat/completions, POST /v1/embeddings and GET /v1/models are served; send your "
                "own key.",
                code="own_key_only",
            )
        if request.method == "POST" and not caller.credentials and request.content_type != JSON:
            raise not_json()

    def check_page(self, request: web.Request) -> None:
        """Raise if the gateway is open to other machines, and the request for one of its own pages has no access token."""
        if self.loopback:
            return
        if self._token is None:
            message = "Off loopback this needs an access token (--access-token-file)."
            raise GatewayError(403, message, code="no_access_token")
        if not self._is_token(_without_basic(request.headers.get("Authorization", ""))):
            raise GatewayError(
                401,
                "Give the gateway's access token as the Authorization bearer, or as the password to a browser that asks for one.",
                code="wrong_access_token",
                headers={"WWW-Authenticate": 'Basic realm="microbatch", charset="UTF-8"'},
            )


def check_token(token: str) -> bytes:
    """Return *token* as it is compared; raise `ConfigError` if it cannot be one."""
    if not token.isascii() or not token.isprintable() or not token.strip():
        raise ConfigError("the access token must be one line of printable ASCII")
    return token.strip().encode()


def _no_key() -> GatewayError:
    message = "Give your API key, or the gateway's access token, as the Authorization bearer."
    return GatewayError(401, message, code="no_key")


def _without_basic(authorization: str) -> str:
    """Return the password of Basic authorization, which is all that a browser can send for a page, or the header unchanged."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        decoded = base64.b64decode(credentials, validate=True).decode()
    except ValueError:
        return ""
    return f"Bearer {decoded.partition(':')[2]}"


def is_private(name: str) -> bool:
    """Return whether the header *name*, in lower case, is about the client and its route, and is therefore not relayed."""
    return name in _PRIVATE or name.startswith("x-forwarded-")


def not_json() -> GatewayError:
    """Return the error for a body that has to be JSON."""
    return GatewayError(415, f"The Content-Type must be {JSON}.", code="unsupported_media_type")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that listens on *host*."""
    address = _address(host.strip("[]"))
    return host.lower() == "localhost" if address is None else address.is_loopback
