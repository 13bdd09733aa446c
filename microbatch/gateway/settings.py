"""The settings of the gateway that have nothing to do with batching."""

from __future__ import annotations

from dataclasses import dataclass

from microbatch.errors import ConfigError
from microbatch.policy import at_least, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """What the gateway grants its clients.

    Args:
        max_body_bytes: Longest body of a request, in bytes.
        max_requests: Most requests that are served at once; further ones are refused with status 503.
        client_timeout: Longest a client may take to send a body, or to take what is sent to it, in seconds.
        request_timeout: Longest a chat completion may take, waiting for company and retries included, in seconds. None sets no
            limit but the upstream's.
        upstream_timeout: Longest one call to the upstream may take, in seconds; a call that takes longer is made again, up to
            three times, unless it was relayed.
        idle_timeout: Longest the upstream may be silent within a streamed answer, in seconds. Before its first words only the time of
            the whole call counts, since a model that reasons may say nothing for minutes.
        exact_usage: Whether an answer waits until the endpoint has reported what its call used. Without, the usage may be an
            estimate; it is then marked `microbatch_estimated`.
        trust_tenant_header: Whether `X-Microbatch-Tenant` counts even without credentials of the caller's own.

    Raises:
        ConfigError: A limit is below its minimum.
    """

    max_body_bytes: int = 32 * 1024 * 1024
    max_requests: int = 4_096
    client_timeout: float = 60.0
    request_timeout: float | None = None
    upstream_timeout: float = 600.0
    idle_timeout: float = 60.0
    exact_usage: bool = False
    trust_tenant_header: bool = False

    def __post_init__(self) -> None:
        whole(1, max_body_bytes=self.max_body_bytes, max_requests=self.max_requests)
        at_least(0.001, client_timeout=self.client_timeout, request_timeout=self.request_timeout)
        for name in ("upstream_timeout", "idle_timeout"):
            limit = getattr(self, name)
            if limit is None:
                raise ConfigError(f"{name} must be a number of seconds; there is always a limit")
            at_least(0.001, **{name: limit})
        for name in ("exact_usage", "trust_tenant_header"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
