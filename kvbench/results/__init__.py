"""What a measurement is, and where it is kept. Imports no torch."""

from kvbench.results.record import (
    Metric,
    Outcome,
    Record,
    describe,
    headline,
    kernel_task,
    name_of,
    plain_json,
    shown_megabytes,
    shown_metric,
    shown_number,
)
from kvbench.results.store import Contents, NotARunError, Store, Tensors, write_samples

__all__ = [
    "Contents",
    "Metric",
    "NotARunError",
    "Outcome",
    "Record",
    "Store",
    "Tensors",
    "describe",
    "headline",
    "kernel_task",
    "name_of",
    "plain_json",
    "shown_megabytes",
    "shown_metric",
    "shown_number",
    "write_samples",
]
