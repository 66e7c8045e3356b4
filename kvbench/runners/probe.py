"""What a model's attention layers ask of a cache, found in one pass of a few tokens: which keys each query may read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvbench.faults import is_the_machine_s
from kvbench.runners.facts import NO_INTERFACE
from kvbench.runners.model_files import Layers, RefusedError, one_line

NAME = "kvbench_probe"  # among transformers' attention implementations, inside `windows` alone
TOKENS = 4
FAR = 2**17  # a position behind every window that models have

Windows = dict[int, int | None]


def windows(model: Any, layers: Layers, indices: tuple[int, ...]) -> Windows:
    """For each attention layer, by its number in the model, how many of the last tokens a query reads; None for all.

    transformers tells a layer's window to the attention function, or hides what lies before it by a mask alone, or
    both; the mask is what plain attention heeds, so it counts.
    layers, indices: the cache's layers (KV heads, head_dim), and their numbers in the model.

    Raises:
        RefusedError: the model asks of a cache what ours doesn't do.
    """
    seen = _Seen()
    name = model.config.model_type
    tokens = torch.arange(1, TOKENS + 1, device=model.device)[None]
    with _probing(model, seen), torch.inference_mode():
        try:
            decoder_of(model)(input_ids=tokens, use_cache=False)
        except _CannotError as error:
            raise RefusedError(f"models of type '{name}' {error}") from None
        except Exception as error:  # a model that no plain decoder is may fail anywhere
            if is_the_machine_s(error):
                raise
            raise RefusedError(f"models of type '{name}' can't run on this cache: {one_line(error)}") from error
    return _checked(name, seen, layers, indices)


def decoder_of(model: Any) -> PreTrainedModel:
    """What gives the last hidden states of tokens: the model without its head, and without an encoder of images."""
    found = model.get_decoder()  # some call their head a decoder
    inner: PreTrainedModel = found if isinstance(found, PreTrainedModel) else getattr(model, model.base_model_prefix)
    return inner


def _checked(name: str, seen: _Seen, layers: Layers, indices: tuple[int, ...]) -> Windows:
    """The windows that were seen, once the cache has a place for every layer that attends."""
    if not seen.calls:
        raise RefusedError(NO_INTERFACE.format(name))
    found: Windows = {}
    for index, shape in zip(indices, layers, strict=True):
        calls = seen.calls.get(index, [])
        if len(calls) != 1:
            raise RefusedError(
                f"models of type '{name}' attend {len(calls)} times a pass in layer {index}: this runner keeps one set "
                f"of keys and values a layer"
            )
        if calls[0].shape != (*shape, shape[1]):
            heads, head_dim, value_dim = calls[0].shape
            raise RefusedError(
                f"models of type '{name}' have {heads} KV heads with keys of {head_dim} and values of {value_dim} in "
                f"layer {index}: this runner expects {shape[0]} heads of {shape[1]}"
            )
        found[index] = calls[0].window
    if others := sorted(set(seen.calls) - set(indices)):
        raise RefusedError(f"models of type '{name}' attend in layer {others[0]}, which has no cache of its own")
    return found


@dataclass(frozen=True)
class _Call:
    """shape: KV heads, head_dim of keys, of values."""

    shape: tuple[int, int, int]
    window: int | None


@dataclass
class _Seen:
    """Calls by the layer's number; windows: of the masks that were made."""

    calls: dict[int, list[_Call]] = field(default_factory=dict)
    windows: list[int | None] = field(default_factory=list)


class _CannotError(Exception):
    """What the model does; its message goes on after the model's name."""


@contextmanager
def _probing(model: Any, seen: _Seen) -> Iterator[None]:
    """Inside the block attention is noted in `seen`, and gives zeros; each mask holds its own number."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        window = None
        if attention_mask is None:
            if not getattr(module, "is_causal", True):
                raise _CannotError("read tokens that follow: they are no decoders")
        else:
            number = int(attention_mask.flatten()[0])
            if not (0 <= number < len(seen.windows) and bool((attention_mask == number).all())):
                raise _CannotError("add to the attention scores what this runner does not")
            window = seen.windows[number]
        if key.shape[0] != 1 or key.shape[2] != query.shape[2]:
            raise _CannotError("attend to other keys than their own tokens'")
        call = _Call((key.shape[1], key.shape[3], value.shape[3]), window)
        seen.calls.setdefault(module.layer_idx, []).append(call)
        batch, heads, count, _dim = query.shape
        return query.new_zeros(batch, count, heads, value.shape[3]), None

    def mask(*, mask_function: Callable[..., Any], device: Any = "cpu", **sizes: Any) -> Tensor:
        seen.windows.append(_window(mask_function))
        shape = sizes.get("batch_size", 1), 1, sizes.get("q_length", TOKENS), sizes.get("kv_length", TOKENS)
        return torch.full(shape, float(len(seen.windows) - 1), device=device)

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)


def _window(mask_function: Callable[..., Any]) -> int | None:
    """How many of the last tokens a mask leaves; None for all that came before."""
    zero = torch.tensor(0)
    found = set()
    for query in (FAR, FAR + 3):
        keys = torch.arange(query + 2)
        visible = mask_function(zero, zero, torch.tensor(query), keys)
        visible = torch.as_tensor(visible).expand(len(keys))
        if bool(visible[-1]):
            raise _CannotError("read tokens that follow: they are no decoders")
        count = int(visible.sum())
        if count == 0 or not bool(visible[query + 1 - count : query + 1].all()):
            raise _CannotError("read neither all tokens before nor the last ones (attention in chunks or blocks)")
        found.add(None if count == query + 1 else count)
    if len(found) != 1:
        raise _CannotError("read neither all tokens before nor the last ones (attention in chunks or blocks)")
    return found.pop()
