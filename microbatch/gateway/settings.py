"""The settings of the gateway that do not concern batching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from microbatch.checking import Count, Positive, check_fields

Streams = Literal["auto", "combine", "relay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Limits for clients of the gateway.

    Args:
        max_body_bytes: Longest request body, in bytes.
        max_requests: Most requests served at once; further ones get status 503.
        client_timeout: Longest time a client may take to send a body, or to read a piece of an answer, in seconds.
        request_timeout: Longest time a chat completion or embeddings may take, waiting for a batch and retries included, in seconds.
            With None only `upstream_timeout` limits it, as it does one that is relayed.
        upstream_timeout: Longest time one call to the upstream may take, in seconds. A call that takes longer is retried up to three
            times, unless it was relayed.
        idle_timeout: Longest silence of the upstream within a streamed answer, in seconds. Before the first words only
            `upstream_timeout` counts, since a model that reasons may be silent for minutes.
        exact_usage: Whether an answer waits until the endpoint has reported its usage. Otherwise the usage may be an estimate, marked
            `microbatch_estimated`.
        streams: What a streamed request that could be combined gets: "auto" combines it if it has company, and hands on the endpoint's
            own events as they arrive if it goes alone; "combine" sends its text when it is complete; "relay" never combines it.
        trust_tenant_header: Whether `X-Microbatch-Tenant` is respected without credentials of the caller's own.

    Raises:
        ConfigError: A limit is below its minimum.
    """

    max_body_bytes: Count = 32 * 1024 * 1024
    max_requests: Count = 4_096
    client_timeout: Positive = 60.0
    request_timeout: Positive | None = None
    upstream_timeout: Positive = 600.0
    idle_timeout: Positive = 60.0
    exact_usage: bool = False
    trust_tenant_header: bool = False
    streams: Streams = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
