"""Cells in a Ray cluster: what a dead worker costs, a cluster that grows, and what a cluster can lack."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from types import SimpleNamespace

import pytest
from kill_clusters import NODE, check, compare

from kvbench.results import Store
from kvbench.sweep.command import Options, make_executor, run_sweep
from kvbench.sweep.executors.ray import Cluster, Node, capacity, check_address, differences, find_cluster, nowhere
from kvbench.sweep.executors.ray_worker import Needs, look
from kvbench.sweep.parts import ModelFacts
from kvbench.sweep.spec import ModelSpec
from kvbench.sweep.stopping import UnusableError
from kvbench.yaml_text import ConfigError


@pytest.fixture
def kvbench_in_a_cluster(cluster, start):
    """Starts `kvbench ARGUMENTS` with the cluster's address."""

    def started(*arguments):
        return start(*arguments, "--executor", "ray", "--address", cluster.address, context="clean")

    return started


def test_a_worker_that_dies_three_times_costs_its_cell(kvbench_in_a_cluster, ends, tmp_path, toy):
    """
    A cell that kills three of them is kept as failed, with each end and not all on one node; the others are measured.
    """
    path = toy.write_config(tmp_path / "toys.yaml", tasks=[{"task": "toy_a", "dies": "int2"}])
    code, errors = ends(kvbench_in_a_cluster("sweep", path, "--output", tmp_path / "run"))
    records = Store(tmp_path / "run").load().records.values()
    assert code == 3, errors
    (failed,) = [record for record in records if record.status == "failed"]
    assert len(records) == 8
    assert failed.dtype == "int2_per_token_head"
    assert failed.error.startswith("WorkerDiedError: it was tried 3 times, and each time its worker died: on ")
    places = re.findall(r"on (\S+): Worker unexpectedly exits", failed.error)
    assert (len(places), len(set(places))) == (3, 2), "all three on one node"


def test_what_ends_in_a_cluster_costs_nothing(kvbench_in_a_cluster, ends, tmp_path, toy, cluster):
    """
    A worker and the driver, killed in the middle of cells, and a node that joined, took one and left: no cell is lost
    or doubled, and the table is that of a sweep left alone. What Ray says of nodes is no result, and not on stdout.
    """
    go, log, store = tmp_path / "go", tmp_path / "log", Store(tmp_path / "run")
    tasks = ["toy_a", {"task": "toy_b", "log": str(log), "holds": str(go)}]
    path = toy.write_config(tmp_path / "toys.yaml", tasks=tasks)
    kept = {}

    def driver():
        return kvbench_in_a_cluster("sweep", path, "--output", store.folder)

    def begun(process, count):
        """The processes that held in a cell, once there are so many."""
        deadline, pids = time.monotonic() + 200, tmp_path / "log of the processes"
        while time.monotonic() < deadline and process.is_alive():
            found = list(dict.fromkeys(pids.read_text().split())) if pids.exists() else []
            if len(found) >= count:
                return found
            time.sleep(0.05)
        pytest.fail(f"no {count} processes took a cell: {process.errors.read_text()}")

    first = driver()
    os.kill(int(begun(first, 2)[0]), signal.SIGKILL)
    begun(first, 3)
    first.kill()
    first.join()
    kept = check(store, kept)
    second = driver()
    begun(second, 5)
    node = cluster.add_node(**NODE)
    try:
        begun(second, 6)
    finally:
        cluster.remove_node(node, allow_graceful=False)
        go.touch()
    code, errors = ends(second)

    assert code == 0, errors
    assert kept.keys() < check(store, kept).keys()
    compare(store.folder, tmp_path, toy, ["toy_a", "toy_b"])
    assert len(log.read_text().splitlines()) > 8, "no cell was begun twice"
    assert (tmp_path / "stdout").read_text() == ""


# ---- what can be lacking: a line each, exit code 4


def test_more_workers_than_there_is_room_for_are_refused(kvbench_in_a_cluster, ends, tmp_path, toy):
    """
    Before anything runs, with what the cluster has.
    """
    path = toy.write_config(tmp_path / "toys.yaml")
    process = kvbench_in_a_cluster("sweep", path, "--output", tmp_path / "run", "--workers", "9")
    code, errors = ends(process)

    assert code == 4
    # a node that another test took away may not be missed yet
    assert re.search(r"--workers 9: the cluster has (\d) CPUs on \1 nodes, room for \1\n", errors)


def test_doctor_says_what_a_cluster_has(kvbench_in_a_cluster, ends, tmp_path):
    """
    A row for Ray and one for each node.
    """
    code, errors = ends(kvbench_in_a_cluster("doctor", "--format", "json"))

    assert code == 0, errors
    rows = json.loads((tmp_path / "stdout").read_text())
    assert [row["name"].split()[0] for row in rows] == ["ray", "node", "node"]
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["detail"].startswith("0 GPUs, 1 CPUs, ") for row in rows[1:])


def test_without_ray_it_is_said_what_to_install(monkeypatch):
    """
    And nothing else of kvbench imports it.
    """
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnusableError, match=r"--executor ray needs Ray \(.*\): pip install 'kvbench\[ray\]'"):
        make_executor(Options(executor="ray"))


def test_an_address_without_a_cluster_is_said_at_once():
    """
    Where nothing listens, and where the address is that of a client, which would be outside of the cluster.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(UnusableError, match=rf"no Ray cluster at 127.0.0.1:{port}: .*refused; `ray start --head`"):
            check_address(f"127.0.0.1:{port}")
    for wrong in ("ray://head:10001", "head", "head:port"):
        with pytest.raises(UnusableError, match="expected auto or HOST:PORT"):
            check_address(wrong)


def test_a_cluster_that_has_ended_is_none(tmp_path, monkeypatch):
    """
    Where Ray remembers one of this machine that nothing answers for, one is started; RAY_ADDRESS is said to be wrong.
    """
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvbench[ray]'")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray/ray_current_cluster").write_text(f"127.0.0.1:{port}")
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        assert find_cluster(None) == "local"
        free.listen()
        assert find_cluster(None) is None
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(UnusableError, match=rf"no Ray cluster at 127.0.0.1:{port}: .*refused"):
        find_cluster(None)


def test_versions_that_differ_are_named():
    """
    All that decide numbers, but for how torch was built; else the code of kvbench by its hash.
    """
    here = {
        "python": "3.12.1",
        "kvbench": "1",
        "versions": {"torch": "2.11.0+cpu", "numpy": "2.5"},
        "source_sha256": "a",
    }
    there = {**here, "versions": {"torch": "2.11.0+cu130", "numpy": "2.4"}}

    assert differences(here, here) == []
    assert differences(here, there) == ["it has numpy 2.4, and this machine 2.5"]
    assert differences(here, {**here, "source_sha256": "b"}) == [
        "its code of kvbench is another than this machine's; a runtime_env sends it along"
    ]
    assert differences(here, {**here, "versions": {}})[0] == "it has torch not at all, and this machine 2.11.0+cpu"


def test_a_node_says_which_model_and_data_it_lacks(toy):
    """
    A model that is not there or is another one, and a task's file.
    """
    spec = SimpleNamespace(name="toy")
    planned = toy.ModelFacts("toy", "float32", "r1")
    task = toy.ToyTask("toy_a", lacks="toy_a wants a file: put it there")

    def lacks(found):
        return look(Needs([(spec, planned)], [task], lambda _: found))[1]

    assert lacks(planned) == ["toy_a wants a file: put it there"]
    assert lacks(toy.ModelFacts("toy", "float32", missing="fetch it"))[0] == "model toy: fetch it"
    assert lacks(toy.ModelFacts("toy", "float32", "r2"))[0] == "model toy: its revision is r2, and here r1"


def test_a_node_that_ends_while_it_is_asked_is_no_node_any_more():
    """
    Its error stops nothing, where the cluster does not count it any more; that of one that goes on does.
    """
    cluster = Cluster.__new__(Cluster)
    cluster.known = {name: Node(name, f"node-{name}", 0.0, 1.0) for name in "ab"}
    alive = [["a", "b"], ["a"]]
    rows = lambda: [{"NodeID": name, "Alive": True} for name in alive.pop(0)]  # noqa: E731
    cluster.ray = SimpleNamespace(nodes=rows, wait=lambda answers, **_: (answers, []))

    def look(node):
        node.looking = node.id

    def hear(node):
        node.lacks = ["cannot run kvbench"]

    cluster.look, cluster.hear = look, hear

    assert cluster.survey() == ["node node-a: cannot run kvbench"]


def test_flags_of_a_cluster_go_with_its_executor(tmp_path, toy):
    """
    One line, exit code 2.
    """
    for options in (Options(address="auto"), Options(workers=2, executor="process")):
        with pytest.raises(ConfigError, match="--address and --workers are of a cluster: add --executor ray"):
            make_executor(options)
    with pytest.raises(ConfigError, match="--executor ray takes no --devices"):
        make_executor(Options(executor="ray", devices=["0"]))
    with pytest.raises(ConfigError, match="gpus"):
        run_sweep(toy.write_config(tmp_path / "toys.yaml", model={"name": "toy", "gpus": 1.5}), Options(), toy.PARTS)


def test_small_models_share_a_gpu():
    """
    A node has room for as many workers as its GPUs have of their share, whole to each; without a GPU one to a CPU.
    """
    gpus, cpus = Node("a", "a", 2.0, 16.0), Node("b", "b", 0.0, 3.0)

    assert [capacity(gpus, share) for share in (1.0, 0.5, 0.4, 0.3, 0.1)] == [2, 4, 4, 6, 20]
    assert capacity(cpus, 0.5) == 3


def test_a_large_model_takes_several_gpus_of_a_node():
    """
    A node has room for as many of its workers as it has so many GPUs; where no node has, `missing` says so.
    """
    four, two = Node("a", "a", 4.0, 16.0), Node("b", "b", 2.0, 16.0)

    assert [[capacity(node, share) for share in (2.0, 3.0, 4.0)] for node in (four, two)] == [[2, 1, 1], [1, 0, 0]]
    models = [
        (ModelSpec(name=name, device_map="auto", gpus=gpus), ModelFacts(name, "bfloat16"))
        for name, gpus in (("a", 4), ("b", 2), ("c", 1))
    ]
    assert nowhere(models[:2], [four, two]) == []
    spread = "device_map: auto goes over the GPUs of its worker"
    assert nowhere(models, [two]) == [
        f"model a: {spread}, and no node has 4: gpus: 2 at most",
        f"model c: {spread}: say gpus: N, two at least, or leave it out",
    ]


def test_a_worker_with_a_share_of_a_gpu_plans_for_that(monkeypatch):
    """
    Its cache has room for what is left of the share, or of the GPU where that is less.
    """
    import torch

    from kvbench.runners.transformers.memory import free_memory

    def left(free, share):
        values = {"mem_get_info": (free, 80), "memory_reserved": 30, "memory_allocated": 20}
        for name, value in {**values, "get_per_process_memory_fraction": share}.items():
            monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
        return free_memory(torch.device("cuda"))

    assert left(50, 1.0) == 60
    assert left(50, 0.5) == 20
    assert left(5, 0.5) == 15
