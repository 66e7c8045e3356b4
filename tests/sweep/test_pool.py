"""Which worker takes which cell, and what becomes of a cell whose worker dies."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from kvbench.sweep.executors.pool import Queue, Seat, WorkerDiedError


@dataclass(frozen=True)
class Spec:
    """A model, and the share of a GPU that it asks for."""

    name: str
    gpus: float = 1.0


def queue_of(names, gpus=None):
    """The queue of cells like "a1 a2 b1x", which are of the models a and b, and of the tasks "" and x."""
    specs = {name[0]: Spec(name[0], (gpus or {}).get(name[0], 1.0)) for name in names.split()}
    return Queue.of(
        SimpleNamespace(
            name=name, spec=specs[name[0]], model=name[0], task=SimpleNamespace(name=name[2:]), judged=name == "a1"
        )
        for name in names.split()
    )


def take(queue, seat, seats):
    """The name of what a seat takes, which then runs there."""
    taken = queue.take(seat, seats)
    if taken is None:
        return None
    seat.cell, seat.model = taken, (taken.spec, taken.model)
    return taken.name


def test_a_worker_keeps_to_the_model_it_has_loaded():
    """
    Each takes one that is loaded nowhere, goes on with that, and helps with the longest when its own is done.
    """
    one, two = seats = [Seat(0), Seat(1)]
    cells = queue_of("a1 a2 a3 a4 b1 b2 c1 c2")

    assert [take(cells, seat, seats) for seat in (one, two, two, two, two, one, one)] == [
        *("a1", "b1", "b2", "c1", "c2", "a2", "a3")
    ]
    assert take(cells, two, seats) == "a4"
    assert take(cells, one, seats) is None
    assert not cells


def test_where_all_are_loaded_the_longest_is_helped():
    """
    With as many cells left a worker as can be.
    """
    seats = [Seat(number) for number in range(4)]
    cells = queue_of("a1 a2 b1 b2 b3 b4 b5 b6 b7")

    assert [take(cells, seat, seats) for seat in seats] == ["a1", "b1", "b2", "b3"]


def test_near_the_end_the_longest_go_first():
    """
    Once all that is left fills each seat but three times, and of every task one was done; before that in order.
    """
    one, two = seats = [Seat(0), Seat(1)]
    cells = queue_of("a1 a2x a3 a4 a5x a6 a7 a8x a9 b1")

    assert take(cells, one, seats) == "a1"
    cells.clock.add("", 1.0)
    assert take(cells, two, seats) == "b1"
    assert take(cells, one, seats) == "a2x"
    cells.clock.add("x", 4.0)
    assert [take(cells, one, seats) for _ in range(6)] == ["a5x", "a8x", "a3", "a4", "a6", "a7"]
    alone = [Seat(0)]
    cells = queue_of("a1 a2 a3 a4 a5 a6 a7 a8 a9x")
    cells.clock.add("", 1.0)
    cells.clock.add("x", 1.5)
    assert [take(cells, alone[0], alone) for _ in range(6)] == ["a1", "a2", "a3", "a4", "a5", "a9x"]


def test_a_model_runs_on_the_share_that_it_asks_for():
    """
    A worker that holds half a GPU takes no cell of a model that asks for one; one without a share takes all.
    """
    cells = queue_of("a1 b1 a2", {"a": 0.5})
    half, whole = seats = [Seat(0, share=0.5), Seat(1, share=1.0)]

    assert cells.shares() == {0.5: 2, 1.0: 1}
    assert [take(cells, seat, seats) for seat in (whole, half, whole, half)] == ["b1", "a1", None, "a2"]
    assert take(queue_of("a1", {"a": 0.5}), Seat(0), []) == "a1"


def test_a_cell_whose_worker_died_goes_to_another_node():
    """
    Before all others; to the same node only where there is no other; and it fails when it was tried often enough.
    """
    one, two = seats = [Seat(0, node="x"), Seat(1, node="y")]
    cells = queue_of("a1 a2 a3")
    take(cells, one, seats)

    assert cells.died(one, "killed", tries=3) is None
    assert take(cells, one, seats) == "a2"
    assert take(cells, two, seats) == "a1"
    assert cells.died(two, "out of memory", tries=3) is None
    assert take(cells, one, seats) == "a1"
    error = cells.died(one, "killed", tries=3)
    assert isinstance(error, WorkerDiedError)
    assert str(error) == (
        "it was tried 3 times, and each time its worker died: on x: killed; on y: out of memory; on x: killed"
    )
