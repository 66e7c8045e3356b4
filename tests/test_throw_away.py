"""A new transform and a new dtype are one file each: three that nobody keeps pass the tests that all share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

DCT = '''\
"""The discrete cosine transform of a row."""

import math
from dataclasses import dataclass

import torch

from kvbench.transforms.rotation import Rotation


def matrix(like):
    d = like.shape[-1]
    k, n = torch.arange(d, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    m = torch.cos(math.pi / d * (n + 0.5) * k) * math.sqrt(2 / d)
    m[0] /= math.sqrt(2)
    return m.to(dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Cosine(Rotation):
    def rotate(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        # row by row, not as one product of matrices, whose sums depend on how many rows there are
        return (y.contiguous().unsqueeze(-2) * matrix(y)).sum(-1)

    def rotate_query(self, q):
        return q @ matrix(q).T

    def unrotate(self, o):
        return o @ matrix(o)


dct = Cosine("dct", source="Ahmed, Natarajan and Rao 1974")
'''

NF4 = '''\
"""Four bits from the quantiles of a Gaussian, one scale every 16 channels."""

from dataclasses import dataclass

from kvbench.dtypes.base import Codebook
from kvbench.dtypes.blocks import Blocks

LEVELS = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
LEVELS += (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0)


@dataclass(frozen=True)
class NormalFloat(Blocks):
    def encode(self, blocks, tensor_scale):
        scale = blocks.abs().amax(-1).clamp_min(1e-6)
        return (blocks / scale.unsqueeze(-1)).unsqueeze(-1).sub(blocks.new_tensor(LEVELS)).abs().argmin(-1), scale


SOURCE = "QLoRA, https://arxiv.org/abs/2305.14314"
nf4 = NormalFloat("nf4", 4, Codebook(LEVELS), "per_group", source=SOURCE, group_size=16)
'''

TALL = '''\
"""Signed 8-bit integers, one scale a channel of 32 tokens."""

from dataclasses import dataclass

import torch

from kvbench.dtypes.base import Affine, Dtype, Rows


@dataclass(frozen=True)
class Tall(Dtype):
    def quantize(self, x, tensor_scale=None):
        x = x.to(torch.float32)
        scale = (x.abs().amax(-2) / 127).clamp_min(1e-6)
        broken = ~scale.isfinite()
        codes = (x / scale.unsqueeze(-2)).round().clamp(-127, 127).masked_fill(broken.unsqueeze(-2), 0)
        return Rows(self.pack(codes.to(torch.int8)), scale.masked_fill(broken, torch.nan))


tall8 = Tall("tall8", 8, Affine("none"), "per_channel", source="nobody", page_tokens=32)
'''

PLUGIN = """\
from pathlib import Path

import kvbench.dtypes
import kvbench.transforms

for package in (kvbench.dtypes, kvbench.transforms):
    package.__path__.append(str(Path(__file__).parent / package.__name__.rsplit(".")[-1]))
"""


@pytest.fixture
def added(tmp_path):
    """The environment of a process in whose folders of dtypes and transforms a file more lies each."""
    for name, text in (
        ("transforms/dct.py", DCT),
        ("dtypes/nf4.py", NF4),
        ("dtypes/tall.py", TALL),
        ("more.py", PLUGIN),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def run(environment, *args):
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_they_pass_every_shared_test(added):
    """
    With no line elsewhere, sizes, packing, rows or pages in a cache, attention and rounding hold for them, alone and
    together.
    """
    shared = [
        "tests/dtypes/test_dtypes.py",
        "tests/dtypes/test_min_max.py",
        "tests/cache",
        "tests/attention",
        "tests/transforms",
        "tests/test_schemes.py",
    ]
    program = "import more, pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    done = run(added, "-c", program, "-q", "-p", "no:cacheprovider", "-k", "dct or nf4 or tall8", *shared)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(done.stdout.strip().splitlines()[-1].split()[0]) > 60


@pytest.mark.parametrize(
    ("dtype", "rotation", "reason"),
    [
        ("int4", "dct", "no kernel computes dct"),
        ("tall8", "none", "no kernel quantizes or decodes pages as a whole, as tall8 is"),
    ],
)
def test_the_kernels_refuse_them_and_say_so(added, dtype, rotation, reason):
    """
    `triton` gives the reason in one line; `auto` takes the reference: neither is run as something else.
    """
    program = (
        "import more, torch\n"
        "from kvbench.attention import choose, triton\n"
        "from kvbench.schemes import Scheme\n"
        f"scheme = Scheme.parse({dtype!r}, {rotation!r})\n"
        "print(triton.lacking(scheme, torch.float16, torch.device('cpu')))\n"
        "print(choose('auto', scheme, torch.float16, torch.device('cpu')))\n"
        "choose('triton', scheme, torch.float16, torch.device('cpu'))"
    )
    done = run(added, "-c", program)

    assert done.stdout.splitlines()[0].startswith(reason)
    assert done.stdout.splitlines()[1] == "reference"
    assert f"ValueError: attention: triton can't serve this cell: {reason}" in done.stderr


def test_rows_that_no_kernel_decodes_are_read_in_a_copy(added):
    """
    `auto` takes the reference for NF4 and has the reason; by name the kernels read its rows decoded to 16 bits.
    """
    program = (
        "import more, torch\n"
        "from kvbench.attention import choose, triton\n"
        "from kvbench.schemes import Scheme\n"
        "scheme = Scheme.parse('nf4', 'none')\n"
        "print(triton.lacking(scheme, torch.float16, torch.device('cpu')))\n"
        "print(*(choose(one, scheme, torch.float16, torch.device('cpu')) for one in ('auto', 'triton')))"
    )
    done = run(added, "-c", program)

    assert done.stdout.splitlines() == [
        "no kernel decodes nf4, which has a scale every 16 channels",
        "reference triton",
    ]
