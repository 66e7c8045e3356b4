"""The machine: what a record must say about it to be trusted, and what is wrong with it. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "lm_eval",
    "datasets",
    "gguf",
    "numpy",
    "pandas",
    # peers of `kvbench kernel`, where installed
    "vllm",
    "flashinfer-python",
)

# settings that change numbers or timings; none of them is a path
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_VISIBLE_DEVICES",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_INTERPRET",
)

# what kvbench itself reads; torch, Triton, lm-eval and the hub have more of their own
READS = {
    "KVBENCH_DATA": "A folder with the data sets' rows, in place of the hub, where the YAML has no `data`.",
    "KVBENCH_CACHE": "Where kvbench keeps what it can make again, such as converted models.",
    "XDG_CACHE_HOME": "Where `kvbench/` lies without KVBENCH_CACHE; else `~/.cache`.",
    "COLUMNS": "How wide tables may be, in place of the terminal's width.",
    "NO_COLOR": "Tables and progress have no colors.",
    "TERM": "`dumb`: progress does not redraw, and nothing has a color.",
    "HF_HUB_OFFLINE": "`1`: nothing is asked of the hub.",
    "HF_DATASETS_CACHE": "Where data sets are that were fetched before; else below HF_HOME.",
    "CUDA_VISIBLE_DEVICES": "Which GPUs there are; `--devices` counts them.",
    "RAY_ADDRESS": "The cluster of `sweep --executor ray` where `--address` names none.",
    "MLFLOW_TRACKING_URI": "Where `export --to mlflow` writes; else into the run folder.",
    "TRITON_INTERPRET": "`1`: kernels run in Triton's interpreter, as they do where there is no GPU.",
}

SMALLEST_DISK_GIB = 2.0  # the embedded model's conversion takes 0.5, results some more
SMALLEST_MEMORY_GIB = 4.0  # the embedded model with lm-eval needs about 2


def describe() -> dict[str, Any]:
    """Facts about this machine and this code, as JSON: no paths, no user or host names. What isn't there is None.

    cuda and threads are what torch says, so None as long as nothing has imported it.
    """
    gpus, driver = _gpus()
    torch = sys.modules.get("torch")
    return {
        "kvbench": _version("kvbench"),
        "git": git_state(),
        "source_sha256": source_sha256(),
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{'.'.join(platform.release().split('.')[:2])}-{platform.machine()}",
        "cpu": _cpu_model(),
        "cores": _cores(),
        "ram_gib": _memory_gib(),
        "threads": torch.get_num_threads() if torch else None,
        "gpus": gpus,
        "driver": driver,
        "cuda": torch.version.cuda if torch else None,
        "versions": {package: _version(package) for package in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def cache_dir() -> Path:
    """Where kvbench keeps what it can make again: $KVBENCH_CACHE, else kvbench/ in the user's cache directory."""
    if own := os.environ.get("KVBENCH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvbench"


def git_state() -> dict[str, Any] | None:
    """The commit of the checkout that this package runs from, and whether its code differs from that commit.

    None where it runs from no checkout of its own, such as an environment inside another repository.
    """
    root = Path(__file__).resolve().parent.parent
    top = _run("git", "-C", str(root), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    commit = _run("git", "-C", str(root), "rev-parse", "HEAD")
    # a new file counts, since the folders are walked; results do not
    changes = _run("git", "--no-optional-locks", "-C", str(root), "status", "--porcelain", "--", "kvbench", "kernels")
    return {"revision": commit, "dirty": changes != ""} if commit else None


def source_sha256() -> str:
    """A hash of the code that runs: of `sha256sum`'s lines for every .py file of kvbench and kvbench_kernels, by name.

    The same for a checkout, a copy of it without git, and a wheel of it, so a record names its code even where no
    commit does. docs/method.md has the shell line that gives it for any commit.
    """
    spec = find_spec("kvbench_kernels")
    folders = {"kvbench": Path(__file__).parent}
    if spec is not None and spec.origin is not None:
        folders["kvbench_kernels"] = Path(spec.origin).parent
    files = {
        f"{package}/{file.relative_to(folder).as_posix()}": file
        for package, folder in folders.items()
        for file in folder.rglob("*.py")
    }
    lines = (f"{hashlib.sha256(files[name].read_bytes()).hexdigest()}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _run(*command: str) -> str | None:
    """What a program prints, None where it isn't there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def visible_gpu(device: str) -> str:
    """The number or the UUID by which nvidia-smi knows a GPU, as far as CUDA_VISIBLE_DEVICES says it.

    device: its number among those that are visible, or "cuda" for the first in CUDA's own order.
    """
    shown = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if device == "cuda":
        return shown[0] if shown else ""
    return shown[int(device)] if int(device) < len(shown) else device


def visible_gpus(gpus: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all GPUs, those that this process sees; all where it can't be told which ones are meant."""
    shown = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    known = [gpus[int(name)] for name in shown if name.isdigit() and int(name) < len(gpus)]
    return known if known and len(known) == len(shown) else gpus


def device_name(devices: Sequence[str]) -> str:
    """What cells run on: the names of these devices ("cpu", or as `visible_gpu` takes them), each once."""
    gpus, _ = _gpus()
    names: dict[str, None] = {}
    for one in devices:
        own = ["cpu"] if one == "cpu" else [gpu["name"] for gpu in own_gpus(gpus, visible_gpu(one))]
        names |= dict.fromkeys(own or ["GPU"])
    return " + ".join(names)


def own_gpus(gpus: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Of all GPUs, that of this number; all where it can't be told which one is meant."""
    return [gpus[int(name)]] if name.isdigit() and int(name) < len(gpus) else gpus


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """Name and memory of each GPU, and the driver's version, without starting CUDA."""
    query = "--query-gpu=name,memory.total,driver_version"
    lines = _run("nvidia-smi", query, "--format=csv,noheader,nounits")
    rows = [[part.strip() for part in line.split(",")] for line in (lines or "").splitlines()]
    rows = [row for row in rows if len(row) == 3]
    gpus = [{"name": name, "memory_gib": _gib(mib, 2**20)} for name, mib, _ in rows]
    return gpus, rows[0][2] if rows else None


def _gib(count: str, unit: int) -> float | None:
    return round(int(count) * unit / 2**30, 1) if count.isdigit() else None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _cores() -> int | None:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # a system without sysconf, or without these names
        return None


def host_memory() -> int | None:
    """Bytes of this machine's memory, or of a container's; None where the system does not say."""
    here, most = _memory_gib(), _container_memory("max")
    return None if here is None else min(int(here * 2**30), most if most is not None else 2**62)


def _container_memory(name: str) -> int | None:
    try:
        text = Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def free_host_memory() -> int:
    """Bytes that this process can take before others lose theirs; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
    # a container may have less
    most, used = map(_container_memory, ("max", "current"))
    return free if most is None or used is None else max(0, min(free, most - used))


# ----------------------------------------------------------------------------------------------------------- doctor


@dataclass(frozen=True)
class Check:
    """One thing looked at. detail: what was found; todo: what to do about it, empty where nothing is.

    status: "ok"; "absent", what kvbench also runs without; "warn", something will not go as one thinks; "fail", nothing
    will.
    """

    name: str
    status: Literal["ok", "absent", "warn", "fail"]
    detail: str
    todo: str = ""


def doctor() -> list[Check]:
    """What this machine lacks to run kvbench.

    What concerns models is `kvbench.runners.catalog.doctor`.
    """
    return [
        _check_source(),
        _check_python(),
        _check_dependencies(),
        _check_name_kernels(),
        _check_triton(),
        _check_data(),
        _check_cache(),
        _check_memory(),
    ]


def _check_source() -> Check:
    """What records call this code; nothing is wrong with it."""
    git = git_state()
    commit = f", commit {git['revision'][:9]}{' and changes' if git['dirty'] else ''}" if git else ", no checkout"
    return Check("source", "ok", f"sha256 {source_sha256()}{commit}")


def _check_python() -> Check:
    from packaging.specifiers import SpecifierSet

    found = platform.python_version()
    wanted = metadata.metadata("kvbench")["Requires-Python"] if _version("kvbench") else ""
    if not SpecifierSet(wanted or "").contains(found, prereleases=True):
        return Check("python", "fail", found, f"use Python {wanted}")
    return Check("python", "ok", found)


def _check_dependencies(requirements: Sequence[str] | None = None) -> Check:
    """The installed versions against the ranges that kvbench's own metadata declares."""
    from packaging.requirements import Requirement

    if requirements is None:
        try:
            requirements = metadata.requires("kvbench") or []
        except metadata.PackageNotFoundError:
            return Check("dependencies", "warn", "kvbench itself is not installed", "pip install -e .")
    wanted = [Requirement(line) for line in requirements]
    wanted = [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    wrong = []
    for need in wanted:
        found = _version(need.name)
        if found is None or not need.specifier.contains(found, prereleases=True):
            wrong.append(f"{need.name}{need.specifier} ({found or 'not installed'})")
    if wrong:
        return Check("dependencies", "fail", ", ".join(wrong), "install them, or make the environment anew")
    return Check("dependencies", "ok", f"{len(wanted)} packages in their declared ranges")


def _check_name_kernels() -> Check:
    """An importable folder `kernels` passes for a package that transformers looks for (5.0 to 5.9 then raise)."""
    spec = find_spec("kernels")
    if spec is not None and _version("kernels") is None:
        where = spec.origin or ", ".join(spec.submodule_search_locations or [])
        todo = "keep the checkout's root off sys.path: run kvbench and pytest themselves, not through python -m"
        return Check("name kernels", "warn", f"a folder of that name is importable: {where}", todo)
    return Check("name kernels", "ok", "no folder passes for that package")


def _check_triton() -> Check:
    version = _version("triton")
    gpus, driver = _gpus()
    if version is None:
        return Check("triton", "absent", "not installed", "kernels need it; the reference on torch does not")
    interprets = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if gpus and interprets:
        todo = "unset TRITON_INTERPRET, or timings mean nothing"
        return Check("triton", "warn", f"{version}, interpreted although there is a GPU: {gpus[0]['name']}", todo)
    if gpus:
        return Check("triton", "ok", f"{version}, {len(gpus)} × {gpus[0]['name']}, driver {driver}")
    return Check("triton", "ok", f"{version}, no GPU: kernels run in its interpreter, the sweep on the reference")


def _check_data() -> Check:
    data = os.environ.get("KVBENCH_DATA")
    if not data:
        todo = "set KVBENCH_DATA to a mirror folder, or let lm-eval reach the hub; built-in tasks need neither"
        return Check("data mirror", "absent", "KVBENCH_DATA is not set", todo)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return Check("data mirror", "fail", f"KVBENCH_DATA: there is no folder {folder}", "correct or unset it")
    files = list(folder.glob("**/*.jsonl"))
    unreadable = [file for file in files if not os.access(file, os.R_OK)]
    if unreadable:
        return Check("data mirror", "fail", f"cannot read {unreadable[0]}", "correct its permissions")
    if not files:
        todo = "files are at <dataset path>/<dataset name or default>/<split>.jsonl"
        return Check("data mirror", "fail", f"no .jsonl file in {folder}", todo)
    return Check("data mirror", "ok", f"{len({file.parent for file in files})} datasets in {folder}")


def _check_cache() -> Check:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return Check("cache", "fail", f"cannot write in {folder}: {error.strerror}", "set KVBENCH_CACHE")
    detail = f"{folder}, {free:.1f} GiB free"
    if free < SMALLEST_DISK_GIB:
        return Check("cache", "warn", detail, f"free {SMALLEST_DISK_GIB:.0f} GiB, or set KVBENCH_CACHE")
    return Check("cache", "ok", detail)


def _check_memory() -> Check:
    found = _memory_gib()
    if found is None:
        return Check("memory", "warn", "unknown on this system")
    if found < SMALLEST_MEMORY_GIB:
        return Check("memory", "warn", f"{found} GiB", f"{SMALLEST_MEMORY_GIB:.0f} GiB or more for the embedded model")
    return Check("memory", "ok", f"{found} GiB, {_cores()} cores")
