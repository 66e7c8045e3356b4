"""What windows and centred keys cost in kernels: configs/kernels-window.yaml, each row beside its plain one.

Needs a GPU. The last lines are the table; rows with their samples go to windows.json in the folder given, if one is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from kvbench.environment import describe
from kvbench.timing import load_requests, run

GRID = Path(__file__).parents[1] / "configs" / "kernels-window.yaml"


def main() -> None:
    """Times the grid, then prints it."""
    if not torch.cuda.is_available():
        print("not run: there is no GPU here to time on")
        return
    rows = []
    for request in load_requests(GRID):
        timings = run(request, lambda row: print(row["op"], row["dtype"], row["rotation"], row["gate"], row["us"]))
        rows += timings.rows
        if len(sys.argv) > 1:  # after each grid, so that a stop loses little
            found = {"environment": describe(), "rows": rows}
            Path(sys.argv[1], "windows.json").write_text(json.dumps(found, indent=1))
    plain = {(_place(row), row["dtype"]): row["us"] for row in rows if row["rotation"] == "hadamard"}
    print(f"\n{'op':8}{'batch × context':>16}  {'dtype':32}{'keys':18}{'µs':>8}{'µs plain':>10}{'more':>8}  gate")
    for row in rows:
        base = plain.get((_place(row), row["dtype"].split("+")[0]))
        us = row["us"]
        more = "-" if us is None or base is None else f"{us / base - 1:+.1%}"
        shown = ["-" if value is None else f"{value:.1f}" for value in (us, base)]
        place = f"{row['batch']} × {row['context'] or '-'}"
        keys = row["rotation"].split("+hadamard")[0]
        print(
            f"{row['op']:8}{place:>16}  {row['dtype']:32}{keys:18}{shown[0]:>8}{shown[1]:>10}{more:>8}  {row['gate']}"
        )


def _place(row: dict[str, object]) -> tuple[object, ...]:
    return row["op"], row["batch"], row["context"]


if __name__ == "__main__":
    main()
