"""Id endings and canary words: unguessable, and the same for the same batch.

They are a keyed hash of the batch, so that a batch that is asked again gets the same prompt, byte for byte: at temperature 0 other ids
alone change some answers. The text of an item is part of what is hashed, so that without the key no text can hold the ids of its own
batch. Whoever knows the key can search for such a text.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import TYPE_CHECKING, Final

from microbatch.errors import ConfigError
from microbatch.prompt.compose import ALPHABET

if TYPE_CHECKING:
    from collections.abc import Callable

_PROCESS_SECRET: Final = secrets.token_bytes(32)

# The letter for each byte of a hash. Surplus bytes are dropped, or some letters would be more frequent than others.
_LETTERS: Final = bytes(ord(ALPHABET[byte % len(ALPHABET)]) for byte in range(256))
_SURPLUS: Final = bytes(range(256 - 256 % len(ALPHABET), 256))

_endings = re.compile(".{5}").findall


class IdKey:
    """The key of a batcher's ids.

    Args:
        secret: What the key is made of; None for random bytes of this process.

    Raises:
        ConfigError: The secret is empty.
    """

    def __init__(self, secret: bytes | str | None = None) -> None:
        if secret is None:
            secret = _PROCESS_SECRET
        elif not secret:
            raise ConfigError("id_secret must not be empty; None takes random bytes")
        raw = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
        self._keyed = hashlib.blake2b(key=hashlib.blake2b(raw).digest())

    def draws(self, batch: bytes) -> Callable[[int], list[str]]:
        """Return a function that returns as many five-letter endings as it is asked for, others at each call.

        Its results depend on the key, on *batch*, which stands for all of a combined call, and on which call it is.
        """
        hashed = self._keyed.copy()
        hashed.update(batch)
        seed, calls = hashed.digest(), 0

        def draw(count: int) -> list[str]:
            nonlocal calls
            calls += 1
            stream, size, letters = hashlib.shake_256(seed + calls.to_bytes(4)), 0, b""
            while len(letters) < 5 * count:
                size += 6 * count + 8  # nearly always enough at once
                letters = stream.digest(size).translate(_LETTERS, _SURPLUS)
            return _endings(letters.decode(), 0, 5 * count)

        return draw
