"""Schemes as kernels serve them: the reference's outputs and bytes, over caches that kvbench itself made."""

from dataclasses import dataclass

import pytest
import torch

from kvbench.attention import Batch, append, attend, choose
from kvbench.cache import PagedCache
from kvbench.schemes import Scheme
from kvbench.transforms import Rope, Sample, Transform

GPU = torch.cuda.is_available()
HEAD_DIM, HKV, HQ, PAGE = 64, 2, 6, 64
ROPE = Rope(10000.0 ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2)))


def caches(scheme, pages, device):
    """The packed cache and the exact one (or None), and the bias that their keys have before they are turned."""
    bias = 4 * torch.randn(HKV, HEAD_DIM, dtype=torch.float64)
    positions = torch.arange(512)
    keys = ROPE.turn(bias + torch.randn(512, HKV, HEAD_DIM, dtype=torch.float64), positions)
    learned = [(scheme.key.learn(Sample(keys, None, positions, ROPE, 512)), ({},) * len(scheme.value.transforms))]
    kinds = [scheme, *([scheme.exact(torch.float16)] if scheme.window else [])]
    made = [
        PagedCache(
            [(HKV, HEAD_DIM)],
            kind,
            pages=pages,
            page_size=PAGE,
            learned=learned,
            model_dtype=torch.float16,
            device=device,
        )
        for kind in kinds
    ]
    for cache in made:
        for plane in (cache.keys[0], cache.values[0]):
            plane.codes.fill_(0xFF)
            if plane.scale is not None:
                plane.scale.view(torch.uint8).fill_(0xFF)
    return made[0], made[1] if scheme.window else None, bias


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "sinks": True}], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "int4_centered_window",
        "int2_centered_window",
        "int8_centered",
        ("int8+s4", "center_constant:none"),
        ("int4:int2+w0s2", "hadamard"),
        ("q8_0:nvfp4+w64s4", "center:none"),
        *([("int3+w64s4", "none"), ("q4_0:mxfp8+s4", "center_constant:none")] if GPU else []),
    ],
    ids=str,
)
def test_kernels_serve_a_scheme_as_the_reference_does(name, options, device):
    """
    Written by kernels in one launch, byte for byte as torch does it, and read in decode and chunks within 16 bits.
    """
    scheme = Scheme.parse(*([name] if isinstance(name, str) else name)).resolve(torch.float16)
    assert choose("triton", scheme, torch.float16, device) == "triton"
    lengths, news = (210, 140, 70), (1, 30, 1)
    table = torch.randperm(12).view(3, 4).to(torch.int32)
    torch.manual_seed(1)
    packed, exact, bias = caches(scheme, 12, device)
    torch.manual_seed(1)
    want, want_exact, _ = caches(scheme, 12, "cpu")
    slots = []
    for own, length in zip(table.long(), lengths, strict=True):
        at = torch.arange(length)
        slots.append(own[at // PAGE] * PAGE + at % PAGE)
        k = (ROPE.turn(bias.expand(length, HKV, HEAD_DIM), at) + torch.randn(length, HKV, HEAD_DIM)).half()
        v = torch.randn(length, HKV, HEAD_DIM).half()
        append(want, 0, k, v, slots[-1], impl="reference", positions=at, exact=want_exact)
        x = [t.to(device) for t in (k, v, slots[-1])]
        append(packed, 0, *x, impl="triton", positions=at.to(device), exact=exact)
    for mine, right in ((packed, want), (exact, want_exact)):
        for which in ("keys", "values") if mine else ():
            a, b = getattr(mine, which)[0], getattr(right, which)[0]
            assert torch.equal(a.codes.cpu(), b.codes)
            if b.scale is not None:
                assert torch.equal(a.scale.cpu().nan_to_num(), b.scale.nan_to_num())
    batch = Batch(
        torch.tensor([0, *news]).cumsum(0).to(device, torch.int32),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        table.to(device),
        torch.cat([own[-new:] for own, new in zip(slots, news, strict=True)]).to(device),
        PAGE,
    )
    q = torch.randn(sum(news), HQ, HEAD_DIM).half().to(device)
    options = {**options, **({"sinks": torch.randn(HQ, device=device)} if "sinks" in options else {})}
    options |= {"scaling": HEAD_DIM**-0.5, "exact": exact, "window": scheme.window}
    right = attend(q.double(), packed, 0, batch, impl="reference", **options)
    got = attend(q, packed, 0, batch, impl="triton", **options).double()
    assert float((got - right).norm() / right.norm()) < 8e-4


@dataclass(frozen=True)
class Reversed(Transform):
    """Channels in reverse: no Hadamard matrix, so nothing that kernels have a form for."""

    def apply(self, x, params, positions):
        return x.flip(-1)


def test_a_transform_without_a_form_for_kernels_is_refused(device):
    """
    Never run as something else: `triton` says which transform it is, and `auto` takes the reference.
    """
    scheme = Scheme.parse("int8", "none")
    scheme = type(scheme)(type(scheme.key)(scheme.key.dtype, (Reversed("reversed", source="here"),)), scheme.value)
    with pytest.raises(ValueError, match="no kernel computes reversed"):
        choose("triton", scheme, torch.float16, device)
    assert choose("auto", scheme, torch.float16, device) == "reference"
