"""A model's norms, rotary positions and gated activations by one kernel each, where that gives what its own code gives.

Nobody's word is taken for it: each kind of module is run on random numbers beside the kernel, and what differs by more
than a sum's order stays as it is. Layers of one input are one product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.runners.probe import decoder_of
from kvbench.runners.transformers.joined import Joined

ROPE = "apply_rotary_pos_emb"  # what transformers' models call that function
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ROWS = 64  # of random numbers

Call = Callable[..., Any]


class Fused:
    """What kernels compute of a model inside `applied`, and as before outside of it.

    forwards: of modules, in place of their own. functions: of Python modules, by name.
    """

    def __init__(self, model: Any, head_dims: set[int]) -> None:
        # imported here, for Triton decides on import whether it interprets
        from kvbench.attention import around

        several = len({parameter.device for parameter in model.parameters()}) > 1
        names = ("rms_norm", "gated", "rotary", "peaks")
        self._kernels: dict[str, Call] = {
            name: _where_it_is(getattr(around, name)) if several else getattr(around, name) for name in names
        }
        self._gates, self._dtype = around.GATES, model.dtype
        self.forwards: dict[nn.Module, Call] = {}
        self.functions: dict[tuple[str, str], Call] = {}
        decoder = decoder_of(model)
        known: dict[Any, Any] = {}  # of a kind of module, how the kernel computes it; None if it doesn't
        with torch.inference_mode():
            for module in decoder.modules():
                for find in (self._norm, self._gate):
                    if made := find(module, known):
                        self.forwards[module] = made
                if joined := Joined.of(module, PROJECTIONS, model.dtype):
                    self.forwards |= joined.forwards()
            dtype, device = model.dtype, model.device
            for name in dict.fromkeys(type(module).__module__ for module in decoder.modules()):
                rope = getattr(sys.modules[name], ROPE, None)
                if rope and all(_turns(rope, self._kernels["rotary"], dim, dtype, device) for dim in head_dims):
                    self.functions[name, ROPE] = self._rope(rope)

    def peaks(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows [N, V]: their largest values, where these stand first, sums of exp(x - largest); each [N]."""
        made: tuple[Tensor, Tensor, Tensor] = self._kernels["peaks"](logits)
        return made

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the kernels compute what they can of the model."""
        before = {(name, what): getattr(sys.modules[name], what) for name, what in self.functions}
        for module, forward in self.forwards.items():
            module.__dict__["forward"] = forward
        for (name, what), function in self.functions.items():
            setattr(sys.modules[name], what, function)
        try:
            yield
        finally:
            for module in self.forwards:
                module.__dict__.pop("forward", None)
            for (name, what), function in before.items():
                setattr(sys.modules[name], what, function)

    def _norm(self, module: nn.Module, known: dict[Any, Any]) -> Call | None:
        """A forward for a norm over its rows' root mean square."""
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not ("RMSNorm" in type(module).__name__ and isinstance(weight, Tensor) and isinstance(eps, float)):
            return None
        if weight.dtype != self._dtype:
            return None
        rms_norm, kind = self._kernels["rms_norm"], (type(module), len(weight), eps)
        if kind not in known:
            x = _random(ROWS, len(weight), like=weight) * torch.logspace(-3, 2, ROWS).to(weight)[:, None]
            ways = ({"one_more": False}, {"one_more": True})
            own = module(x)
            known[kind] = next((way for way in ways if nearly(rms_norm(x, weight, eps, **way), own)), None)
        way = known[kind]
        return None if way is None else self._or_own(module.forward, lambda x: rms_norm(x, weight, eps, **way))

    def _gate(self, module: nn.Module, known: dict[Any, Any]) -> Call | None:
        """A forward for down(activation(gate(x)) * up(x))."""
        parts: list[Any] = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
        gate, up, down = parts
        if not all(isinstance(part, nn.Linear) for part in parts) or list(module.parameters(recurse=False)):
            return None
        if any(part.weight.dtype != self._dtype for part in parts):  # quantized weights
            return None
        gated, kind = self._kernels["gated"], (type(module), gate.weight.shape, repr(getattr(module, "act_fn", None)))
        if kind not in known:
            x = _random(ROWS, gate.in_features, like=gate.weight)[None]
            between: list[Tensor] = []
            handle = down.register_forward_pre_hook(lambda _, given: between.append(given[0]))
            own = module(x)
            handle.remove()
            known[kind] = None
            if len(between) == 1 and isinstance(own, Tensor) and torch.equal(own, down(between[0])):
                ways = (way for way in self._gates if nearly(gated(gate(x), up(x), way), between[0]))
                known[kind] = next(ways, None)
        way = known[kind]
        if way is None:
            return None
        both: Call = Joined.of(module, ("gate_proj", "up_proj"), self._dtype) or (lambda x: (gate(x), up(x)))
        return self._or_own(module.forward, lambda x: down(gated(*both(x), way)))

    def _or_own(self, own: Call, kernel: Call) -> Call:
        """The kernel's forward; the module's own where it is given more, or other numbers."""

        def forward(x: Tensor, *more: Any, **named: Any) -> Any:
            return own(x, *more, **named) if more or named or x.dtype != self._dtype else kernel(x)

        return forward

    def _rope(self, own: Call) -> Call:
        rotary = self._kernels["rotary"]

        def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
            flat = cos.shape == (1, *q.shape[2:]) and len(q) == len(k) == 1 and cos.dtype == q.dtype == k.dtype
            if more or named or not flat or not q.stride(3) == k.stride(3) == 1:
                made: tuple[Tensor, Tensor] = own(q, k, cos, sin, *more, **named)
                return made
            a, b = rotary(q[0], k[0], cos[0], sin[0])
            return a[None], b[None]

        return turned


def _where_it_is(kernel: Call) -> Call:
    """The kernel, launched where its first argument is; Triton launches where torch stands."""

    def launched(x: Tensor, *more: Any, **named: Any) -> Any:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return kernel(x, *more, **named)

    return launched


def _turns(own: Call, rotary: Call, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model's function of queries, keys and angles is what the kernel computes."""
    like = torch.empty(0, dtype=dtype, device=device)
    q, k = (_random(1, heads, ROWS, head_dim, like=like) for heads in (3, 2))
    cos, sin = _random(2, 1, ROWS, head_dim, like=like)
    try:
        found = own(q, k, cos, sin)
    except (RuntimeError, TypeError, IndexError):  # one of other arguments
        return False
    pairs = zip(found, rotary(q[0], k[0], cos[0], sin[0]), strict=True)
    return all(nearly(mine[None], theirs) for theirs, mine in pairs)


def _random(*shape: int, like: Tensor) -> Tensor:
    """Numbers as `like` has them, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)


def nearly(x: Tensor, y: Tensor) -> bool:
    """The same numbers, but for a few rounded otherwise, twice at most, and what float32 loses beside the largest."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    x, y, eps = x.float(), y.float(), torch.finfo(y.dtype).eps
    off, lost = (x - y).abs(), 1e-6 * y.abs().max()
    return float((off <= lost).float().mean()) > 0.998 and bool((off <= 2 * eps * y.abs() + lost).all())
