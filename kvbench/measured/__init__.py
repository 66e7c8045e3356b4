"""What was measured, as a paired test needs it: of each cell's metrics a number a document. Imports no torch."""

from kvbench.measured.baseline_file import write
from kvbench.measured.cells import Cell, Measured, comparable, key_of, of_records, prompt_forms, unrun_line
from kvbench.measured.read import read
from kvbench.measured.series import NoSeriesError, Series, paired, series_of

__all__ = [
    "Cell",
    "Measured",
    "NoSeriesError",
    "Series",
    "comparable",
    "key_of",
    "of_records",
    "paired",
    "prompt_forms",
    "read",
    "series_of",
    "unrun_line",
    "write",
]
