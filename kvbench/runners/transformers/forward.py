"""One forward pass of a model over a flat batch, whose attention writes to the caches and reads only them.

A decoder is token-wise outside attention, so many sequences without padding are one row of tokens with position
ids: our attention function knows where each begins. Models whose other layers carry state too (linear attention),
or whose rotary frequencies depend on the longest position of a pass, run one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from kvbench.attention import Batch, Implementation, append, attend
from kvbench.cache import PagedCache
from kvbench.runners.facts import cache_layer_indices
from kvbench.runners.nudge import nudged
from kvbench.runners.placement import Places
from kvbench.runners.probe import Windows, decoder_of
from kvbench.runners.rope import Frequencies
from kvbench.runners.transformers.fused import Fused
from kvbench.runners.transformers.stand_ins import Counter, decoder_returns

NAME = "kvbench"  # of our attention among transformers' implementations


@dataclass(frozen=True)
class Part:
    """Some of a pass's tokens, and the caches that keep their keys and values.

    window: what `packed` holds, in 16 bits. whole: all rows exactly; read in place of the others where it is given.
    """

    batch: Batch
    packed: PagedCache
    window: PagedCache | None = None
    whole: PagedCache | None = None


@dataclass(frozen=True)
class _Step:
    """What our attention function needs to know of the forward pass it is called in: parts, in the tokens' order."""

    positions: Tensor  # [T], of the tokens
    parts: tuple[Part, ...]
    layer_index: dict[int, int]  # the model's layer number to the cache's
    windows: Windows  # by the model's layer number
    impl: Implementation
    places: Places
    there: dict[torch.device, tuple[Tensor, tuple[Part, ...]]] = field(default_factory=dict)

    def at(self, layer: int) -> tuple[Tensor, tuple[Part, ...]]:
        """Positions and parts where this layer of the model is: they go to a device once a pass."""
        if len(self.places.devices) == 1:
            return self.positions, self.parts
        device = self.places.layers[layer]
        if device not in self.there:
            parts = tuple(replace(part, batch=part.batch.to(device)) for part in self.parts)
            self.there[device] = self.positions.to(device, non_blocking=True), parts
        return self.there[device]


_step: ContextVar[_Step] = ContextVar("kvbench_step")

# called with the model's number of a layer, its new queries [T, HQ, D], keys and values [T, HKV, D], and positions [T]
Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor, float], None]
_observer: ContextVar[Observer | None] = ContextVar("kvbench_observer", default=None)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside the block `observer` is called with what each attention layer gets."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def _attention(
    module: Any,
    query: Tensor,  # [1, HQ, T, D]
    key: Tensor,  # [1, HKV, T, D]
    value: Tensor,  # [1, HKV, T, D]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the new keys and values, then read only the cache: [1, T, HQ, D]."""
    step = _step.get()
    # Triton launches where torch stands
    split = query.is_cuda and len(step.places.devices) > 1
    with torch.cuda.device(query.device) if split else nullcontext():
        return _attended(step, module, query, key, value, scaling, softcap, s_aux), None


def _attended(
    step: _Step,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    layer = step.layer_index[module.layer_idx]
    positions, parts = step.at(module.layer_idx)
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (observer := _observer.get()) is not None:
        observer(module.layer_idx, queries, keys, values, positions, scaling)
    outs = []
    rows: Any = ([x] for x in (queries, keys, values, positions))
    if len(parts) > 1:
        sizes = [len(part.batch.slot_mapping) for part in parts]
        rows = (x.split(sizes) for x in (queries, keys, values, positions))
    for part, q, k, v, own in zip(parts, *rows, strict=True):
        batch = part.batch
        # looked up once a pass; beside kernels nothing waits for the device
        skips = batch.skips if step.impl == "reference" else None
        options: dict[str, Any] = {"impl": step.impl, "skips": skips}
        learned = own if part.packed.scheme.learns else None
        append(
            part.packed,
            layer,
            k,
            v,
            batch.slot_mapping,
            positions=learned,
            exact=part.window,
            near=batch.near,
            **options,
        )
        if part.whole is not None:
            append(part.whole, layer, k, v, batch.slot_mapping, **options)
        outs.append(
            attend(
                q,
                part.whole or part.packed,
                layer,
                batch,
                impl=step.impl,
                scaling=scaling,
                sliding_window=step.windows[module.layer_idx],
                softcap=softcap,
                sinks=s_aux,
                exact=None if part.whole else part.window,
                window=None if part.whole else part.packed.scheme.window,
            )
        )
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]


@contextmanager
def paged_attention(model: Any) -> Iterator[None]:
    """`model` attends through the paged cache inside the block, and as before after it.

    No mask is registered under our name, so transformers makes none: our attention knows the sequences' boundaries, and
    the layers' windows from what its masks would hide (`probe`).
    """
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME)


class Forward:
    """A model as a function of a flat batch. impl: who computes its attention. windows: see `probe`.

    places: where it is. nudge: the seed of a noise of one ulp in the model's embedding; 0: without.
    fused: what kernels compute of it beside attention; None for nothing.
    """

    def __init__(
        self,
        model: Any,
        places: Places,
        windows: Callable[[], Windows],
        impl: Implementation,
        nudge: int = 0,
        fused: Callable[[], Fused] | None = None,
    ) -> None:
        self.model = model
        self.places = places
        self.vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
        self._windows = windows
        self._impl = impl
        self._nudge = nudge
        self.fused = fused
        config = model.config.get_text_config(decoder=True)
        layers = cache_layer_indices(config)
        self._layer_index = {layer: i for i, layer in enumerate(layers)}
        self._has_state = len(layers) < config.num_hidden_layers
        self._state: DynamicCache | None = None  # of a sequence that runs alone
        self._frequencies = Frequencies(model)

    @property
    def alone(self) -> bool:
        """Whether sequences are computed one at a time."""
        return self._has_state or self._frequencies.moves

    @property
    def rope_moves(self) -> bool:
        """Whether a longer sequence has other rotary frequencies."""
        return self._frequencies.moves

    def begin(self) -> None:
        """What follows is a new sequence: nothing is left of the one before."""
        self._state = self._new_state()
        self._frequencies.reset()

    def end(self) -> None:
        """No sequence is being computed."""
        self._state = None

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Inside the block the model attends through the paged cache, and kernels compute what they can of the rest."""
        with paged_attention(self.model), self.fused().applied() if self.fused else nullcontext():
            yield

    def hidden(self, tokens: Tensor, positions: Tensor, parts: Sequence[Part]) -> Tensor:
        """Last hidden states [T, H] of tokens [T] at positions [T], which these parts are of."""
        tokens, positions = (x.to(self.places.first, non_blocking=True) for x in (tokens, positions))
        token = _step.set(_Step(positions, tuple(parts), self._layer_index, self._windows(), self._impl, self.places))
        try:
            decoder = decoder_of(self.model)
            with nudged(self.model, self._nudge) if self._nudge else nullcontext():
                out = decoder(
                    input_ids=tokens[None],
                    position_ids=positions[None],
                    past_key_values=self._state,
                    use_cache=self._state is not None,
                )
        finally:
            _step.reset(token)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, vocabulary] in the compute dtype, by what follows the model's decoder, of hidden states [n, H]."""
        device = self.places.last
        with decoder_returns(self.model, hidden[None].to(device)):
            blank = torch.zeros(1, len(hidden), dtype=torch.int64, device=device)
            logits: Tensor = self.model(input_ids=blank, use_cache=False).logits[0]
        return logits

    @torch.inference_mode()
    def log_probs(self, hidden: Tensor) -> Tensor:
        """[n, vocabulary] float32 log-probabilities of hidden states [n, H]."""
        return self.logits(hidden).to(torch.float32).log_softmax(-1)

    def _new_state(self) -> DynamicCache | None:
        """What a model's other layers carry from pass to pass; None where they carry nothing."""
        if not self._has_state:
            return None
        state = DynamicCache(config=self.model.config)
        for layer in self._layer_index:
            state.layers[layer] = Counter()
        return state
