"""What a backend is: something that opens a model and puts it under schemes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kvbench.runners.model_files import ComputeDtype
from kvbench.schemes import Scheme

if TYPE_CHECKING:
    from kvbench.runners.base import LoadedModel
    from kvbench.runners.catalog import ModelSource

# agreement: an exact cache is held against transformers. clock: tokens and seconds of prefill and of decoding, and the
# memory that they take. hidden states: of which whole distributions are made. noise: of one ulp in what a model reads.
# zeroed cache: the canary's.
Gift = Literal["agreement", "clock", "hidden states", "noise", "zeroed cache"]


@dataclass(frozen=True)
class Asked:
    """What a cell asks of a model's runner. device: "cpu", or a GPU's name. generation: see ModelFacts."""

    scheme: Scheme
    compute_dtype: ComputeDtype
    device: str = "cpu"
    scoring: str = "fused"
    attention: str = "auto"
    generation: Mapping[str, Any] = field(default_factory=dict)


class Backend:
    """What opens a model and puts it under schemes.

    name: as a YAML has it. gives: what its runners can do that not every one can. kept: of a model's positions, those
    that it keeps for itself.
    """

    name: str
    gives: frozenset[Gift]
    kept = 0

    def called(self, model: str) -> str:
        """What tables call a model that runs on it."""
        return f"{model} ({self.name})"

    def missing(self) -> str:
        """What to install to have it here; empty where it is."""
        return ""

    def refuses(self, asked: Asked) -> str:
        """Why it can't do this; empty where it can."""
        return ""

    def open(self, source: ModelSource, dtype: ComputeDtype, device: str) -> LoadedModel:
        """The model, loaded.

        Raises:
            ValueError: it can't be.
        """
        raise NotImplementedError
