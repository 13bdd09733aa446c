"""Counting of tokens, with tables that come with the package: nothing is downloaded."""

from __future__ import annotations

import asyncio
import lzma
import operator
import re
import threading
from importlib import resources
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Final, Literal

from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import tiktoken


# Patterns and special tokens, copied from tiktoken 0.14, tiktoken_ext/openai_public.py (MIT, OpenAI): its own functions download
# the ranks.
_TABLES: Final = {
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}

# A loaded table takes 35 to 80 MB and never changes, so all batchers of the process share it.
_loaded: dict[str, tiktoken.Encoding] = {}
_loading = threading.Lock()


def load_encoding(name: str) -> tiktoken.Encoding:
    """Return the encoding "o200k_base" or "cl100k_base", built from the packaged table at its first use in this process.

    Thread-safe. The first call blocks for up to half a second. Raise `ConfigError` if there is no such table, or it or tiktoken
    cannot be loaded; the next call tries again.
    """
    if name not in _TABLES:
        raise ConfigError(f"no token table named {name!r}; there are {', '.join(sorted(_TABLES))}")
    with _loading:
        if name not in _loaded:
            _loaded[name] = _build(name)
        return _loaded[name]


def _build(name: str) -> tiktoken.Encoding:
    pattern, special_tokens = _TABLES[name]
    try:
        import tiktoken  # noqa: PLC0415 - a compiled extension that tokens="bytes" does without

        ranks = _ranks(name)
    except (ImportError, OSError, lzma.LZMAError) as error:
        raise ConfigError(
            f'cannot load the token table {name} ({type(error).__name__}); tokens="bytes" needs none'
        ) from error
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def _ranks(name: str) -> dict[bytes, int]:
    """Read a table: for each token, in order of rank, one length byte and that many bytes."""
    packed = resources.files("microbatch.accounting").joinpath("tables", f"{name}.lp.xz").read_bytes()
    data = lzma.decompress(packed)
    ranks: dict[bytes, int] = {}
    at = 0
    while at < len(data):
        end = at + 1 + data[at]
        ranks[data[at + 1 : end]] = len(ranks)
        at = end
    return ranks


# Providers that serve OpenAI's own models. Under another publisher's name a "gpt-4o-..." may be anything.
_PROVIDERS: Final = frozenset({"openai", "azure", "azure_ai", "github", "litellm_proxy", "openrouter"})

# gpt-oss has o200k_harmony, which differs in special tokens only.
_O200K = re.compile(r"(?:gpt-4o|gpt-4\.[15]|gpt-5(?:\.\d+)?|gpt-oss|chatgpt-4o|o[134])(?:-.*)?")
_CL100K = re.compile(r"(?:gpt-4|gpt-3\.5|gpt-35-turbo|text-embedding-(?:ada-002|3-small|3-large))(?:-.*)?")


def encoding_name(model: str | None) -> tuple[str, bool]:
    """Return the name of a model's encoding, and whether it is certain; "o200k_base" for unknown models and None.

    Names may be those of fine-tuned models ("ft:gpt-4o-mini:..."), of Azure ("gpt-35-turbo"), or begin with a provider
    ("openai/gpt-4o").
    """
    *providers, name = (model or "").split("/")
    # "ft:base:organisation::id" names its base model second; "base:variant" first.
    name = name.removeprefix("ft:").partition(":")[0]
    known = all(provider in _PROVIDERS for provider in providers)
    if _CL100K.fullmatch(name):
        return "cl100k_base", known
    return "o200k_base", known and _O200K.fullmatch(name) is not None


def _utf8_length(text: str) -> int:
    # Lone surrogates have no UTF-8; "surrogatepass" counts 3 bytes each, as many as the U+FFFD that tiktoken reads in their place.
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class TokenCounter:
    """Counts the tokens of texts.

    Args:
        source: None counts with the model's table. A function takes a text and returns its tokens; it must be thread-safe. "bytes"
            counts UTF-8 bytes instead of tokens: too many by a factor of about 4, but never too few, and no table is loaded.
        model: The model whose tokens are counted; None and unknown models are counted with o200k_base.

    Attributes:
        encoding: The name of the table, or None if `source` does without.
        exact: Whether counts are those of the model's own encoding; False for a function, for "bytes" and for unknown models.

    Raises:
        ConfigError: `source` is neither None, "bytes" nor a plain function.
    """

    def __init__(self, source: Callable[[str], int] | Literal["bytes"] | None = None, model: str | None = None) -> None:
        if source is not None and source != "bytes" and (not callable(source) or iscoroutinefunction(source)):
            raise ConfigError('tokens must be None, "bytes" or a plain function from str to int')
        name, known = encoding_name(model)
        self.encoding: str | None = name if source is None else None
        self.exact: bool = source is None and known
        self._source = source
        self._table: tiktoken.Encoding | None = None

    def __repr__(self) -> str:
        """Return how tokens are counted."""
        how = self.encoding or ("bytes" if isinstance(self._source, str) else "function")
        return f"TokenCounter({how}, exact={self.exact}, loaded={self._table is not None})"

    async def open(self) -> None:
        """Load the table in a thread, unless this process has it already or none is needed.

        Part of the load, up to 0.3 s, holds the interpreter lock. It goes on if `open` is cancelled. After a `ConfigError` (see
        `load_encoding`) it can be opened again.
        """
        if self.encoding is not None and self._table is None:
            self._table = _loaded.get(self.encoding) or await asyncio.to_thread(load_encoding, self.encoding)

    def count(self, text: str) -> int:
        """Return the tokens of *text*; words that look like special tokens are counted as plain text.

        Before `open` the first call loads the table and blocks. Raise `ConfigError` if the user's function raised, or returned
        something that is no count; the message contains neither its words nor the text.
        """
        if self._source is None:
            return self._count_by_table(text)
        if isinstance(self._source, str):
            return _utf8_length(text)
        return _count_by_function(self._source, text)

    def exact_for(self, model: str | None) -> bool:
        """Return whether counts are those of *model*'s own encoding; None for the model given at construction."""
        return self.exact if model is None else encoding_name(model) == (self.encoding, True)

    def may_be_low_for(self, model: str | None) -> bool:
        """Return whether *model* may count more tokens, because it has another encoding; None for the model given at construction."""
        return self.encoding is not None and not self.exact_for(model)

    def _count_by_table(self, text: str) -> int:
        if self._table is None:
            self._table = load_encoding(self.encoding or "o200k_base")
        try:
            # Not `encode`, which refuses text that contains "<|endoftext|>".
            return len(self._table.encode_ordinary(text))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001 - Rust panics are no Exception
            # The split regex overflows its stack on a million blanks in a row and panics. The upper bound keeps every budget.
            return _utf8_length(text)


def _count_by_function(function: Callable[[str], int], text: str) -> int:
    try:
        count = function(text)
    except (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
        raise
    except BaseException as error:  # a tokenizer written in Rust panics outside Exception
        raise ConfigError(f"the `tokens` function raised {type(error).__name__}") from error
    # Whole numbers of other libraries (numpy) are accepted; True is not.
    if isinstance(count, bool) or not hasattr(count, "__index__"):
        raise ConfigError(f"the `tokens` function must return a whole number, got {type(count).__name__}")
    whole = operator.index(count)
    if whole < 0:
        raise ConfigError(f"the `tokens` function must return at least 0, got {whole}")
    return whole
