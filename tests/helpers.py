"""What several test files need."""

from __future__ import annotations

import microbatch as mb


def ask(text, system="Shout."):
    """Messages with a shared instruction and one text of their own."""
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def batcher_for(transport, **policy):
    """A batcher that counts bytes, so that no test waits for a token table."""
    return mb.Microbatcher(transport, policy=mb.FlushPolicy(**policy), tokens="bytes")
