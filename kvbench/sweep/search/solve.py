"""One choice a slot, of the least cost in all, within a room: a small integer program, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


@dataclass(frozen=True)
class Slot:
    """What one place may hold: the cost and the size of each choice."""

    costs: tuple[float, ...]
    sizes: tuple[int, ...]


Picks = tuple[int, ...]  # the number of each slot's choice


def cheapest(slots: Sequence[Slot], room: int, unlike: Sequence[Picks] = (), differ: int = 1) -> Picks | None:
    """The choices of the least cost whose sizes sum to `room` at most; None where there are none.

    unlike: earlier answers, from each of which it has `differ` other choices at least.
    """
    starts = np.cumsum([0, *(len(slot.costs) for slot in slots)])
    costs = np.array([cost for slot in slots for cost in slot.costs])
    sizes = np.array([size for slot in slots for size in slot.sizes], dtype=np.int64)
    # whole numbers without a common factor, and costs of about 1: the solver's tolerances are absolute
    unit = math.gcd(*map(int, sizes)) or 1
    scale = costs.max() or 1.0
    of_slot = np.repeat(np.arange(len(slots)), np.diff(starts))
    one_each = csr_array((np.ones(len(costs)), (of_slot, np.arange(len(costs)))))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None] // unit, -np.inf, room // unit)]
    for picks in unlike:
        row = np.zeros(len(costs))
        row[starts[:-1] + np.array(picks)] = 1
        constraints.append(LinearConstraint(row[None], -np.inf, len(slots) - differ))
    found = milp(
        1e4 * costs / scale,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    chosen = [int(found.x[first:last].argmax()) for first, last in pairwise(starts)]
    assert sum(slot.sizes[pick] for slot, pick in zip(slots, chosen, strict=True)) <= room, "within tolerances"
    return tuple(chosen)
