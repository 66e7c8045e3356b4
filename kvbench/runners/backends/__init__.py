"""Every backend. The folder is walked: a new backend is one new file, listed nowhere. Imports nothing heavy."""

from __future__ import annotations

from functools import cache

from kvbench.registry import walk
from kvbench.runners.backends.base import Asked, Backend, Gift

__all__ = ["DEFAULT", "Asked", "Backend", "Gift", "all_backends"]

DEFAULT = "transformers"


@cache
def all_backends() -> dict[str, Backend]:
    """Every backend by name, the default first."""
    found = sorted(walk(__name__, __path__, Backend), key=lambda backend: (backend.name != DEFAULT, backend.name))
    return {backend.name: backend for backend in found}
