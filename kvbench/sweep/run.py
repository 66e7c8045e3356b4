"""The parent of a sweep: it alone writes records, shows them, and stops where a canary lives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from kvbench.results import Record, Store
from kvbench.sweep.agreement import known
from kvbench.sweep.canary import Judgement, judge_all
from kvbench.sweep.executors.base import Executor
from kvbench.sweep.job import Event, Finished, Job
from kvbench.sweep.plan import Cell

if TYPE_CHECKING:
    from kvbench.sweep.progress import Display


class NotInEffectError(RuntimeError):
    """A zeroed cache left the scores where they were: nothing that this sweep measures means anything."""


def run_cells(
    executor: Executor, cells: Sequence[Cell], job: Job, store: Store, display: Display, records: dict[str, Record]
) -> None:
    """Measures the cells, and keeps each as it is done; a cell that raises is kept with its error.

    The caller holds `store.writing()`. records: those of the run folder, to which the new ones are added.

    Raises:
        NotInEffectError: a canary was not wrecked; the cells before it are kept.
        UnusableError: the GPU, or the cluster, can't be used any more; the cells so far are kept.
        RefusedError: the model would be measured wrongly; nothing of it is kept.
        OSError: a disk is full, or the run folder can't be written to; the cells so far are kept.
        KeyboardInterrupt: it was stopped; finished cells are kept.
    """
    by_name = {cell.name: cell for cell in cells}
    judged = Counter(cell.model for cell in cells if cell.judged)

    def tell(seat: int, event: Event) -> None:
        if isinstance(event, Finished):
            record = event.record
            store.save(record, event.samples)
            records[record.cell] = record
            job.known.update(known([record]))
        display.tell(seat, event)
        cell = by_name[event.record.cell] if isinstance(event, Finished) else None
        if cell and cell.judged:
            judged[cell.model] -= 1
            if not judged[cell.model]:
                stop_unless_wrecked(records.values(), cell.model.name)

    executor.run(cells, job, tell)


def stop_unless_wrecked(records: Collection[Record], model: str) -> None:
    """Raises NotInEffectError where a canary of the model left the scores where they were."""
    judgements = judge_all([record for record in records if record.model["name"] == model])
    unmoved = [judgement for judgement in judgements if judgement.verdict == "unmoved"]
    if unmoved:
        raise NotInEffectError(not_in_effect(unmoved))


def not_in_effect(unmoved: Sequence[Judgement]) -> str:
    """What a person reads when the canary lives."""
    shown = "; ".join(f"{one.model}, {one.task}: {one.why}" for one in unmoved)
    return f"quantization not in effect: with a zeroed cache the scores stay where they were ({shown})"
