import multiprocessing
import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Toys have no use for a GPU."""
    for module in ("command", "plan_document"):
        monkeypatch.setattr(f"kvbench.sweep.{module}.default_device", lambda: "cpu")


@pytest.fixture(scope="session")
def cluster():
    """A Ray cluster of two nodes on this machine, each with room for one worker, whose processes know the toys."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvbench[ray]'")
    from ray.cluster_utils import Cluster

    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    # a killed node is missed after 3 s, and not 15; a slow one has its 10 s to answer as ever
    settings = {"_system_config": {"health_check_period_ms": 500}}
    started = Cluster(initialize_head=True, head_node_args={**node, **settings})
    started.add_node(**node)
    yield started
    started.shutdown()


@pytest.fixture(scope="session")
def contexts():
    """How a process of a test begins: with all that this one has loaded, or from one that has loaded kvbench alone."""
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload(["kvbench.cli", "kvbench.sweep.command", "kvbench.sweep.session"])
    return {"fork": multiprocessing.get_context("fork"), "clean": clean}


@pytest.fixture
def start(tmp_path, toy, contexts):
    """A function: `kvbench ARGUMENTS` over toys, in a process and a process group of its own."""

    def started(*arguments, context="fork"):
        process = contexts[context].Process(
            target=toy.kvbench, args=([str(one) for one in arguments], tmp_path / "stderr")
        )
        process.start()
        return process

    return started


@pytest.fixture
def quick_workers(monkeypatch):
    """A device's process has what this one has loaded, which saves seconds; else it begins as a user's does."""
    monkeypatch.setattr("kvbench.sweep.executors.process.START", "fork")


@pytest.fixture
def ends(tmp_path):
    """A function: the exit code of such a process, and what it wrote to stderr."""

    def ended(process, seconds=300):
        process.join(seconds)
        errors = (tmp_path / "stderr").read_text()
        assert process.exitcode is not None, errors
        assert "Traceback" not in errors
        return process.exitcode, errors

    return ended
