"""Converting GGUF files."""

from __future__ import annotations

import threading

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


def small_model(architecture):
    """A random transformers model that llama.cpp calls `architecture`."""
    torch.manual_seed(0)
    extra = {"vocab_size": 300, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    if architecture == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | extra))
    elif architecture == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL | extra))
    else:
        kinds = ["sliding_attention"] * 5 + ["full_attention"]
        extra |= {"num_hidden_layers": 6, "layer_types": kinds, "sliding_window": 8, "query_pre_attn_scalar": 16}
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        extra["rope_parameters"] = {"full_attention": rope | {"rope_theta": 5e4}, "sliding_attention": rope}
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SMALL | extra))
    for parameter in model.parameters():
        # random norms too, and scores far enough apart for a swapped head to show
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def write_gguf(
    path, model, architecture, quantization=GGMLQuantizationType.F32, *, extra_tensor=None, scaling=None, left_out=None
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
    add_tokenizer(writer, architecture, config.vocab_size)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_dimension_count(config.head_dim)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        file_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name == "lm_head.weight" or file_name == left_out:
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
            stored = gguf.quants.quantize(weight, quantization)
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


def add_tokenizer(writer, architecture, size):
    """A vocabulary of bytes and a few merges; SmolLM's kind for llama, Gemma's kind for gemma3."""
    if architecture == "gemma3":
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
        tokens += [*"abcdefghij", "ab", "bc", "abc", "▁a", "  ", "   "]
        kinds = [3, 3, 3, 2, 1] + [6] * 256 + [1] * 14 + [4] * 2
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * size)
        merges, (bos, eos, unknown, pad) = None, (2, 1, 3, 0)
    else:
        merges = ["Ġ Ġ", "ĠĠ Ġ", "h e", "Ċ Ċ", "Ġ he"]
        tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values()]
        tokens += [merge.replace(" ", "") for merge in merges]
        kinds = [3, 3, 3] + [1] * (len(tokens) - 3)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
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


@pytest.mark.parametrize(
    "quantization", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1]
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_converted_model_computes_what_the_original_did(architecture, quantization, tmp_path, cache):
    """Through llama.cpp's layout and back, the logits are the same to the bit in float32."""
    original = small_model(architecture)
    file = write_gguf(tmp_path / "small.gguf", original, architecture, quantization)

    model, _, info = load.load(catalog.resolve(str(file)), "float32")

    assert torch.equal(logits(model), logits(original))
    assert logits(original).std() > 0.1
    assert info.layers == ((2, 16),) * original.config.num_hidden_layers
    assert facts.shape(catalog.resolve(str(file))) == (info.layers, 128)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_conversion_agrees_with_the_loader_of_transformers(dtype, tmp_path, cache):
    """In every compute dtype: its logits to the bit and, but for text with digits, its tokens."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama", GGMLQuantizationType.Q4_1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=getattr(torch, dtype)
    ).eval()

    ours, tokenizer, info = load.load(catalog.resolve(str(file)), dtype)

    assert ours.dtype == getattr(torch, dtype)
    assert info.compute_dtype == dtype
    assert torch.equal(logits(ours), logits(theirs))
    assert tokenizer.convert_ids_to_tokens(tokenizer("he\n\n1").input_ids) == ["he", "ĊĊ", "1"]
    text = "he said:\n\n  hé   日本 <|im_end|>"
    assert (
        tokenizer(text).input_ids
        == transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)(text).input_ids
    )


def test_gemmas_tokens_are_those_of_transformers(tmp_path, cache):
    """Pieces, runs of spaces, bytes of unknown letters, bos: as transformers 5.23 reads the file."""
    file = write_gguf(tmp_path / "small.gguf", small_model("gemma3"), "gemma3")
    _, ours, _ = load.load(catalog.resolve(str(file)), "float32")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)

    assert ours.convert_ids_to_tokens(ours("abc a").input_ids)[-2:] == ["abc", "▁a"]
    for text in ("abc abcab", "a  b   c    ab", "é\nZ", "<bos>a", ""):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)


def test_a_model_is_converted_once(tmp_path, cache, monkeypatch):
    """The second load reads what the first one wrote, and a copy of the file elsewhere is the same model."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama")
    first, _, info = load.load(catalog.resolve(str(file)), "float32")

    def fail(*args):
        raise AssertionError("converted again")

    monkeypatch.setattr(conversion, "_write_folder", fail)
    (tmp_path / "elsewhere").mkdir()
    copy = file.rename(tmp_path / "elsewhere" / file.name)
    second, _, again = load.load(catalog.resolve(str(copy)), "float32")

    assert torch.equal(logits(first), logits(second))
    assert info == again


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

    model, _, _ = load.load(catalog.resolve(str(file)), "float32")

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
    original = small_model("qwen2")
    file = write_gguf(tmp_path / "small.gguf", original, "qwen2")
    source = catalog.resolve(str(file))

    model, _, info = load.load(source, "float32")

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
