"""Where an answer ends."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvbench.cache import PageTable
from kvbench.runners.base import GenerateRequest
from kvbench.runners.transformers.decode import Decoding
from kvbench.runners.transformers.stopping import Stopping, decodes_by_token


def byte_level():
    """Tokens of single bytes, which are parts of characters, and of two letters."""
    ((pieces, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("ab ä€\n")
    return made({*pieces, "ab"}, decoders.ByteLevel())


def byte_fallback():
    """Tokens of characters, and of bytes where a character has none."""
    pieces = {"a", "▁", "ab", *(f"<0x{byte:02X}>" for byte in "ä\n€".encode())}
    return made(pieces, decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def strips():
    """Tokens of words, whose text is stripped at its beginning: what is decoded in pieces is another text."""
    kinds = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return made({"a", "▁a", "▁b", "▁"}, decoders.Sequence(kinds))


def made(pieces, decoder):
    """A tokenizer of these pieces, a special token and one that is added and not special."""
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(sorted(pieces))}, []))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<b>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


TOKENIZERS = {one.__name__: one() for one in (byte_level, byte_fallback, strips)}


def test_a_tokenizer_whose_text_is_not_its_tokens_is_decoded_whole():
    """
    Only tokenizers known to join what their tokens are by themselves are decoded in pieces.
    """
    assert {name: decodes_by_token(one) for name, one in TOKENIZERS.items()} == {
        "byte_level": True, "byte_fallback": True, "strips": False,
    }  # fmt: skip
    assert not decodes_by_token(SimpleNamespace())


def ended(tokenizer, blocks, stop, by_token):
    """(text, tokens) of an answer that comes in these blocks."""
    stopping = Stopping(tokenizer, SimpleNamespace(eos_token_id=None))
    stopping._by_token = by_token
    sequence = Decoding(0, GenerateRequest((1,), 24, stop), PageTable())
    for block in blocks:
        text = stopping.extend(sequence, block)
        if text is not None:
            return text, sequence.tokens
    return None, sequence.tokens


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(max_examples=300)
@given(st.lists(st.lists(st.integers(0, 11), max_size=3), min_size=1, max_size=8), st.data())
def test_stop_strings_are_found_in_pieces_as_in_the_whole(name, blocks, data):
    """
    An answer ends at the same token with the same text, whether its text is decoded in pieces or whole each time,
    where characters, special tokens and stop strings are cut by blocks too.
    """
    tokenizer = TOKENIZERS[name]
    blocks = [[token % len(tokenizer) for token in block] for block in blocks]
    # what is in the text of some of the tokens, so that stop strings are found
    tokens = [token for block in blocks for token in block]
    text = tokenizer.decode(tokens[: data.draw(st.integers(0, len(tokens)))])
    first = data.draw(st.integers(0, len(text)))
    stop = (text[first : first + 4] or "x", data.draw(st.sampled_from(["<|im_end|>", "\ufffd", "b a", ">a"])))

    assert ended(tokenizer, blocks, stop, by_token=True) == ended(tokenizer, blocks, stop, by_token=False)


def test_a_special_token_does_not_end_a_run_of_bytes():
    """
    Bytes on both sides of a special token that is left out are decoded together, so the first are not settled at it.
    """
    tokenizer = TOKENIZERS["byte_fallback"]
    first, second, other, special = (
        tokenizer.convert_tokens_to_ids(token) for token in ("<0xC3>", "<0xA4>", "<0xE2>", "<|im_end|>")
    )
    blocks = [[first, second, special], [other]]
    assert tokenizer.decode([*blocks[0], *blocks[1]], skip_special_tokens=True) == 3 * "\ufffd"

    assert ended(tokenizer, blocks, ("ä\ufffd",), by_token=True) == (None, [*blocks[0], *blocks[1]])
