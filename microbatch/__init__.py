"""Request-coalescing microbatcher for LLM APIs: many callers, one combined prompt, each caller's own answer.

client          `Microbatcher`: submit, embed, map, bind, enqueue, forward, stats
blocking        `BlockingMicrobatcher`: the same for code that is not async
calibration     `calibrate`: tries sizes of batches on a sample before a job
schema, prompt  combined prompts: JSON Schema of an answer, composing, taking replies apart
batching        the engine: admission, lanes, scheduling, calls, fallback
embedding       embeddings: texts of concurrent callers in one call, vectors matched by index
transports      `OpenAIChat`, retries, rate limits, capabilities of endpoints
caching, spool  stores of answers, and of requests that no caller waits for
semantic        `SemanticCache`: answers to similar questions
spending        budgets
accounting      tokens, prices, stats, events, OpenTelemetry, Prometheus
openai          a client with the interface of OpenAI's SDK
gateway         an OpenAI-compatible server that combines requests
cli             the command `microbatch`
testing         scripted transports, a simulated endpoint, virtual time
"""

from microbatch.accounting.audits import Audited, AuditedSize
from microbatch.accounting.budget import BudgetFigures
from microbatch.accounting.events import Called, Flushed, Settled
from microbatch.accounting.otel import OpenTelemetryHooks
from microbatch.accounting.prices import Price, genai_prices
from microbatch.accounting.prometheus import PrometheusHooks
from microbatch.accounting.similar import SimilarKind
from microbatch.accounting.stats import Stats
from microbatch.audit.calibration import CalibratedSize, Calibration
from microbatch.blocking import BlockingMicrobatcher
from microbatch.caching.memory import MemoryCache
from microbatch.caching.redis import RedisCache
from microbatch.caching.sqlite import SQLiteCache
from microbatch.caching.tiers import TieredCache
from microbatch.caching.warming import Warmed
from microbatch.calibration import calibrate
from microbatch.client import Microbatcher
from microbatch.errors import (
    AuthFailed,
    BadRequest,
    BatcherClosed,
    BudgetExceeded,
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
from microbatch.messages import Embedding, Limits, Message, Reply, Request, Result, Usage
from microbatch.policy import AuditPolicy, FallbackPolicy, FlushPolicy, RetryPolicy
from microbatch.protocols import Cache, ChatCall, Completion, Embedded, EmbeddingCall, Transport
from microbatch.semantic.cache import SemanticCache
from microbatch.spending.budget import Budget
from microbatch.spool.records import Spool
from microbatch.spool.redis import RedisSpool
from microbatch.spool.sqlite import SQLiteSpool
from microbatch.transports.openai_chat import OpenAIChat
from microbatch.transports.rate_limit import RateLimit

# fmt: off
__all__ = [  # noqa: RUF022 grouped by subject
    # asking
    "BlockingMicrobatcher", "Embedding", "Message", "Microbatcher", "Reply", "Request", "Result", "Usage", "calibrate",
    # settings
    "AuditPolicy", "Budget", "FallbackPolicy", "FlushPolicy", "RateLimit", "RetryPolicy",
    # transports
    "ChatCall", "Completion", "Embedded", "EmbeddingCall", "Limits", "OpenAIChat", "Transport",
    # caches and spools
    "Cache", "MemoryCache", "RedisCache", "RedisSpool", "SQLiteCache", "SQLiteSpool", "SemanticCache", "Spool", "TieredCache", "Warmed",
    # accounting
    "Audited", "AuditedSize", "BudgetFigures", "CalibratedSize", "Calibration",
    "Called", "Flushed", "OpenTelemetryHooks", "Price", "PrometheusHooks", "Settled", "SimilarKind", "Stats", "genai_prices",
    # errors: of settings and state
    "BatcherClosed", "ConfigError", "IdConflict", "MicrobatchError", "Overloaded", "StorageError",
    # errors: of accepted requests
    "BudgetExceeded", "DeadlineExceeded", "RequestFailed", "ShutDown",
    # errors: of the call
    "AuthFailed", "BadRequest", "ConnectFailed", "ContextTooLong", "Filtered", "QuotaExhausted", "RateLimited", "ServerError",
    "StatusError", "TransportError", "TransportTimeout",
    # errors: of the reply
    "MalformedAnswer", "MissingAnswer", "Refused", "ReplyError", "TruncatedReply",
]
# fmt: on
