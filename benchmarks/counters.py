"""Hardware counters of the kernels, read by Nsight Compute: python benchmarks/counters.py [OUT.json [GRID.yaml]].

Each cell of the grid (configs/kernels-counters.yaml) passes its gate, and is then run once more under `ncu`, with empty
caches and clocks as they are. OUT.json has a row a kernel, OUT.csv what ncu wrote. Needs a GPU that lets its counters
be read.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from kvbench.environment import describe
from kvbench.timing import load_requests
from kvbench.timing.grid import call, gated

GRID = Path(__file__).parents[1] / "configs" / "kernels-counters.yaml"
INSTALLED = "/usr/local/cuda/bin/ncu"
LAST = ("merge_kernel", "_store_kernel")  # of a cell's kernels the last
STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "mio_throttle", "no_instruction", "not_selected", "selected", "short_scoreboard", "wait",
)  # fmt: skip
METRICS = {
    "us": "gpu__time_duration.sum",
    "ghz": "smsp__cycles_elapsed.avg.per_second",
    "registers": "launch__registers_per_thread",
    "dram_bytes": "dram__bytes_read.sum",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "l1": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "alu": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "fma": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "xu": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "lsu": "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "active_cycles": "smsp__cycles_active.avg",
    "cycles": "smsp__cycles_elapsed.max",
    "warps": "smsp__warps_active.avg.per_cycle_active",
    **{stall: f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio" for stall in STALLS},
}


def main() -> None:
    """Counts, and writes what was found."""
    if not torch.cuda.is_available():
        print("not run: there is no GPU here to count on")
        return
    given = [*sys.argv[1:], None, None][:2]
    found = shutil.which("ncu") or (INSTALLED if Path(INSTALLED).exists() else None)
    if found is None:
        raise SystemExit("ncu is not installed: it comes with the CUDA toolkit, as Nsight Compute")
    with tempfile.TemporaryDirectory() as folder:
        out, grid = Path(given[0] or Path(folder, "counters.json")), Path(given[1] or GRID)
        cells, log = Path(folder, "cells.json"), out.with_suffix(".csv")
        subprocess.run(
            [
                found, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
                "--print-units", "base", "--metrics", ",".join(METRICS.values()), "--log-file", str(log),
                sys.executable, __file__, "--inside", str(grid), str(cells),
            ],
            check=False,
        )  # fmt: skip
        if not log.exists() or not cells.exists():
            raise SystemExit("ncu wrote nothing: may this user read the GPU's counters?")
        rows = together(json.loads(cells.read_text()), counted(log.read_text()))
        out.write_text(json.dumps({"environment": describe(), "rows": rows}, indent=1) + "\n")
    for row in rows:
        shown = " ".join(f"{name} {row[name]:.1f}" for name in ("issue", "alu", "tensor", "dram", "l1", "warps"))
        print(f"{row['op']} {row['batch']}x{row['context']} {row['heads']} {row['dtype']} {row['kernel']}", end=" ")
        print(f"{row['us']:.1f} us: {shown}")


def inside(grid: Path, cells: Path) -> None:
    """Under ncu: runs each cell whose gate it passes once where counters are read; cells.json says which these are."""
    done: list[dict[str, Any]] = []
    for request in load_requests(grid):
        for batch in request.batches:
            for context in request.contexts if request.op != "write" else (0,):
                for scheme in request.schemes():
                    work, _, verdict = gated(request, scheme, batch, context, True)
                    shape = request.shape
                    cell = {
                        "op": request.op,
                        "batch": batch,
                        "context": context,
                        "heads": f"{shape.query_heads}/{shape.kv_heads}",
                        "head_dim": shape.head_dim,
                        "dtype": scheme.dtype_name,
                        "rotation": scheme.rotation_name,
                        "bytes": work.nbytes,
                    }
                    if verdict != "ok":
                        print(f"left out, {verdict}: {cell}", file=sys.stderr)
                        continue
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                    call(request, work)
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
                    done.append(cell)
                    cells.write_text(json.dumps(done))
                    del work
                    torch.cuda.empty_cache()


def counted(log: str) -> list[dict[str, Any]]:
    """A row a kernel, in order, of ncu's raw page as CSV: its name and the METRICS, in µs, GHz and per cent."""
    lines = [line for line in log.splitlines() if line.startswith('"')]
    table = list(csv.DictReader(lines))
    rows = []
    for line in table[1:]:  # the first has the units
        row: dict[str, Any] = {"kernel": line["Kernel Name"].split("(")[0], "grid": line["Grid Size"]}
        for name, metric in METRICS.items():
            text = (line.get(metric) or "").replace(",", "")
            row[name] = float(text) if text.replace(".", "", 1).isdigit() else None
        row["us"] = row["us"] and row["us"] / 1e3
        row["ghz"] = row["ghz"] and row["ghz"] / 1e9
        rows.append(row)
    return rows


def together(cells: list[dict[str, Any]], kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each kernel's row with its cell's: a cell's kernels end with one of LAST."""
    rows, left = [], list(kernels)
    for cell in cells:
        while left:
            kernel = left.pop(0)
            rows.append({**cell, **kernel})
            if kernel["kernel"] in LAST:
                break
    if left:
        raise ValueError(f"{len(left)} kernels more than those of the cells, from {left[0]['kernel']} on")
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
