"""Real servers that several integration tests share."""

from redis_server import durable_redis, own_redis, redis_server, redis_url, shared_redis  # noqa: F401 fixtures
