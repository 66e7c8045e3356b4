"""A GPU in one state before a speed is taken."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kvbench.runners.settle import settle


class Driver:
    """The calls of CUDA's driver; the one named `fails` gives an error."""

    def __init__(self, fails=""):
        self.fails, self.called = fails, []

    def __getattr__(self, name):
        return lambda *_: (self.called.append(name), int(name == self.fails))[1]


class Entered:
    """Stands for `torch.cuda.device`."""

    def __init__(self, device): ...
    def __enter__(self): ...
    def __exit__(self, *_): ...


@pytest.fixture
def driver(monkeypatch):
    """A driver in the place of the machine's; torch's part does nothing."""
    made = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    for name in ("synchronize", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    return made


@pytest.mark.parametrize("fails", ["", "cuCtxCreate_v2", "cuMemAlloc_v2"])
def test_a_context_is_made_works_and_is_given_up(driver, fails):
    """
    On every GPU, and given up where it could not work too; where none can be made nothing is, and that is said.
    """
    driver.fails = fails
    found = settle([torch.device("cuda", 0), torch.device("cuda", 1)])

    assert found == (not fails)
    assert driver.called.count("cuCtxCreate_v2") == (1 if fails else 2)
    assert driver.called.count("cuCtxDestroy_v2") == {"": 2, "cuCtxCreate_v2": 0, "cuMemAlloc_v2": 1}[fails]
    assert driver.called.count("cuCtxSynchronize") == (0 if fails else 2)


def test_a_driver_that_lacks_a_call_settles_nothing(driver, monkeypatch):
    """
    A speed is taken all the same.
    """
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not settle([torch.device("cuda", 0)])


def test_without_a_gpu_nothing_is_settled(monkeypatch):
    """
    Neither on a CPU nor where the driver's library is not there.
    """
    assert not settle([torch.device("cpu")])

    def lacking(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", lacking)
    assert not settle([torch.device("cuda")])
