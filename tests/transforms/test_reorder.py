"""What reordering learns."""

import torch

from kvbench.dtypes import all_dtypes
from kvbench.transforms import Sample, all_transforms

REORDER = all_transforms()["reorder"]


def sample():
    """Channels of four kinds of range, mixed: of 64 channels 16 each."""
    kinds = torch.tensor([[0.0, 1.0], [8.0, 1.0], [-8.0, 1.0], [0.0, 12.0]])
    which = torch.stack([torch.randperm(64) % 4 for _ in range(2)])  # [HKV, D]
    middle, width = kinds[which].unbind(-1)
    keys = middle + width * torch.rand(500, 2, 64)
    return Sample(keys, None, torch.arange(500), None, 500), which


def test_channels_of_one_range_stand_together():
    """
    Each 16 channels are of one kind, in each head, so a group's range is a channel's; and each channel stands once.
    """
    given, which = sample()
    order = REORDER.learn(given)["order"]

    for head in range(2):
        assert sorted(order[head].tolist()) == list(range(64))
        kinds = which[head][order[head]].view(4, 16)
        assert (kinds == kinds[:, :1]).all()


def test_groups_err_less():
    """
    SKVQ's claim in kind: with two bits and groups of 32 channels the squared error is less than half of what it was.
    """
    given, _ = sample()
    dtype = all_dtypes()["clipped2_per_group"]
    params = REORDER.learn(given)

    def error(x):
        return (dtype.dequantize(dtype.quantize(x)) - x).square().mean()

    assert error(REORDER.apply(given.keys, params, None)) < 0.5 * error(given.keys)
