"""A GPU in one state before a speed is taken."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kvbench.runners.settle import Chain, settle


class Driver:
    """The calls of CUDA's driver; the one named `fails` gives an error, so many times."""

    def __init__(self, fails="", times=100):
        self.fails, self.times, self.called = fails, times, []

    def __getattr__(self, name):
        def call(*_):
            self.called.append(name)
            return int(name == self.fails and self.called.count(name) <= self.times)

        return call


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
    assert driver.called.count("cuCtxCreate_v2") == 2
    assert driver.called.count("cuCtxDestroy_v2") == (0 if fails == "cuCtxCreate_v2" else 2)
    assert driver.called.count("cuCtxSynchronize") == (0 if fails else 2)


def test_a_gpu_that_fails_leaves_the_others_to_settle(driver):
    """
    The second's context works after the first's could not be made; that not all could is said.
    """
    driver.fails, driver.times = "cuCtxCreate_v2", 1

    assert not settle([torch.device("cuda", 0), torch.device("cuda", 1)])
    assert driver.called.count("cuCtxCreate_v2") == 2
    assert driver.called.count("cuCtxSynchronize") == driver.called.count("cuCtxDestroy_v2") == 1


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times a GPU")
def test_a_chain_gives_the_time_of_one_kernel():
    """
    Whatever its length: a kernel takes a third of a microsecond to five, and in a chain twice as long the same within
    a third.
    """
    device = torch.device("cuda", 0)
    short, long = (min(chain.kernel_us() for _ in range(5)) for chain in (Chain(device, 256), Chain(device, 512)))

    assert 0.3 < short < 5
    assert short / long == pytest.approx(1, abs=1 / 3)
