"""How fast the kernels are, and whether they are right: the engine of `kvbench kernel`."""

from kvbench.timing.grid import Timings, run
from kvbench.timing.record import as_record
from kvbench.timing.request import KernelRequest, Shape, load_requests, parse_grid, shape_of_model
from kvbench.timing.table import document

__all__ = [
    "KernelRequest",
    "Shape",
    "Timings",
    "as_record",
    "document",
    "load_requests",
    "parse_grid",
    "run",
    "shape_of_model",
]
