"""Who asks, and what they may: hosts, keys, tokens, tenants.

No web page can use a gateway through the browser of somebody near it. What a page can send without asking first carries no key and
is no JSON, so where a request needs neither a key nor a token it has to be JSON; a page that has its own name resolve to the gateway
is betrayed by that name, so it must be one of the gateway's; and answers carry no CORS header, so that no page can read them.
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
from microbatch.gateway.control_headers import PREFIX
from microbatch.gateway.errors import Refusal
from microbatch.transports.credentials import AMBIENT, credentials_in, is_credential, says_who
from microbatch.transports.http import FRAMING, checked

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from aiohttp import web

TENANT_HEADER: Final = "X-Microbatch-Tenant"
_LANE: Final = frozenset({"openai-beta"})
"""Headers that become part of what requests must share, beside those that say who asks and those that the settings name; all others,
trace ids for one, are the client's own business."""

_NO_KEY: Final = frozenset({"bearer", "bearer microbatch", "microbatch"})
"""What clients without a key send; many insist on some key, and "microbatch" stands for none."""

_PRIVATE: Final = AMBIENT | {
    "cf-connecting-ip",
    "forwarded",
    "true-client-ip",
    "via",
    "x-client-ip",
    "x-real-ip",
}
"""Headers about the client and the way here, which are none of the upstream's business."""

_MODELS: Final = re.compile(r"/models(/[\w.:@-]+)*", re.ASCII)
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Caller(msgspec.Struct, frozen=True):
    """Whoever sent a request.

    Attributes:
        headers: The headers that go upstream with a combined request, in lower case; the key in use included.
        tenant: A digest of every credential they gave and of their tenant header: requests with another share nothing with theirs.
            None for all callers who gave none.
        own_key: They use the gateway's key.
        credentials: They gave a credential that no browser sends unasked.
        in_address: A credential is in the query, so that only relaying carries it.
    """

    headers: dict[str, str]
    tenant: str | None
    own_key: bool
    credentials: bool
    in_address: bool = False

    def __repr__(self) -> str:
        """Tell the rights, never a header."""
        return f"Caller(own_key={self.own_key}, credentials={self.credentials})"


class Access:
    """Decides who a caller is and what they may.

    Args:
        host: The address that the gateway listens on.
        api_key: The key for callers who bring none; None for no such key.
        access_token: What those who use that key have to present, or None.
        lane_headers: Further headers that go with combined requests.
        allowed_hosts: Further names under which the gateway may be addressed; "*" allows any.
        trust_tenant_header: See `GatewaySettings`.

    Attributes:
        secret: Keys the digests that name tenants; set before the first request.

    Raises:
        ConfigError: Others could use the key, or a header cannot be among the lane headers.
    """

    def __init__(
        self,
        *,
        host: str,
        api_key: str | None,
        access_token: str | None,
        lane_headers: Sequence[str],
        allowed_hosts: Collection[str],
        trust_tenant_header: bool,
    ) -> None:
        self.loopback = _is_loopback(host)
        if api_key and not access_token and not self.loopback:
            raise ConfigError(
                f"with a key of its own and on {host}, the gateway would let everybody use that key: give it an access token "
                "(--access-token-file), or listen on 127.0.0.1"
            )
        if access_token is not None and (
            not access_token.isascii() or not access_token.isprintable() or not access_token.strip()
        ):
            raise ConfigError("the access token must be one line of printable ASCII")
        checked(dict.fromkeys(lane_headers, ""), reserved=FRAMING)
        self._own = f"Bearer {api_key}" if api_key else None
        self._token = access_token.strip().encode() if access_token else None
        self._lane = _LANE | {name.lower() for name in lane_headers}
        self._names = {name.lower().strip("[]") for name in (*allowed_hosts, host)} | _LOOPBACK
        self._trusting = trust_tenant_header
        self.secret = b""

    def __repr__(self) -> str:
        """Tell the rules, never a key."""
        return f"Access(own_key={self._own is not None}, token={self._token is not None}, loopback={self.loopback})"

    def check_host(self, request: web.Request) -> None:
        """Check that the client meant this gateway.

        Raises:
            Refusal: The Host header names another.
        """
        given = request.headers.getall("Host", [])
        if len(given) == 1 and ("*" in self._names or self._is_ours(given[0])):
            return
        raise Refusal(
            421,
            "The Host header does not name this gateway; --allowed-host adds names.",
            code="unknown_host",
            close=True,
        )

    def _is_ours(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            name, _port = parts.hostname, parts.port
        except ValueError:
            return False
        if name is None or parts.username is not None or parts.path or parts.query or parts.fragment:
            return False
        # A page's own name can be made to lead here, an address cannot; and off loopback the gateway may have many addresses.
        return name in self._names or (not self.loopback and _address(name) is not None)

    def caller(self, request: web.Request) -> Caller:
        """Return who sent *request*.

        A credential of the caller's goes upstream, and the gateway's own key does so only where there is none.

        Raises:
            Refusal: A header is repeated or cannot be passed on, or the caller has no right to the gateway's key.
        """
        given = self._given(request)
        in_query = credentials_in(f"?{request.rel_url.raw_query_string}")
        if any(map(self._is_token, map(unquote, in_query.values()))):
            raise self._no_key()  # it would be relayed with the rest of the address
        tokens = [name for name, value in given.items() if is_credential(name) and self._is_token(value)]
        for name in tokens:
            del given[name]
        found = {name: value for name, value in given.items() if is_credential(name)} | in_query
        held = {name for name in given if is_private(name) and name not in self._lane}
        keys = found.keys() - held
        if not keys and not tokens:
            # A cookie is for the host that the client talks to, so it goes further only where it is all that could be a key.
            keys = found.keys() & AMBIENT
        headers = {name: value for name, value in given.items() if name not in held - keys}
        told = "\n".join(f"{name}: {value}" for name, value in sorted(found.items()))
        tenant = self._tenant(request, told)
        if self._own is None or keys:
            own = bool(keys - AMBIENT - in_query.keys())
            return Caller(headers, tenant, own_key=False, credentials=own, in_address=bool(in_query))
        if self._token is not None and not tokens:
            raise self._no_key()
        # With the gateway's key, who pays for it is not the caller's choice.
        kept = {name: value for name, value in headers.items() if name in self._lane or not says_who(name)}
        return Caller({**kept, "authorization": self._own}, tenant, own_key=True, credentials=False)

    def _no_key(self) -> Refusal:
        return Refusal(
            401, "Give your API key, or the gateway's access token, as the Authorization bearer.", code="no_key"
        )

    def _given(self, request: web.Request) -> dict[str, str]:
        """Return the headers that say who asks or that the settings name, each of which may be there once."""
        found: dict[str, str] = {}
        for written in request.headers:
            name = written.lower()
            if name in FRAMING or name.startswith(PREFIX) or not (name in self._lane or says_who(name)):
                continue
            values = request.headers.getall(name)
            if len(values) > 1:
                raise Refusal(400, f"The header {name} is there more than once.", code="repeated_header")
            value = values[0].strip()
            if value and not (is_credential(name) and value.lower() in _NO_KEY):
                found[name] = value
        try:
            return checked(found)
        except ConfigError as error:
            raise Refusal(400, str(error), code="invalid_header") from None

    def _is_token(self, value: str) -> bool:
        """Return whether *value*, of a header that holds a credential, is the access token, bare or as a bearer."""
        scheme, _, token = value.partition(" ")
        told = token.strip() if scheme.lower() == "bearer" else value
        return self._token is not None and hmac.compare_digest(told.encode("utf-8", "surrogateescape"), self._token)

    def _tenant(self, request: web.Request, keys: str) -> str | None:
        """Return the name of the caller's trust domain: that of the credentials, subdivided by the tenant header."""
        part = request.headers.get(TENANT_HEADER, "") if keys or self._trusting else ""
        if not keys and not part:
            return None
        # No header has a zero byte, so two different pairs never make the same text.
        told = f"{keys}\0{part}".encode("utf-8", "surrogateescape")
        return hmac.digest(self.secret, told, "sha256").hex()

    def check_content(self, request: web.Request, caller: Caller) -> None:
        """Check that a body is not one that a web page could have sent on its own.

        Raises:
            Refusal: It could, and nothing else shows that the caller is none.
        """
        if request.method == "POST" and not caller.credentials and request.content_type != "application/json":
            raise not_json()

    def check_path(self, method: str, path: str, caller: Caller) -> None:
        """Check that *path*, below /v1, may be relayed for *caller*.

        Raises:
            Refusal: It is not open to those who use the gateway's key.
        """
        if caller.own_key and not (method == "GET" and _MODELS.fullmatch(path)):
            raise Refusal(
                403,
                "With the gateway's key, only POST /v1/chat/completions and GET /v1/models are served; send your own key.",
                code="own_key_only",
            )

    def check_page(self, request: web.Request) -> None:
        """Check that whoever sent *request* may look at the gateway itself.

        Raises:
            Refusal: They need the access token, since the gateway is open to other machines.
        """
        if self.loopback:
            return
        if self._token is None:
            raise Refusal(403, "Off loopback this needs an access token (--access-token-file).", code="no_access_token")
        sent = request.headers.get("Authorization", "")
        if not self._is_token(_as_bearer(sent)):
            raise Refusal(
                401,
                "Give the gateway's access token as the Authorization bearer, or as the password to a browser that asks for one.",
                code="wrong_access_token",
                headers={"WWW-Authenticate": 'Basic realm="microbatch", charset="UTF-8"'},
            )


def _as_bearer(authorization: str) -> str:
    """Return the password that a browser sends as if it were a bearer; it cannot send one of its own when it opens a page."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        decoded = base64.b64decode(credentials, validate=True).decode()
    except ValueError:
        return ""
    return f"Bearer {decoded.partition(':')[2]}"


def is_private(name: str) -> bool:
    """Return whether the header *name*, in lower case, is about the client and the way here, so that it goes no further."""
    return name in _PRIVATE or name.startswith("x-forwarded-")


def not_json() -> Refusal:
    """Return the refusal of a body that should have been JSON."""
    return Refusal(415, "The Content-Type must be application/json.", code="unsupported_media_type")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _address(host.strip("[]"))
    return host.lower() == "localhost" if address is None else address.is_loopback
