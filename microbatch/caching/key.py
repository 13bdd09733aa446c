"""The key of a cached answer: a digest of everything that was asked."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from microbatch.caching.question import asked_fields, asked_headers
from microbatch.containment import contained
from microbatch.errors import ConfigError
from microbatch.messages import Message
from microbatch.prompt.message_forms import encoded, known

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.batching.request import Options
    from microbatch.embedding.request import EmbeddingOptions
    from microbatch.messages import Messages

FORMAT: Final = 1  # version of the digested content, any change of which makes all earlier entries misses
SECRET_BYTES: Final = 32
_DIGEST_BYTES: Final = 20  # 160 bits: no accidental collisions
_TENANT_BYTES: Final = 16

_encode = msgspec.json.Encoder(order="sorted", enc_hook=known).encode


class Keys:
    """Computes keys.

    Requests that differ in endpoint, model, a parameter, the caller's headers, the answer's schema, tenant or any message have
    different keys. Requests that differ only in the Python type of the answer, in priority, or in what `microbatch.caching.question`
    leaves out share one.

    Args:
        secret: Keys the digest, so that a reader of the store cannot test guesses of what was asked.
        endpoint: Address of the endpoint.
        model: Its model when a request names none.
        normalize: Applied to the text of the last message, so that equivalent texts share an answer; or None.
    """

    def __init__(
        self, secret: bytes, *, endpoint: str, model: str | None, normalize: Callable[[str], str] | None = None
    ) -> None:
        self.secret = secret
        self._endpoint = endpoint
        self._model = model
        self._normalize = normalize

    def of(self, asked: Messages | bytes, options: Options | EmbeddingOptions) -> bytes:
        """Return the key of a request: of messages, or of a text to embed as its line.

        Raises:
            ConfigError: The messages are not JSON values, or `normalize` failed.
        """
        if isinstance(asked, bytes):
            return self._of_text(asked, cast("EmbeddingOptions", options))
        keyed = asked if self._normalize is None else self._normalized(asked, self._normalize)
        return self._of_messages(keyed, cast("Options", options))

    def _of_text(self, line: bytes, options: EmbeddingOptions) -> bytes:
        _, model, dimensions, fields, headers, tenant = options.content
        if fields:
            asked = asked_fields(options.params)
            fields = encoded(asked, "params", ordered=True) if asked else b""
        rest = (dimensions, fields, asked_headers(headers), tenant)
        content = b"%s\n%s" % (_encode([FORMAT, self._endpoint, model, rest]), line)  # neither holds a line break
        return hashlib.blake2b(content, digest_size=_DIGEST_BYTES, key=self.secret, person=b"embedding").digest()

    def without_last_text(self, messages: Messages, options: Options) -> bytes:
        """Return a digest of all of a request but its last text; that of no request is the same. For errors see `of`."""
        return self._of_messages(_with_last_text(messages, ""), options, person=b"partition")

    def _of_messages(self, messages: Messages, options: Options, person: bytes = b"") -> bytes:
        answer, model, max_tokens, fields, headers, tenant = options.content
        if fields:
            asked = asked_fields(options.params)
            fields = encoded(asked, "params", ordered=True) if asked else b""
        rest = (max_tokens, fields, asked_headers(headers), tenant)
        try:
            content = _encode([FORMAT, self._endpoint, model or self._model, answer, rest, messages])
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"messages must be JSON values: {error}") from error
        return hashlib.blake2b(content, digest_size=_DIGEST_BYTES, key=self.secret, person=person).digest()

    def tenant_digest(self, tenant: str | None) -> bytes | None:
        """Return a digest of *tenant*, under which its entries are found again; None for none."""
        return None if tenant is None else tenant_digest(tenant, self.secret)

    def masked(self, key: bytes, digest: bytes) -> bytes:
        """Return *digest* in a form that only those who know the secret can read; of that form, the digest itself.

        The digest of a kind of lane has no key. Beside an answer it would let a reader of the store test guesses of the instructions.
        Each *key* of an entry has a mask of its own, so entries do not tell either which of them are of one kind.
        """
        mask = hashlib.blake2b(key, digest_size=len(digest), key=self.secret, person=b"lane kind").digest()
        return bytes(one ^ other for one, other in zip(digest, mask, strict=True))

    @staticmethod
    def _normalized(messages: Messages, normalize: Callable[[str], str]) -> list[Any]:
        content = last_text(messages)
        if content is None:
            return list(messages)
        with contained() as normalizing:
            text = normalize(content)
        if normalizing.error is not None:
            raise ConfigError(f"normalize raised {type(normalizing.error).__name__}") from normalizing.error
        if not isinstance(text, str):
            raise ConfigError(f"normalize must return a string, got {type(text).__name__}")
        return _with_last_text(messages, text)


def last_text(messages: Messages) -> str | None:
    """Return the text of the last message; None if it is none."""
    last: Any = messages[-1] if messages else None
    content = last.content if isinstance(last, Message) else last.get("content") if isinstance(last, dict) else None
    return content if isinstance(content, str) else None


def _with_last_text(messages: Messages, text: str) -> list[Any]:
    """Return *messages*, the last of which has a text, with another *text*."""
    return [*messages[:-1], msgspec.to_builtins(messages[-1]) | {"content": text}]


def tenant_digest(tenant: str, secret: bytes) -> bytes:
    """Return the digest of *tenant* in entries that are keyed with *secret*."""
    name = tenant.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(name, digest_size=_TENANT_BYTES, key=secret, person=b"tenant").digest()
