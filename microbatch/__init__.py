"""Request-coalescing microbatcher for LLM APIs: many callers, one combined prompt, each caller's own answer."""

from microbatch.accounting.events import Called, Flushed, Settled
from microbatch.accounting.genai_prices import genai_prices
from microbatch.accounting.otel import OpenTelemetryHooks
from microbatch.accounting.prices import Price
from microbatch.accounting.prometheus import PrometheusHooks
from microbatch.accounting.stats import Stats
from microbatch.caching.memory import MemoryCache
from microbatch.caching.redis import RedisCache
from microbatch.caching.sqlite import SQLiteCache
from microbatch.caching.tiers import TieredCache
from microbatch.caching.warming import Warmed
from microbatch.client import Microbatcher
from microbatch.errors import (
    AuthFailed,
    BadRequest,
    BatcherClosed,
    ConfigError,
    ConnectFailed,
    ContextTooLong,
    DeadlineExceeded,
    Filtered,
    IdConflict,
    MalformedAnswer,
    MicrobatchError,
    MissingAnswer,
    Overloaded,
    QuotaExhausted,
    RateLimited,
    Refused,
    ReplyError,
    RequestFailed,
    ServerError,
    ShutDown,
    StatusError,
    StorageError,
    TransportError,
    TransportTimeout,
    TruncatedReply,
)
from microbatch.messages import Limits, Message, Reply, Request, Result, Usage
from microbatch.policy import FallbackPolicy, FlushPolicy, RetryPolicy
from microbatch.protocols import Cache, ChatCall, Completion, Transport
from microbatch.spool.records import Spool
from microbatch.spool.redis import RedisSpool
from microbatch.spool.sqlite import SQLiteSpool
from microbatch.transports.openai_chat import OpenAIChat
from microbatch.transports.rate_limit import RateLimit

__all__ = [
    "AuthFailed",
    "BadRequest",
    "BatcherClosed",
    "Cache",
    "Called",
    "ChatCall",
    "Completion",
    "ConfigError",
    "ConnectFailed",
    "ContextTooLong",
    "DeadlineExceeded",
    "FallbackPolicy",
    "Filtered",
    "FlushPolicy",
    "Flushed",
    "IdConflict",
    "Limits",
    "MalformedAnswer",
    "MemoryCache",
    "Message",
    "MicrobatchError",
    "Microbatcher",
    "MissingAnswer",
    "OpenAIChat",
    "OpenTelemetryHooks",
    "Overloaded",
    "Price",
    "PrometheusHooks",
    "QuotaExhausted",
    "RateLimit",
    "RateLimited",
    "RedisCache",
    "RedisSpool",
    "Refused",
    "Reply",
    "ReplyError",
    "Request",
    "RequestFailed",
    "Result",
    "RetryPolicy",
    "SQLiteCache",
    "SQLiteSpool",
    "ServerError",
    "Settled",
    "ShutDown",
    "Spool",
    "Stats",
    "StatusError",
    "StorageError",
    "TieredCache",
    "Transport",
    "TransportError",
    "TransportTimeout",
    "TruncatedReply",
    "Usage",
    "Warmed",
    "genai_prices",
]
