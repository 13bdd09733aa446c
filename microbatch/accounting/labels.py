"""Names of models and tenants in labels and tables: few of them, short, and without keys."""

from __future__ import annotations

import re
from typing import Final

from microbatch.errors import mask

MOST_MODELS: Final = 64
MOST_TENANTS: Final = 64
MOST_PAIRS: Final = 256
"""Most names, and pairs of them: callers may make up both, and an endpoint may answer to any model."""

OTHER_MODELS: Final = "other models"
OTHER_TENANTS: Final = "other tenants"
NO_MODEL: Final = "none named"
NO_TENANT: Final = "none"

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST_CHARS: Final = 12
_MOST_CHARS: Final = 80


class CallerLabels:
    """The names that are labels.

    A name becomes one when a request under it has been answered, so that names which the endpoint refuses do not take the places of
    those it knows. Beyond the limits, and before that, names are counted together as other ones.
    """

    def __init__(self) -> None:
        self._models: set[str] = set()
        self._tenants: set[str] = set()
        self._pairs: set[tuple[str, str]] = set()

    def model(self, name: str | None, *, answered: bool) -> str:
        """Return the label of a model; None is the transport's own."""
        return _label(self._models, model_name(name), answered=answered, most=MOST_MODELS, other=OTHER_MODELS)

    def tenant(self, name: str | None, *, answered: bool) -> str:
        """Return the label of a tenant; None is no tenant."""
        return _label(self._tenants, tenant_name(name), answered=answered, most=MOST_TENANTS, other=OTHER_TENANTS)

    def each(self, model: str | None, tenant: str | None, *, answered: bool) -> tuple[str, str]:
        """Return the labels of a model and a tenant for figures that have one of them; None is no other name."""
        return (
            self.model(model, answered=answered) if model else NO_MODEL,
            self.tenant(tenant, answered=answered) if tenant else NO_TENANT,
        )

    def pair(self, model: str | None, tenant: str | None, *, answered: bool) -> tuple[str, str]:
        """Return the labels of a model and a tenant for figures that have both."""
        pair = self.each(model, tenant, answered=answered)
        if pair in self._pairs:
            return pair
        if len(self._pairs) >= MOST_PAIRS:
            return pair[0], OTHER_TENANTS
        self._pairs.add(pair)
        return pair


def model_name(name: str | None) -> str:
    """Return the name of a model in one line, without keys and not too long."""
    return _readable(name) if name else NO_MODEL


def tenant_name(name: str | None) -> str:
    """Return the name of a tenant in one line, without keys and not too long; of a digest its first 12 digits."""
    if not name:
        return NO_TENANT
    return name[:_DIGEST_CHARS] if _DIGEST.fullmatch(name) else _readable(name)


def _label(names: set[str], name: str, *, answered: bool, most: int, other: str) -> str:
    if name in names:
        return name
    if not answered or len(names) >= most:
        return other
    names.add(name)
    return name


def _readable(name: str) -> str:
    return " ".join(mask(name).encode(errors="replace").decode().split())[:_MOST_CHARS]
