"""Converting GGUF files."""

from __future__ import annotations

import hashlib
import os
import threading
import unicodedata
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kvbench.runners import catalog, facts, load, model_files
from kvbench.runners.gguf import conversion
from kvbench.runners.model_files import ModelError

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": True}


CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}
# a row of these is whole blocks of 256
K_QUANTS = {GGMLQuantizationType.Q4_K: 144, GGMLQuantizationType.Q6_K: 210}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}


def small_model(architecture, quantization=None):
    """A random transformers model that llama.cpp calls `architecture`, as wide as the quantization needs."""
    torch.manual_seed(0)
    extra = {"vocab_size": 300, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    extra |= WIDE if quantization in K_QUANTS else {}
    if architecture == "gemma3":
        kinds = ["sliding_attention"] * 5 + ["full_attention"]
        extra |= {"num_hidden_layers": 6, "layer_types": kinds, "sliding_window": 8}
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        extra["query_pre_attn_scalar"] = extra.get("head_dim", SMALL["head_dim"])
        extra["rope_parameters"] = {"full_attention": rope | {"rope_theta": 5e4}, "sliding_attention": rope}
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SMALL | extra))
    else:
        extra["tie_word_embeddings"] = architecture == "llama"
        if architecture == "qwen3":
            extra["head_dim"] = 128  # the only one that transformers' own loader reads
        if architecture == "phi3":
            extra["pad_token_id"] = 0
        name = CLASSES[architecture]
        config = getattr(transformers, f"{name}Config")(**SMALL | extra)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        # random norms and biases too, and scores far enough apart for a swapped head to show
        torch.nn.init.normal_(parameter, std=0.3 if quantization not in K_QUANTS else 0.1)
    return model.eval()


def quantized(weight, quantization):
    """The weight's blocks; of K quants, which gguf only reads, random blocks with scales that are numbers."""
    if quantization not in K_QUANTS:
        return gguf.quants.quantize(weight, quantization)
    size = K_QUANTS[quantization]
    random = np.random.default_rng(weight.size)
    blocks = random.integers(0, 256, (weight.shape[0], weight.shape[1] // 256, size), np.uint8)
    # their float16 scales, of the codes and of the offsets: weights of about 0.1 and both signs
    places = {0: 5e-4, 2: 4e-3} if quantization == GGMLQuantizationType.Q4_K else {size - 2: 1e-4}
    for place, scale in places.items():
        values = random.uniform(scale / 2, scale, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., place : place + 2] = values.view(np.uint8)
    return blocks.reshape(weight.shape[0], -1)


def write_gguf(
    path,
    model,
    architecture,
    quantization=GGMLQuantizationType.F32,
    *,
    pre=None,
    extra_tensor=None,
    scaling=None,
    left_out=None,
):
    """The model as llama.cpp's converter would write it, its matrices quantized; `model` gets what they decode to."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5e4)
    if scaling:
        writer.add_rope_scaling_type(scaling)
    add_tokenizer(writer, architecture, config.vocab_size, pre or PRE.get(architecture))
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_dimension_count(config.head_dim)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        file_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if (name == "lm_head.weight" and config.tie_word_embeddings) or file_name == left_out:
            continue
        weight = tensor.numpy().copy()
        if architecture == "gemma3" and file_name.endswith("norm.weight"):
            weight = weight + np.float32(1)
            tensor.copy_(torch.from_numpy(weight - np.float32(1)))
        permuted = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        heads = permuted.get(file_name.split(".")[-2]) if architecture == "llama" else None
        if heads:
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        if weight.ndim == 2:
            stored = quantized(weight, quantization)
            writer.add_tensor(file_name, stored, raw_dtype=quantization)
            weight = gguf.quants.dequantize(stored, quantization)
            if heads:
                weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
        else:
            writer.add_tensor(file_name, weight)
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2", "phi3": "qwen2"}


def add_tokenizer(writer, architecture, size, pre):
    """A vocabulary of bytes and a few merges, Gemma's kind for gemma3."""
    if architecture == "gemma3":
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
        tokens += [*"abcdefghij", "ab", "bc", "abc", "▁a", "  ", "   "]
        kinds = [3, 3, 3, 2, 1] + [6] * 256 + [1] * 14 + [4] * 2
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * size)
        merges, (bos, eos, unknown, pad) = None, (2, 1, 3, 0)
    else:
        merges = ["Ġ Ġ", "ĠĠ Ġ", "h e", "Ċ Ċ", "Ġ he", "1 2", "12 3", "3 4", "' l", "'l l", "' L", "'L L", "! Ċ"]
        tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values()]
        tokens += [merge.replace(" ", "") for merge in merges]
        kinds = [3, 3, 3] + [1] * (len(tokens) - 3)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        if pre != "llama-bpe":
            writer.add_add_bos_token(False)
        bos, eos, unknown, pad = 1, 2, 0, 2
    filler = size - len(tokens)
    writer.add_token_list(tokens + [f"<unused{index}>" for index in range(filler)])
    writer.add_token_types(kinds + [5] * filler)
    if merges:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(unknown)
    writer.add_pad_token_id(pad)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


def logits(model, ids=tuple(range(20, 60))):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("quantization", ["F32", "Q8_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2", "qwen3"])
def test_a_converted_model_computes_what_the_original_did(architecture, quantization, tmp_path, cache):
    """Through llama.cpp's layout and back, the logits are the same to the bit in float32."""
    quantization = GGMLQuantizationType[quantization]
    original = small_model(architecture, quantization)
    file = write_gguf(tmp_path / "small.gguf", original, architecture, quantization)

    model, _, info, _ = load.load(catalog.resolve(str(file)), "float32")

    assert torch.equal(logits(model), logits(original))
    assert logits(original).std() > 0.1
    assert info.layers == ((2, original.config.head_dim),) * original.config.num_hidden_layers
    assert facts.shape(catalog.resolve(str(file))) == (info.layers, 128)


@pytest.mark.parametrize(
    ("architecture", "quantization", "dtype"),
    [
        *(("llama", "Q4_1", dtype) for dtype in ("float32", "bfloat16", "float16")),
        *(("qwen2", quantization, "float32") for quantization in ("F32", "Q8_0", "Q5_0", "Q6_K")),
        *(("qwen2", "Q4_K", dtype) for dtype in ("float32", "bfloat16", "float16")),
        ("qwen3", "Q4_K", "float32"),
    ],
)
def test_conversion_agrees_with_the_loader_of_transformers(architecture, quantization, dtype, tmp_path, cache):
    """In every compute dtype, its logits to the bit."""
    quantization = GGMLQuantizationType[quantization]
    file = write_gguf(tmp_path / "small.gguf", small_model(architecture, quantization), architecture, quantization)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=getattr(torch, dtype)
    ).eval()

    ours, _, info, _ = load.load(catalog.resolve(str(file)), dtype)

    assert ours.dtype == getattr(torch, dtype)
    assert info.compute_dtype == dtype
    assert torch.equal(logits(ours), logits(theirs))


def test_a_16_bit_model_is_stored_in_16_bits(tmp_path, cache):
    """It takes half the disk, and its weights are those that a folder in float32 gives when it is loaded so."""
    file = write_gguf(tmp_path / "small.gguf", small_model("qwen2"), "qwen2", GGMLQuantizationType.Q8_0)
    source = catalog.resolve(str(file))

    half, _, _, _ = load.load(source, "bfloat16")
    (stored,) = (cache / "models").glob("small-*/model-*.safetensors")
    size = stored.stat().st_size
    load.prepare(source, "float32")
    whole, _, _, _ = load.load(source, "bfloat16")

    assert size < 2.1 * sum(parameter.numel() for parameter in half.parameters())
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), whole.parameters(), strict=True))
    assert not list((cache / "models").glob("small-*-float16"))


TEXTS = (
    "he said:\n\n  hé   日本 <|im_end|>",
    "12345 he1234  12\t34",
    "he'll HE'LL I'm 'lx",
    "e\u0301 \u00e9 ﬁ \u1100\u1161",  # letters that NFC joins
    "!\n\n!! \r\n  \n   x",
    "  ",
    "",
)


@pytest.mark.parametrize(("architecture", "pre"), [("llama", "smollm"), ("qwen2", "qwen2"), ("llama", "llama-bpe")])
def test_tokens_are_those_of_transformers(architecture, pre, tmp_path, cache):
    """But for what transformers' conversion leaves out: SmolLM's cuts at digits, Qwen's NFC, Llama 3's bos."""
    file = write_gguf(tmp_path / "small.gguf", small_model(architecture), architecture, pre=pre)
    _, ours, _, _ = load.load(catalog.resolve(str(file)), "float32")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)

    for text in TEXTS:
        if pre != "smollm" or "1" not in text:
            normal = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
            assert ours(text, add_special_tokens=False).input_ids == theirs(normal).input_ids, text


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["he", "ĊĊ", "1", "2", "3", "4", "'ll", "Ġ", "Ġhe", "'", "L", "L", "!", "Ċ"]),
        ("qwen2", ["he", "ĊĊ", "1", "2", "3", "4", "'ll", "Ġ", "Ġhe", "'LL", "!Ċ"]),
        ("llama-bpe", ["<|im_start|>", "he", "ĊĊ", "123", "4", "'ll", "Ġ", "Ġhe", "'LL", "!Ċ"]),
    ],
)
def test_each_kind_cuts_in_its_own_way(pre, expected, tmp_path, cache):
    """Digits alone, or in threes; a contraction in capitals or not; bos first where the kind has it."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama", pre=pre)
    _, tokenizer, _, _ = load.load(catalog.resolve(str(file)), "float32")

    assert tokenizer.convert_ids_to_tokens(tokenizer("he\n\n1234'll  he'LL!\n").input_ids) == expected


def test_gemmas_tokens_are_those_of_transformers(tmp_path, cache):
    """Pieces, runs of spaces, bytes of unknown letters, bos: as transformers 5.23 reads the file."""
    file = write_gguf(tmp_path / "small.gguf", small_model("gemma3"), "gemma3")
    _, ours, _, _ = load.load(catalog.resolve(str(file)), "float32")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)

    assert ours.convert_ids_to_tokens(ours("abc a").input_ids)[-2:] == ["abc", "▁a"]
    for text in ("abc abcab", "a  b   c    ab", "é\nZ", "<bos>a", ""):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)


def test_a_model_is_converted_once(tmp_path, cache, monkeypatch):
    """The second load reads what the first one wrote, and a copy of the file elsewhere is the same model."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama")
    first, _, info, _ = load.load(catalog.resolve(str(file)), "float32")

    def fail(*args):
        raise AssertionError("converted again")

    monkeypatch.setattr(conversion, "_write_folder", fail)
    (tmp_path / "elsewhere").mkdir()
    copy = file.rename(tmp_path / "elsewhere" / file.name)
    second, _, again, _ = load.load(catalog.resolve(str(copy)), "float32")

    assert torch.equal(logits(first), logits(second))
    assert info == again


def other_weights(folder):
    file = folder / "model-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def a_fifo(folder):
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


DAMAGES = {
    "a bit of the weights": (other_weights, "model-00001.safetensors was changed after it was written"),
    "a file lost": (lambda folder: (folder / "generation_config.json").unlink(), "it lacks the file, generation_conf"),
    "a file more": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "it has another file, adapter_c"),
    "a FIFO": (a_fifo, "it is no file"),
    "broken sums": (lambda folder: (folder / "checksums.json").write_text("["), "cannot read"),
    "of before checksums": (lambda folder: (folder / "checksums.json").unlink(), "it has no checksums"),
}


@pytest.mark.parametrize(("damage", "why"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_conversion_is_made_again(tmp_path, cache, caplog, damage, why):
    """What is not as it was written, or can't be proved to be, is replaced with a line: then it is whole, and used."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama")
    source = catalog.resolve(str(file))
    folder = load.prepare(source)
    before = logits(load.load(source, "float32")[0])
    caplog.clear()
    damage(folder)

    model, _, _, _ = load.load(source, "float32")

    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("kvbench")]
    assert line.startswith(f"{folder}: ")
    assert why in line
    assert line.endswith("; converted again")
    assert torch.equal(logits(model), before)
    caplog.clear()
    assert load.prepare(source) == folder
    assert not caplog.records


def test_a_damaged_float32_folder_serves_nobody(tmp_path, cache):
    """A sweep in 16 bits takes the float32 conversion where it is whole, and makes its own where it is not."""
    source = catalog.resolve(str(write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama")))
    whole = load.prepare(source)
    assert load.prepare(source, "bfloat16") == whole
    other_weights(whole)

    assert load.prepare(source, "bfloat16").name == f"{whole.name}-bfloat16"


def test_a_conversion_that_ended_early_leaves_nothing(tmp_path, cache, monkeypatch):
    """An error in it leaves no folder; what a killed one left behind is replaced, not used."""
    original = small_model("llama")
    file = write_gguf(tmp_path / "small.gguf", original, "llama")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_tokenizer", lambda *args: 1 / 0)
        with pytest.raises(ModelError, match=r"small\.gguf cannot be converted: division by zero"):
            load.load(catalog.resolve(str(file)), "float32")
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == []
    name = f"small-{model_files.file_sha256(file)[:16]}-c{conversion.CONVERTER}.{conversion.FOLDER}"
    abandoned = cache / "models" / f".draft-{name}"
    abandoned.mkdir()
    (abandoned / "config.json").write_text("{")

    model, _, _, _ = load.load(catalog.resolve(str(file)), "float32")

    assert torch.equal(logits(model), logits(original))
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == [name]


def test_two_at_once_convert_once(tmp_path, cache, monkeypatch):
    """The one that comes second waits for the first one's folder."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama")
    calls, folders, write = [], [], conversion._write_folder
    monkeypatch.setattr(conversion, "_write_folder", lambda *args: (calls.append(1), write(*args)))
    source = catalog.resolve(str(file))

    threads = [threading.Thread(target=lambda: folders.append(load.prepare(source))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(calls) == 1
    assert len(folders) == 3
    assert len(set(folders)) == 1


def test_large_models_are_written_in_shards(tmp_path, cache, monkeypatch):
    """A model of many shards is the same model."""
    original = small_model("llama")
    file = write_gguf(tmp_path / "small.gguf", original, "llama")
    monkeypatch.setattr(conversion, "SHARD_BYTES", 50_000)

    source = catalog.resolve(str(file))

    assert len(list(load.prepare(source).glob("*.safetensors"))) > 2
    assert torch.equal(logits(load.load(source, "float32")[0]), logits(original))


def test_slices_are_joined_and_nothing_of_them_is_left(tmp_path, cache, monkeypatch):
    """A file cut in three packages is the model that the whole file is; the joined file is gone afterwards."""
    whole = write_gguf(tmp_path / "whole.gguf", small_model("llama"), "llama")
    content, slices = whole.read_bytes(), []
    for index, part in enumerate((content[:1000], content[1000:5000], content[5000:]), start=1):
        (tmp_path / f"fake_part{index}" / "data").mkdir(parents=True)
        (tmp_path / f"fake_part{index}" / "__init__.py").write_text("raise RuntimeError('imported')")
        (tmp_path / f"fake_part{index}" / "data" / "part.bin").write_bytes(part)
        slices.append((f"fake-part{index}", "data/part.bin"))
    monkeypatch.syspath_prepend(tmp_path)
    model = catalog.EMBEDDED["smollm2-135m-instruct"]
    model = replace(model, slices=tuple(slices), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(catalog.EMBEDDED, model.name, model)

    ours, _, _, _ = load.load(catalog.resolve(model.name), "float32")
    theirs, _, _, _ = load.load(catalog.resolve(str(whole)), "float32")

    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not [path for path in cache.rglob("*") if path.suffix == ".gguf" or path.name.startswith(".draft")]
    monkeypatch.setitem(catalog.EMBEDDED, model.name, replace(model, slices=model.slices[::-1]))
    assert [check.status for check in catalog.doctor() if model.name in check.name] == ["fail"]
    (tmp_path / "fake_part2" / "data" / "part.bin").unlink()
    found = catalog.resolve(model.name)
    assert not found.available
    assert "fake-part2 has no file data/part.bin: make model MODEL=smollm2-135m-instruct, or pip" in found.missing


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -400])
def test_a_truncated_file_is_refused(keep, tmp_path, cache):
    """Cut in its header, its vocabulary or its last tensor, a file is an error of one line and no folder."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama")
    file.write_bytes(file.read_bytes()[:keep])

    with pytest.raises(ModelError, match=r"small\.gguf is not a whole GGUF file") as caught:
        load.load(catalog.resolve(str(file)), "float32")
    assert "\n" not in str(caught.value)
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]


def test_other_architectures_go_through_transformers(tmp_path, cache):
    """What the converter does not know is read by transformers' own GGUF loader, and computes what it should."""
    original = small_model("phi3")
    file = write_gguf(tmp_path / "small.gguf", original, "phi3")
    source = catalog.resolve(str(file))

    model, _, info, _ = load.load(source, "float32")

    torch.testing.assert_close(logits(model), logits(original))
    assert info.layers == ((2, 16),) * 2
    assert facts.shape(source) == (info.layers, 128)
    with pytest.raises(ModelError, match="not converted to a folder"):
        load.prepare(source)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"extra_tensor": "rope_freqs.weight"}, "has a tensor rope_freqs.weight that its architecture has not"),
        ({"scaling": gguf.RopeScalingType.LINEAR}, "rope.scaling.type = linear is not converted"),
        ({"left_out": "blk.1.attn_q.weight"}, "lacks the tensor blk.1.attn_q.weight"),
    ],
)
def test_nothing_in_a_file_is_left_out_in_silence(extra, expected, tmp_path, cache):
    """Scaled positions, which transformers' own loader would drop, and missing weights are refused."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama", **extra)

    with pytest.raises(ModelError, match=expected):
        load.load(catalog.resolve(str(file)), "float32")


def test_an_architecture_that_no_one_knows_is_refused(tmp_path, cache):
    """What transformers cannot read either is one line."""
    writer = GGUFWriter(tmp_path / "odd.gguf", "rwkv7")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(ModelError, match=r"model 'odd' cannot be loaded: .*rwkv7") as caught:
        load.load(catalog.resolve(str(tmp_path / "odd.gguf")), "float32")
    assert "\n" not in str(caught.value)
