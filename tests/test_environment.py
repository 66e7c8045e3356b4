"""What a record says about its machine, and what the doctor finds wrong with one."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvbench import environment

GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")


def statuses():
    return {check.name: check.status for check in environment.doctor()}


def check(name):
    return next(check for check in environment.doctor() if check.name == name)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A committed checkout that the package seems to run from."""
    (tmp_path / "kvbench").mkdir()
    (tmp_path / "kvbench" / "environment.py").write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*GIT, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "kvbench" / "environment.py"))
    return tmp_path


@pytest.fixture
def no_programs(tmp_path, monkeypatch):
    """A machine without git and nvidia-smi."""
    monkeypatch.setenv("PATH", str(tmp_path))


def fake_gpu(folder, monkeypatch, lines):
    """An nvidia-smi that prints these lines."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat <<'END'\n" + lines + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_record_s_facts_name_versions_and_no_place():
    """The facts are JSON and name what decides numbers, but neither folder, nor user, nor host."""
    facts = environment.describe()
    text = json.dumps(facts)

    assert facts["kvbench"]
    assert facts["python"].startswith("3.")
    assert {"torch", "transformers", "lm_eval"} <= {name for name, version in facts["versions"].items() if version}
    assert facts["cores"] >= 1
    assert facts["ram_gib"] > 0
    private = [str(Path.home()), str(Path.cwd()), os.uname().nodename, sys.prefix, f'"{getpass.getuser()}"']
    assert [word for word in private if word in text] == []


def test_the_source_s_hash_is_what_a_shell_says(tmp_path, monkeypatch):
    """
    A copy of the tree without git has the hash that the documented line of shell gives, whatever else lies in it; a
    changed or a new file is another hash.
    """
    for file in ("kvbench/environment.py", "kvbench/tasks/a.py", "kvbench/tasks_b.py", "kernels/kvbench_kernels/k.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"# {file}\n")
    (tmp_path / "kernels/kvbench_kernels/__init__.py").write_text("")
    (tmp_path / "kvbench/notes.txt").write_text("no code")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "kvbench/environment.py"))
    kernels = tmp_path / "kernels/kvbench_kernels/__init__.py"
    monkeypatch.setattr(environment, "find_spec", lambda name: SimpleNamespace(origin=str(kernels)))

    method = (Path(__file__).parent.parent / "docs" / "method.md").read_text()
    shell = method.split("# the source's hash\n")[1].split("```")[0]

    first = environment.source_sha256()
    said = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (tmp_path / "kernels/kvbench_kernels/k.py").write_text("# changed\n")
    changed = environment.source_sha256()
    (tmp_path / "kvbench/new.py").write_text("")

    assert first == said.split()[0]
    assert len({first, changed, environment.source_sha256()}) == 3
    assert environment.describe()["source_sha256"] == environment.source_sha256()


def test_describing_imports_no_torch():
    """Facts come from metadata; threads and CUDA are said once something else has imported torch."""
    code = (
        "import sys; from kvbench import environment as e; facts = e.describe(); e.doctor()\n"
        "assert 'torch' not in sys.modules and facts['threads'] is None\n"
        "import torch; torch.set_num_threads(1); print(e.describe()['threads'])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "1"


def test_only_listed_variables_are_recorded(monkeypatch):
    """A setting that changes numbers is recorded; a secret or a path beside it is not."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("KVBENCH_DATA", "/somewhere")

    variables = environment.describe()["variables"]

    assert variables["OMP_NUM_THREADS"] == "3"
    assert not {"HF_TOKEN", "KVBENCH_DATA"} & set(variables)


def test_the_revision_is_of_the_checkout_and_says_if_its_code_was_changed(checkout):
    """Results beside the code leave it clean; a changed or a new file of the code does not."""
    clean = environment.git_state()
    (checkout / "results").mkdir()
    (checkout / "results" / "report.md").write_text("")
    assert environment.git_state() == clean

    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    (checkout / "kvbench" / "new.py").write_text("")
    assert environment.git_state() == clean | {"dirty": True}
    (checkout / "kvbench" / "new.py").unlink()
    (checkout / "kvbench" / "environment.py").write_text("changed")
    assert environment.git_state() == clean | {"dirty": True}


def test_another_repository_s_revision_is_not_ours(checkout, monkeypatch):
    """An environment inside a checkout of something else has no revision."""
    inside = checkout / "env" / "site-packages" / "kvbench"
    inside.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(inside / "environment.py"))

    assert environment.git_state() is None


def test_what_is_not_there_is_null(no_programs):
    """Without git and without a GPU the facts are None and empty, not errors."""
    facts = environment.describe()

    assert (facts["git"], facts["gpus"], facts["driver"]) == (None, [], None)


def test_gpus_are_named_with_their_memory(tmp_path, monkeypatch):
    """Each GPU is a row; memory that the driver does not say is None."""
    fake_gpu(tmp_path, monkeypatch, "NVIDIA H100 80GB HBM3, 81559, 580.1\nNVIDIA GB10, [N/A], 580.1")

    facts = environment.describe()

    assert facts["gpus"] == [
        {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.6},
        {"name": "NVIDIA GB10", "memory_gib": None},
    ]
    assert facts["driver"] == "580.1"


def test_a_program_that_complains_is_no_gpu(tmp_path, monkeypatch):
    """What a driver that does not answer prints is not taken for a GPU."""
    fake_gpu(tmp_path, monkeypatch, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")

    assert environment.describe()["gpus"] == []


# ---- doctor


def test_this_machine_can_run_kvbench(tmp_path, monkeypatch):
    """In the environment of the tests nothing fails, and every check that is not ok says what to do."""
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("KVBENCH_DATA", raising=False)

    checks = environment.doctor()

    assert [check for check in checks if check.status == "fail"] == []
    assert {check.name for check in checks} >= {
        "python",
        "dependencies",
        "name kernels",
        "triton",
        "data mirror",
        "cache",
    }
    assert all(check.todo for check in checks if check.status != "ok")
    assert all(check.detail for check in checks)


def test_versions_outside_their_ranges_are_named():
    """A package that is too old, or not there, is named with what was found; another system's or an extra's is not."""
    wanted = ["numpy>=1", "pytest>=999", "no-such-package", 'missing-too; sys_platform == "nowhere"', 'x; extra == "y"']

    found = environment._check_dependencies(wanted)

    assert found.status == "fail"
    assert "pytest>=999 (" in found.detail
    assert "no-such-package (not installed)" in found.detail
    assert not any(name in found.detail for name in ("numpy", "missing-too", "x ("))
    assert environment._check_dependencies(["numpy>=1"]).status == "ok"


def test_a_folder_named_kernels_is_noticed(tmp_path, monkeypatch):
    """An importable folder of that name, which transformers would take for a package, is a warning with its place."""
    assert statuses()["name kernels"] == "ok"
    (tmp_path / "kernels").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    found = check("name kernels")

    assert found.status == "warn"
    assert str(tmp_path / "kernels") in found.detail


def test_an_interpreter_on_a_gpu_is_noticed(tmp_path, monkeypatch):
    """With a GPU, interpreted kernels are a warning; compiled ones are fine; without a GPU, both are."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with monkeypatch.context() as patch:
        fake_gpu(tmp_path, patch, "NVIDIA H100, 81559, 580.1")
        assert check("triton").status == "warn"
        patch.setenv("TRITON_INTERPRET", "0")
        assert check("triton").status == "ok"
        assert "NVIDIA H100" in check("triton").detail
    monkeypatch.setenv("PATH", "")
    assert check("triton").status == "ok"


def test_the_data_mirror_is_looked_at(tmp_path, monkeypatch):
    """Unset it is absent; a wrong or an empty folder fails; a mirror is counted by its data sets."""
    monkeypatch.delenv("KVBENCH_DATA", raising=False)
    assert check("data mirror").status == "absent"
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path / "nowhere"))
    assert check("data mirror").status == "fail"
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    assert "no .jsonl file" in check("data mirror").detail
    for split in ("gsm8k/main/test", "gsm8k/main/train", "piqa/default/test"):
        file = tmp_path / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}\n")

    assert check("data mirror").status == "ok"
    assert "2 datasets" in check("data mirror").detail


def test_a_cache_that_cannot_be_written_fails(tmp_path, monkeypatch):
    """A cache directory that is a file, or below one, is found before a conversion is."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "file" / "cache"))

    assert check("cache").status == "fail"
    assert "KVBENCH_CACHE" in check("cache").todo


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"KVBENCH_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/kvbench"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/someone"}, "/home/someone/.cache/kvbench"),
    ],
)
def test_the_cache_is_where_the_user_wants_it(variables, expected, monkeypatch):
    """Our own variable comes before the desktop's, and that before the usual place."""
    for name in ("KVBENCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert environment.cache_dir() == Path(expected)


@pytest.mark.parametrize(
    ("disk", "memory", "names"), [(0.5, 23.0, {"cache"}), (100.0, 1.0, {"memory"}), (100.0, 8.0, set())]
)
def test_too_little_room_is_a_warning(disk, memory, names, tmp_path, monkeypatch):
    """A disk or a memory that the embedded model does not fit is a warning, each for itself."""
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": disk * 2**30}))
    monkeypatch.setattr(environment, "_memory_gib", lambda: memory)

    assert {name for name in ("cache", "memory") if statuses()[name] == "warn"} == names


def test_devices_have_names(monkeypatch):
    """Those that cells run on, each once; all where it can't be told which one is meant."""
    monkeypatch.setattr(environment, "_gpus", lambda: ([{"name": "A"}, {"name": "B"}, {"name": "B"}], "1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")

    assert environment.device_name(["cpu"]) == "cpu"
    assert environment.device_name(["0"]) == environment.device_name(["cuda"]) == "B"
    assert environment.device_name(["0", "1"]) == "B + A"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert environment.device_name(["1", "2"]) == "B"
    assert environment.device_name(["cuda"]) == "A + B"
    monkeypatch.setattr(environment, "_gpus", lambda: ([], None))
    assert environment.device_name(["0"]) == "GPU"


def test_processes_of_the_suite_share_the_cores():
    """
    All of pytest-xdist's together have no more threads than there are cores; else they wait for each other.
    """
    import torch

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    assert workers * torch.get_num_threads() <= max(workers, os.cpu_count() or 1)
