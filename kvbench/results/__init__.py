"""What a measurement is, and where it is kept. Imports no torch."""

from kvbench.results.metrics import (
    LM_EVAL,
    Kind,
    Metric,
    exponential,
    headline,
    of_lm_eval,
    shown_megabytes,
    shown_metric,
    shown_number,
    upgrade,
)
from kvbench.results.record import (
    Outcome,
    Record,
    describe,
    dtype_label,
    kernel_task,
    name_of,
    plain_json,
)
from kvbench.results.store import DEFAULT_FOLDER, Contents, NotARunError, Store, Tensors, write_samples

__all__ = [
    "DEFAULT_FOLDER",
    "LM_EVAL",
    "Contents",
    "Kind",
    "Metric",
    "NotARunError",
    "Outcome",
    "Record",
    "Store",
    "Tensors",
    "describe",
    "dtype_label",
    "exponential",
    "headline",
    "kernel_task",
    "name_of",
    "of_lm_eval",
    "plain_json",
    "shown_megabytes",
    "shown_metric",
    "shown_number",
    "upgrade",
    "write_samples",
]
