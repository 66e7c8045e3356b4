"""A sweep in a cluster survives what is killed in it."""

from __future__ import annotations

import kill_clusters
import pytest


def test_kills_in_a_cluster_change_nothing(tmp_path, monkeypatch):
    """
    A worker, a node and the driver, in the middle of cells: the table of a sweep left alone, no cell lost or doubled.
    """
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvbench[ray]'")
    monkeypatch.setattr("kvbench.sweep.command.default_device", lambda: "cpu")
    sweeps = kill_clusters.Sweeps(tmp_path, seed=1)
    try:
        sweeps.run(kill_clusters.KINDS)
    finally:
        sweeps.end()

    assert sweeps.found.kills == {"worker": 1, "node": 1, "driver": 1}
    assert sweeps.found.cells == 8 * kill_clusters.TASKS
