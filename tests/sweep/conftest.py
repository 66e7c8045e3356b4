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
    started = Cluster(initialize_head=True, head_node_args=node)
    started.add_node(**node)
    yield started
    started.shutdown()
