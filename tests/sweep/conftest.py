import multiprocessing
import unittest.mock
from functools import partial
from pathlib import Path

import pytest
from kill_clusters import NODE, start_cluster


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Toys have no use for a GPU."""
    for module in ("command", "plan_document"):
        monkeypatch.setattr(f"kvbench.sweep.{module}.default_device", lambda: "cpu")


@pytest.fixture(scope="session")
def cluster():
    """A Ray cluster of two nodes on this machine, each with room for one worker, whose processes know the toys."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvbench[ray]'")
    started = start_cluster(Path(__file__).parent)
    started.add_node(**NODE)
    yield started
    started.shutdown()


@pytest.fixture(scope="session")
def contexts():
    """How a process of a test begins: with all that this one has loaded, or from one that has loaded kvbench alone."""
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload(["kvbench.cli", "kvbench.sweep.command", "kvbench.sweep.session"])
    return {"fork": multiprocessing.get_context("fork"), "clean": clean}


@pytest.fixture(scope="session")
def start_in(toy, contexts):
    """A function: `kvbench ARGUMENTS` over toys, in a process group of its own, which writes its stderr to a folder."""

    def started(folder, *arguments, context="fork"):
        errors = folder / "stderr"
        process = contexts[context].Process(target=toy.kvbench, args=([str(one) for one in arguments], errors))
        process.errors = errors
        process.start()
        return process

    return started


@pytest.fixture
def start(tmp_path, start_in):
    """The same, in the test's folder."""
    return partial(start_in, tmp_path)


@pytest.fixture(scope="session")
def quickly():
    """A context: a device's process has what this one has loaded, which saves seconds; else it begins as a user's."""
    return partial(unittest.mock.patch, "kvbench.sweep.executors.process.START", "fork")


@pytest.fixture
def quick_workers(quickly):
    with quickly():
        yield


@pytest.fixture(scope="session")
def ends():
    """A function: the exit code of such a process, and what it wrote to stderr."""

    def ended(process, seconds=300):
        process.join(seconds)
        errors = process.errors.read_text()
        assert process.exitcode is not None, errors
        assert "Traceback" not in errors
        return process.exitcode, errors

    return ended
