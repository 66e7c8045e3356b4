"""What the tests of tasks share: a context whose baseline is the toy model without noise, and a made-up mirror."""

import json

import pytest

from kvbench.runners.toy import ToyRunner
from kvbench.tasks import RunContext

ROWS = {
    "allenai/ai2_arc/ARC-Easy/test": {
        "id": "a",
        "question": "Which is a gas?",
        "choices": {"text": ["iron", "air", "salt", "ice"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    "baber/piqa/default/validation": {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Eat it.", "label": 0},
    "openai/gsm8k/main/test": {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    "openai/gsm8k/main/train": {"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    "EleutherAI/lambada_openai/default/test": {"text": "the cat saw the dog, and the dog saw the cat"},
    "wikitext/wikitext-2-v1/test": {"page": " \n = Title = \n \n Some text , with words @-@ and more . \n"},
}
# a field whose text makes one row differ from the next
TEXT = {"arc": "question", "piqa": "goal", "gsm8k": "question", "lambada": "text", "wikitext": "page"}


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def mirror(tmp_path):
    """A data folder with six made-up rows for each data set."""
    for place, row in ROWS.items():
        field = next(field for part, field in TEXT.items() if part in place)
        rows = [row | {field: f"{i} {row[field]}"} for i in range(6)]
        write_rows(tmp_path / f"{place}.jsonl", rows)
    return tmp_path


@pytest.fixture
def context():
    """A run's context whose baseline is the toy model without noise."""
    return RunContext(baseline=lambda key, compute: compute(ToyRunner()), progress=lambda done, total: None)


@pytest.fixture
def tiny_llama():
    """Makes a random Llama of two layers, 4 query and 2 KV heads of 8, for a tokenizer's vocabulary."""

    import transformers

    def made(tokenizer, positions):
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=positions,
            initializer_range=0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return transformers.LlamaForCausalLM(config).eval()

    return made
