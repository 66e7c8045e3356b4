"""Transformers models whose attention reads and writes our paged cache.

From the bottom: `prefix` finds what requests share, `schedule` says which tokens come next, `memory` holds pages,
`forward` computes one pass over a flat batch, `passes` puts one together, `scoring` and `generation` ask for them.
"""

from kvbench.runners.transformers.engine import Attention, TransformersModel, TransformersRunner
from kvbench.runners.transformers.forward import observed
from kvbench.runners.transformers.memory import Limits
from kvbench.runners.transformers.passes import Scoring

__all__ = ["Attention", "Limits", "Scoring", "TransformersModel", "TransformersRunner", "observed"]
