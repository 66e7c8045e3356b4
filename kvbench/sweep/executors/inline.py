"""Cells one after another in this process."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial

from kvbench.environment import device_name
from kvbench.sweep.executors.base import gpus_here
from kvbench.sweep.job import Job, Tell
from kvbench.sweep.plan import Cell, too_large
from kvbench.sweep.session import Bench
from kvbench.sweep.spec import ModelSpec
from kvbench.sweep.stopping import UnusableError, raise_if_stopped


class Inline:
    """On the first GPU ("cuda"), or on the CPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    @property
    def device_name(self) -> str:
        """See Executor."""
        return device_name([self.device])

    def gpus(self, spec: ModelSpec) -> int:
        """See Executor."""
        return gpus_here(self.device, spec)

    def missing(self, cells: Sequence[Cell]) -> list[str]:
        """See Executor."""
        return too_large(cells, self.device)

    def run(self, cells: Sequence[Cell], job: Job, tell: Tell) -> None:
        """See Executor. A GPU that fails every further call ends it, since its memory is free with this process."""
        bench = Bench(job, partial(tell, 0))
        try:
            for cell in cells:
                finished = bench.run(cell)
                tell(0, finished)
                if finished.broken:
                    raise UnusableError(
                        f"the GPU fails every call since {finished.record.error}; the same command goes on in another "
                        "process, and --executor process does by itself"
                    )
                raise_if_stopped()
        finally:
            # what is frozen when Python ends is never freed, and libraries complain of it below the result
            gc.unfreeze()
