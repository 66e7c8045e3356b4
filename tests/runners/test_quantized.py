"""Models whose weights are quantized, as transformers loads them, under our cache.

Each checkpoint is written here byte by byte, as its format is defined, so that no quantizer is asked to check itself.
"""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvbench.runners import agreement, catalog
from kvbench.runners.model_files import ModelError
from kvbench.runners.transformers import TransformersModel
from kvbench.sweep.parts import REAL
from kvbench.sweep.spec import ModelSpec

GROUP = 32
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
}


def packed(codes, dim, order=range(8)):
    """Eight 4-bit codes to an int32 along a dimension, the first lowest."""
    codes = codes.to(torch.int64).unflatten(dim, (-1, 8))
    words = sum(codes.select(dim + 1, place) << (4 * i) for i, place in enumerate(order))
    return (words - ((words >> 31) << 32)).to(torch.int32)


def fp8(name, weight):
    """e4m3 codes with a scale for each 64 × 64 block."""
    blocks = weight.unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    values = (codes.float() * scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    return {f"{name}.weight": codes.flatten(2, 3).flatten(0, 1), f"{name}.weight_scale_inv": scale}, values


def grouped(weight):
    """Unsigned 4-bit codes [in, out], scales and zero points [groups, out], and what they stand for [out, in]."""
    groups = weight.T.unflatten(0, (-1, GROUP))
    scale = ((groups.amax(1) - groups.amin(1)) / 15).half()
    zero = (-groups.amin(1) / scale).round().clamp(1, 15)
    codes = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 15)
    values = (codes - zero[:, None]) * scale[:, None].float()
    return codes.flatten(0, 1), scale, zero, values.flatten(0, 1).T.contiguous()


def gptq(name, weight):
    """GPTQ's first format: zero points less one."""
    codes, scale, zero, values = grouped(weight)
    tensors = {"qweight": packed(codes, 0), "qzeros": packed(zero - 1, 1), "scales": scale}
    tensors["g_idx"] = (torch.arange(len(codes)) // GROUP).to(torch.int32)
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}, values


def awq(name, weight):
    """AWQ's order of columns in a word."""
    codes, scale, zero, values = grouped(weight)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {"qweight": packed(codes, 1, order), "qzeros": packed(zero, 1, order), "scales": scale}
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}, values


def pack_quantized(name, weight):
    """compressed-tensors' int4: signed codes, with 8 added to them."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1) / 7
    codes = (groups / scale[..., None]).round()
    tensors = {"weight_packed": packed(codes.flatten(1) + 8, 1), "weight_scale": scale}
    tensors["weight_shape"] = torch.tensor(weight.shape)
    values = (codes * scale[..., None]).flatten(1)
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}, values


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
        }
    },
}
# a format: how a matrix is written, its configuration, the package that computes it, whether that keeps the codes
FORMATS = {
    # transformers' own; without a GPU it expands them to bfloat16
    "fp8": (
        fp8,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]},
        "transformers",
        False,
    ),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
        "gptqmodel",
        True,
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        "gptqmodel",
        True,
    ),
    "compressed-tensors": (pack_quantized, COMPRESSED, "compressed_tensors", False),
}


def checkpoint(folder, method):
    """A model's folder with its layers' matrices in a format; and the same weights as plain numbers."""
    write, quantization, _, _ = FORMATS[method]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    other = torch.bfloat16 if method == "fp8" else torch.float16
    stored, plain = {}, {}
    for name, tensor in model.state_dict().items():
        tensors, plain[name] = (
            write(name.removesuffix(".weight"), tensor)
            if "_proj" in name
            else ({name: tensor.to(other)}, tensor.to(other))
        )
        stored |= tensors
    folder.mkdir()
    save_file(
        {key: tensor.contiguous() for key, tensor in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = {**model.config.to_dict(), "dtype": str(other).removeprefix("torch."), "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(96)}, unk_token="t1"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0").save_pretrained(folder)
    return model, plain


@pytest.mark.parametrize("method", FORMATS)
def test_quantized_weights_compute_as_what_they_stand_for(tmp_path, method):
    """
    Logits are near those of the same weights as plain numbers, and under an exact cache those of transformers.
    """
    _, _, package, kept = FORMATS[method]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model, plain = checkpoint(tmp_path / "model", method)
    dtype = torch.bfloat16 if method == "fp8" else torch.float32
    loaded = TransformersModel.load(catalog.resolve(str(tmp_path / "model")), str(dtype).removeprefix("torch."))
    model.load_state_dict(plain)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        found, expected = loaded.model(ids).logits.float(), model.to(dtype)(ids).logits.float()

    assert loaded.info.extra["weights"] == (method if kept else f"{method}, expanded to {loaded.info.compute_dtype}")
    # GPTQ's kernels for a CPU multiply in 16 bits; logits are as large as 10
    torch.testing.assert_close(found, expected, rtol=0, atol=0.25 if dtype == torch.bfloat16 else 0.02)
    agreed = agreement.check(loaded)
    assert agreed.typical <= agreed.tolerance


def test_weights_that_compute_in_another_dtype_are_refused(tmp_path):
    """
    A cell says what it computes in: what its library overrules is an error that says what to ask for.
    """
    checkpoint(tmp_path / "model", "fp8")
    source = catalog.resolve(str(tmp_path / "model"))

    with pytest.raises(ModelError, match="its fp8 weights compute in bfloat16: take compute_dtype: bfloat16"):
        TransformersModel.load(source, "float32")


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="gptqmodel is installed")
def test_a_package_that_is_not_here_is_named(tmp_path):
    """
    In one line, with how to have it.
    """
    checkpoint(tmp_path / "model", "gptq")

    with pytest.raises(ModelError, match=r"model 'model' cannot be loaded: .*pip install"):
        TransformersModel.load(catalog.resolve(str(tmp_path / "model")))


def test_a_plan_knows_quantized_weights_by_their_files(tmp_path):
    """
    Their method and the bytes of their files; the same weights in another format are another model.
    """
    facts = {}
    for method in ("gptq", "awq"):
        checkpoint(tmp_path / method, method)
        facts[method] = REAL.find_model(ModelSpec(name=str(tmp_path / method)))

    assert facts["gptq"].quantized == ("gptq", (tmp_path / "gptq" / "model.safetensors").stat().st_size)
    assert facts["gptq"].parameters is None, "bytes do not count them"
    assert facts["gptq"].revision != facts["awq"].revision
