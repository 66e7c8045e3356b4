"""What holds for every rotation; a new file in kvbench/transforms is tested here unasked."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.testing import assert_close

from kvbench.schemes import Scheme
from kvbench.transforms import Rope, Sample, all_rotations, all_transforms

HEAD_DIMS = [64, 80, 96, 128, 256, 6, 24, 81]
# head_dim: size of a block, the largest power of two that divides it
BLOCKS = {64: 64, 80: 16, 96: 32, 128: 128, 256: 256, 6: 2, 24: 8, 81: 1}

every_rotation = pytest.mark.parametrize("rotation", all_rotations().values(), ids=lambda rotation: rotation.name)
# those that kernels compute: a matrix of ±1 times powers of two
every_hadamard = pytest.mark.parametrize(
    "rotation", [one for one in all_rotations().values() if one.lower(64)], ids=lambda rotation: rotation.name
)
every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
every_transform = pytest.mark.parametrize("transform", all_transforms().values(), ids=lambda transform: transform.name)


def seed_signs(block: int) -> torch.Tensor:
    """Signs as the seed draws them, of a tensor of probabilities: Tensor.bernoulli_(0.5) draws others."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(0x9E3779B9)
    return 2 * torch.bernoulli(torch.full((block,), 0.5), generator=generator) - 1


def unnormalised(name: str, head_dim: int) -> np.ndarray:
    """The seed's ±1 matrix: equal blocks, each SciPy's Sylvester matrix times the signs of its columns."""
    if name == "none":
        return np.eye(head_dim)
    block = BLOCKS[head_dim]
    matrix = scipy.linalg.hadamard(block).astype(float)
    if name == "randomized_hadamard" and block > 1:
        matrix = matrix * seed_signs(block).numpy()
    return scipy.linalg.block_diag(*[matrix] * (head_dim // block))


def powers(head_dim: int) -> tuple[float, float]:
    """The factors of a stored row and of a query: 2^-a and 2^-(m-a) for blocks of 2^m, a = m // 2."""
    m = BLOCKS[head_dim].bit_length() - 1
    return 2.0 ** -(m // 2), 2.0 ** -(m - m // 2)


@pytest.mark.parametrize("name", ["none", "hadamard", "randomized_hadamard"])
@every_head_dim
def test_rows_are_turned_by_the_seed_s_matrix(name, head_dim):
    """
    In float64 a stored row, a query and an output are products with SciPy's Hadamard matrix.
    """
    rotation = all_rotations()[name]
    matrix = unnormalised(name, head_dim)
    stored, read = (1.0, 1.0) if name == "none" else powers(head_dim)
    x = torch.randn(7, head_dim, dtype=torch.float64)

    budget = {"rtol": 0, "atol": 1e-15 * head_dim}  # of float64 sums of head_dim values near 1
    assert_close(rotation.rotate(x), torch.from_numpy(x.numpy() @ matrix.T * stored), **budget)
    assert_close(rotation.rotate_query(x), torch.from_numpy(x.numpy() @ matrix.T * read), **budget)
    assert_close(rotation.unrotate(x), torch.from_numpy(x.numpy() @ matrix * read), **budget)


@every_hadamard
@every_head_dim
def test_a_rotation_is_orthogonal_up_to_its_power_of_two(rotation, head_dim):
    """
    R Rᵀ is exactly the identity times b / 4^a.
    """
    matrix = rotation.rotate(torch.eye(head_dim, dtype=torch.float64)).T
    block, a = rotation.block(head_dim), rotation.exponent(head_dim)

    assert torch.equal(matrix @ matrix.T, torch.eye(head_dim, dtype=torch.float64) * block / 4.0**a)
    assert block in (1, *(min(widest, BLOCKS[head_dim]) for widest in (32, 64, 512)))


@every_rotation
@every_head_dim
def test_scores_do_not_change(rotation, head_dim):
    """
    Rotated queries times rotated keys are queries times keys.
    """
    q, k = torch.randn(2, 5, head_dim, dtype=torch.float64)

    scores = rotation.rotate_query(q) @ rotation.rotate(k).T

    assert_close(scores, q @ k.T, rtol=0, atol=1e-14 * head_dim)


@every_rotation
@every_head_dim
@pytest.mark.parametrize("shape", [(1,), (5, 3), (2, 7, 1), (0, 2)])
def test_turning_back_undoes_turning(rotation, head_dim, shape):
    """
    unrotate(rotate(x)) is x to float64's precision, and to float32's.
    """
    x = torch.randn(*shape, head_dim, dtype=torch.float64)

    assert_close(rotation.unrotate(rotation.rotate(x)), x, rtol=0, atol=1e-14 * head_dim)
    single = rotation.unrotate(rotation.rotate(x.float()))
    assert single.dtype == torch.float32
    assert_close(single.double(), x, rtol=0, atol=2**-22 * head_dim**0.5)


@every_rotation
@every_head_dim
@pytest.mark.parametrize("rows", [1, 3, 7, 129])
def test_a_row_does_not_depend_on_its_neighbours(rotation, head_dim, rows):
    """
    Odd counts of rows, and rows apart in memory, give each row alone, to the bit.
    """
    x = torch.distributions.StudentT(2.0).sample((rows, head_dim))

    turned = rotation.rotate(x)

    assert torch.equal(turned, torch.stack([rotation.rotate(row) for row in x]))
    assert torch.equal(turned, rotation.rotate(x.T.contiguous().T))


@every_hadamard
@every_head_dim
def test_small_integers_are_turned_exactly(rotation, head_dim):
    """
    The factors are powers of two, so sums that fit float32 have no error at all.
    """
    x = torch.randint(-50, 51, (5, head_dim)).float()

    assert torch.equal(rotation.rotate(x).double(), rotation.rotate(x.double()))
    assert torch.equal(rotation.unrotate(rotation.rotate(x)), x)


@every_rotation
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_turned_in_float32(rotation, given):
    """
    A bfloat16 or float16 row is turned as its float32 copy: sums of 256 values are not rounded to 8 bits.
    """
    x = torch.randn(3, 256).to(given)

    assert torch.equal(rotation.rotate(x).float(), rotation.rotate(x.float()))


@every_rotation
def test_queries_and_outputs_keep_their_type(rotation):
    """
    What the model hands over and gets back has the model's type.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = torch.randn(3, 96, dtype=dtype)
        assert rotation.rotate_query(x).dtype == dtype
        assert rotation.unrotate(x).dtype == dtype


@pytest.mark.parametrize("head_dim", [d for d in HEAD_DIMS if BLOCKS[d] > 1])
def test_one_vector_of_signs_for_everything(head_dim):
    """
    Every block has the seed's signs, the same at every call, whatever other random numbers were drawn.
    """
    rotation = all_rotations()["randomized_hadamard"]
    torch.manual_seed(123)

    signs = rotation.signs(head_dim)

    assert signs.shape == (head_dim,)
    for block in signs.split(BLOCKS[head_dim]):
        assert torch.equal(block, seed_signs(BLOCKS[head_dim]))
    assert torch.equal(signs, rotation.signs(head_dim))
    assert set(signs.tolist()) <= {-1.0, 1.0}


def test_a_row_that_nothing_turns_has_no_signs():
    """
    At an odd head_dim blocks are single channels: readers and writers alike leave them as they are.
    """
    assert all_rotations()["randomized_hadamard"].signs(81) is None


def test_the_first_signs_are_these():
    """
    Written out, so that another torch with another generator would be seen.
    """
    signs = all_rotations()["randomized_hadamard"].signs(16)

    assert "".join("+" if sign > 0 else "-" for sign in signs) == "+-++----+--++-+-"
    assert torch.equal(all_rotations()["randomized_hadamard"].signs(80), signs.repeat(5))


def test_two_values_by_hand():
    """
    (3, 1) turns to (4, 2) under the ±1 matrix; b = 2 has m = 1 and a = 0, so a row carries no factor and a query 1/2.
    """
    hadamard = all_rotations()["hadamard"]
    x = torch.tensor([3.0, 1.0])

    assert hadamard.rotate(x).tolist() == [4, 2]
    assert hadamard.rotate_query(x).tolist() == [2, 1]
    assert hadamard.unrotate(torch.tensor([4.0, 2.0])).tolist() == [3, 1]


def test_a_hadamard_row_spreads_one_channel_over_its_block():
    """
    A single outlier becomes 16 equal magnitudes of its block of 16 channels, and touches no other block.
    """
    x = torch.zeros(80)
    x[37] = 8.0  # in the third block of 16

    y = all_rotations()["hadamard"].rotate(x)

    assert torch.equal(y[32:48].abs(), torch.full((16,), 8.0 / 4))
    assert y[:32].count_nonzero() == y[48:].count_nonzero() == 0


def learned(transform, head_dim, tokens=300):
    """What a transform learns from biased keys [T, 2, D] and queries [T, 6, D], and the two, in float64."""
    k, q = torch.randn(tokens, 2, head_dim).double() + 3, torch.randn(tokens, 6, head_dim).double()
    rope = Rope(100.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64))
    sample = Sample(k, q, torch.arange(tokens), rope, 2 * tokens)
    return transform.learn(sample), k, q


@every_transform
@every_head_dim
def test_what_a_transform_does_to_keys_queries_and_scores_undo(transform, head_dim):
    """
    query(q)·apply(k) + score(q) at the key's page of positions is q·k, whatever was learned, at every position.
    """
    params, k, q = learned(transform, head_dim)
    positions = torch.arange(len(k))

    keys = transform.apply(k, params, positions).to(torch.float64).repeat_interleave(3, dim=1)
    scores = torch.einsum("qhd,khd->hqk", transform.query(q, params), keys)
    lacks = transform.score(q, params)  # [T, HQ, P]
    if lacks is not None:
        pages = positions // 64 if lacks.shape[-1] > 1 else torch.zeros_like(positions)
        scores += lacks[..., pages].transpose(0, 1)

    want = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(3, dim=1))
    # means are learned in float32
    assert_close(scores, want, rtol=0, atol=1e-5 * head_dim)


@every_transform
@every_head_dim
def test_outputs_of_transformed_values_are_turned_back(transform, head_dim):
    """
    undo(P·apply(v)) is P·v for any weights P that sum to one; a transform for keys alone is refused on values.
    """
    params, v, _ = learned(transform, head_dim)
    if transform.keys_only:
        with pytest.raises(ValueError, match=f"'{transform.name}' on values can't be undone"):
            Scheme.parse("int8", f"none:{transform.name}")
        return
    weights = torch.rand(len(v), len(v), dtype=torch.float64).softmax(-1)

    out = torch.einsum("qk,khd->qhd", weights, transform.apply(v, params, torch.arange(len(v))).to(torch.float64))

    assert_close(transform.undo(out, params), torch.einsum("qk,khd->qhd", weights, v), rtol=0, atol=1e-13 * head_dim)


@every_transform
def test_a_row_is_transformed_as_it_is_alone(transform):
    """
    Of one row and of many, to float32's rounding: a page written at once and token by token holds the same codes.
    """
    params, k, _ = learned(transform, 64)
    k, positions = k.float(), torch.arange(len(k))

    together = transform.apply(k, params, positions)
    alone = torch.cat([transform.apply(k[i : i + 1], params, positions[i : i + 1]) for i in range(0, len(k), 7)])

    assert torch.equal(together[::7], alone)


def test_the_folder_is_the_list():
    """
    `none` is first, and the seed's two rotations are there.
    """
    assert next(iter(all_rotations())) == "none"
    assert {"none", "hadamard", "randomized_hadamard"} <= set(all_rotations())
