"""Under which key an answer is kept: a digest of everything that was asked."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.errors import ConfigError
from microbatch.messages import Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.batching.request import Options
    from microbatch.messages import Messages

FORMAT: Final = 1
"""Version of what goes into a key. Whatever changes in it makes all earlier answers misses."""

_DIGEST_BYTES: Final = 20  # 160 bits, so that no two requests ever share one by chance

_encode = msgspec.json.Encoder(order="sorted").encode


class Keys:
    """Makes keys.

    Requests that differ in anything have different keys: endpoint, model, any parameter, the caller's headers, the answer's schema,
    tenant, any message, exactly as written. What two requests with the same key may differ in is the Python type of the answer
    and their priority.

    Args:
        secret: Keys the digest, so that whoever can read a store cannot test guesses of what was asked.
        endpoint: Address of the endpoint.
        model: Its model when a request names none.
        normalize: Makes texts equal that are to share an answer, or None. It gets the text of the last message.

    Attributes:
        secret: As given.
    """

    def __init__(
        self, secret: bytes, *, endpoint: str, model: str | None, normalize: Callable[[str], str] | None = None
    ) -> None:
        self.secret = secret
        self._endpoint = endpoint
        self._model = model
        self._normalize = normalize

    def of(self, messages: Messages, options: Options) -> bytes:
        """Return the key of a request.

        Raises:
            ConfigError: The messages are no JSON, or `normalize` failed.
        """
        answer, model, *rest = options.content
        told = messages if self._normalize is None else self._normalized(messages)
        try:
            whole = _encode([FORMAT, self._endpoint, model or self._model, answer, rest, told])
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"messages must be JSON values: {error}") from error
        return hashlib.blake2b(whole, digest_size=_DIGEST_BYTES, key=self.secret).digest()

    def _normalized(self, messages: Messages) -> list[Any]:
        last: Any = messages[-1] if messages else None
        content = last.content if isinstance(last, Message) else last.get("content") if isinstance(last, dict) else None
        if not isinstance(content, str) or self._normalize is None:
            return list(messages)
        try:
            text = self._normalize(content)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic is no Exception
            raise ConfigError(f"normalize raised {type(error).__name__}") from error
        if not isinstance(text, str):
            raise ConfigError(f"normalize must return a string, got {type(text).__name__}")
        return [*messages[:-1], msgspec.to_builtins(last) | {"content": text}]
