"""GGUF files: read, and converted once to an ordinary model folder.

A file of a known architecture is converted in float32: a dequantized weight is scale x code + offset and fits no
16-bit type. So each compute dtype gets the weights that transformers' own GGUF loader would give it, bit for bit, at a
tenth of its time. Stored as bfloat16, the embedded model would lose the low bits of all but its norms: mean KL 5e-5
nats a token, perplexity 12.020 to 12.027 (2048 tokens of pydoc's topics, float32 compute).

The folder is walked: an architecture or a tokenizer is an instance in one of its files, listed nowhere.
"""

from kvbench.runners.gguf.conversion import CONVERTER, convert
from kvbench.runners.gguf.read import read_gguf

__all__ = ["CONVERTER", "convert", "read_gguf"]
