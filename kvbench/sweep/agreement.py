"""Whether a model under an exact cache is the model: asked before its first cell, kept in each of its records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvbench.results import Record, name_of

VERSION = 1  # raised when another question is asked: what is kept of an earlier one then counts no more
VERSIONS = ("torch", "triton", "transformers")


def known(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """What records say of earlier comparisons, by their keys."""
    kept = (record.facts.get("agreement") for record in records)
    return {one["key"]: one for one in kept if isinstance(one, dict) and "key" in one}


def key_of(model: Mapping[str, Any], place: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """A hash of all that decides how a comparison ends.

    model: what identifies it. place: the device, the attention and the page size.
    """
    versions = environment.get("versions") or {}
    return name_of(
        "agreement",
        {
            "version": VERSION,
            "model": model,
            "place": place,
            "gpus": sorted({gpu["name"] for gpu in environment.get("gpus") or []}),
            "versions": {name: versions.get(name) for name in VERSIONS},
            "source": environment.get("source_sha256"),
        },
    )
