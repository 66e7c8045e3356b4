import math

import pytest
import torch
from kvbench_kernels.hadamard import rotate

from kvbench.attention import triton as kernels
from kvbench.cache import PagedCache
from kvbench.schemes import Scheme
from kvbench.transforms import all_rotations

GPU = torch.cuda.is_available()
DTYPES = [name for name in kernels._ROUNDINGS if name != "auto" and (GPU or name != "bf16")]


def hard_rows(tokens, heads, head_dim):
    """Heavy-tailed rows, zeros, equal values, NaN, infinities, tiny, huge, and ties of the rounding."""
    x = torch.distributions.StudentT(2.0).sample((tokens, heads, head_dim))
    x[0] = 0
    x[1] = 1
    x[2, 0] = -2.5
    x[3, 0, 3] = math.nan
    x[3, 1, 5] = math.inf
    x[4, 0, 7] = -math.inf
    x[4, 1] *= 1e-6
    x[5] = 6e4
    x[6, 0] = torch.arange(head_dim) % 31 / 2 - 7.5  # halves: the range is 15, so that the scale is 1
    x[6, 1] = torch.arange(head_dim) % 255 / 2 - 63.5
    x[7, 0] = torch.where(torch.arange(head_dim) % 3 == 0, 0.0, x[7, 0])
    return x


def assert_bytes(dtype, rotation, head_dim, device):
    """What the kernel writes is bit for bit what plain torch does."""
    scheme = Scheme.parse(dtype, rotation)
    x = torch.stack([hard_rows(11, 2, head_dim), hard_rows(11, 2, head_dim).flip(0)]).to(torch.float16)
    slots = torch.randperm(48)[:11]
    slots[2] = slots[7] = -1
    caches = []
    for place in ("cpu", device):
        cache = PagedCache([(2, head_dim)], scheme, pages=3, page_size=16, model_dtype=torch.float16, device=place)
        for plane in (cache.keys[0], cache.values[0]):
            plane.codes.fill_(0xAB)
            if plane.scale is not None:
                plane.scale.fill_(7.0)
            if plane.tensor_scale is not None:
                plane.tensor_scale.fill_(0.02)
        caches.append(cache)
    want, got = caches
    want.append(0, x[0], x[1], slots)
    k, v = x.to(device)
    kernels.append(got, 0, k, v, slots.to(device))
    for expected, plane in ((want.keys[0], got.keys[0]), (want.values[0], got.values[0])):
        codes, mine = expected.codes, plane.codes.cpu()
        if dtype in ("fp16", "bf16"):
            codes, mine = (
                c.view(getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}[dtype])) for c in (codes, mine)
            )
            assert torch.equal(codes.isnan(), mine.isnan())
            codes, mine = codes.nan_to_num(), mine.nan_to_num()
        assert torch.equal(codes, mine), (
            f"{int((codes != mine).sum())} of {codes.numel()} differ ({rotation}, {head_dim})"
        )
        if plane.scale is not None:
            assert torch.equal(expected.scale.isnan(), plane.scale.cpu().isnan())
            assert torch.equal(
                expected.scale.nan_to_num().view(torch.int32), plane.scale.cpu().nan_to_num().view(torch.int32)
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_the_definition_s(dtype, device):
    """
    Rotated, scaled, rounded, packed and scattered by one launch: bit for bit what plain torch writes, in every slot.

    The scale and every NaN count as equal whatever their sign and payload. Words of 72, 80 and 96 channels begin
    anywhere in a tile.
    """
    rotations = ("none", 64), ("none", 72), ("randomized_hadamard", 80), ("hadamard", 96), ("hadamard", 128)
    for rotation, head_dim in rotations:
        assert_bytes(dtype, rotation, head_dim, device)


def test_more_tiles_than_a_number_holds(device):
    """
    100 channels, 25 tiles of four, have 100 bits at a place of a tile: their words are packed from the tiles' own.
    """
    assert_bytes("int4", "none", 100, device)


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_int2_s_large_rows_are_the_definition_s(given, head_dim, device):
    """
    Rows whose squares overflow float32, and those on either side of where they are shrunk: codes and scales to the bit.
    """
    if given == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")
    x = torch.randn(64, 1, head_dim) * torch.exp2(torch.arange(64) * 2).view(64, 1, 1)
    x[-1] = torch.finfo(given).max
    x = x.to(given)
    x[:, :, 5] = 0
    want, got = (
        PagedCache([(1, head_dim)], Scheme.parse("int2", "none"), pages=4, page_size=16, device=place)
        for place in ("cpu", device)
    )
    want.append(0, x, x, torch.arange(64))
    kernels.append(got, 0, x.to(device), x.to(device), torch.arange(64, device=device))

    assert want.keys[0].scale.isfinite().all()
    assert torch.equal(want.keys[0].codes, got.keys[0].codes.cpu())
    assert torch.equal(want.keys[0].scale, got.keys[0].scale.cpu())


@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_odd_numbers_of_rows(tokens, device):
    """
    What a program has beyond the last row is not written.
    """
    scheme = Scheme.parse("int4:int2")
    want = PagedCache([(3, 64)], scheme, pages=3, page_size=16)
    got = PagedCache([(3, 64)], scheme, pages=3, page_size=16, device=device)
    x = torch.randn(2, tokens, 3, 64)
    slots = torch.randperm(48)[:tokens]
    for cache in (want, got):
        for plane in (cache.keys[0], cache.values[0]):
            plane.codes.fill_(1)
            plane.scale.fill_(1)
    want.append(0, x[0], x[1], slots)
    kernels.append(got, 0, x[0].to(device), x[1].to(device), slots.to(device))
    for expected, plane in ((want.keys[0], got.keys[0]), (want.values[0], got.values[0])):
        assert torch.equal(expected.codes, plane.codes.cpu())
        assert torch.equal(expected.scale, plane.scale.cpu())


def test_strided_keys_and_values(device):
    """
    Views into a fused projection are written like copies of them.
    """
    fused = torch.randn(5, 6, 64, device=device)
    caches = [PagedCache([(2, 64)], Scheme.parse("int8"), pages=1, page_size=16, device=device) for _ in range(2)]
    for cache, (k, v) in zip(
        caches, ((fused[:, 2:4], fused[:, 4:]), (fused[:, 2:4].clone(), fused[:, 4:].clone())), strict=True
    ):
        cache.keys[0].codes.zero_()
        cache.values[0].codes.zero_()
        kernels.append(cache, 0, k, v, torch.arange(5, device=device))
    assert torch.equal(caches[0].keys[0].codes, caches[1].keys[0].codes)
    assert torch.equal(caches[0].values[0].codes, caches[1].values[0].codes)


@pytest.mark.parametrize("rotation", ["hadamard", "hadamard_32", "randomized_hadamard"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_queries_turn_and_outputs_turn_back(rotation, head_dim, device):
    """
    As the rotation's own matrices in float64, for odd numbers of rows.
    """
    rule = all_rotations()[rotation]
    turn = kernels.turn(rule, head_dim, device)
    x = torch.randn(5, 3, head_dim)
    for got, want in (
        (rotate(x.to(device), turn), rule.rotate_query(x.double())),
        (rotate(x.to(device), turn, back=True), rule.unrotate(x.double())),
    ):
        assert float((got.cpu() - want).norm() / want.norm()) < 1e-6
