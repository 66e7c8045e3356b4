"""The models of transformers over kvbench's own cache: every scheme, and all that a task may ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from kvbench.runners.backends.base import Backend, Gift
from kvbench.runners.model_files import ComputeDtype

if TYPE_CHECKING:
    from kvbench.runners.base import LoadedModel
    from kvbench.runners.catalog import ModelSource


class Transformers(Backend):
    """See the module."""

    name = "transformers"
    gives = frozenset(get_args(Gift))

    def called(self, model: str) -> str:
        """The model's own name: it is the default."""
        return model

    def open(self, source: ModelSource, dtype: ComputeDtype, device: str) -> LoadedModel:
        """See Backend."""
        from kvbench.runners.transformers import TransformersModel

        return TransformersModel.load(source, dtype, device)


transformers = Transformers()
