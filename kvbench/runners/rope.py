"""Rotary frequencies that depend on the longest position computed so far, and how to forget it."""

from __future__ import annotations

from typing import Any

import torch

# rope types of transformers, which a model may have for all layers or for a kind alone
MOVING = {"dynamic", "longrope"}


class Frequencies:
    """A model's rotary frequencies; moves: a pass over longer sequences has others than a shorter one."""

    def __init__(self, model: Any) -> None:
        # (module, what its buffers' names begin with)
        self._moving = [
            (module, prefix)
            for module in model.modules()
            for prefix, kind in _kinds(getattr(module, "rope_type", None))
            if any(name in kind for name in MOVING)
        ]
        self.moves = bool(self._moving)

    def reset(self) -> None:
        """What is computed next has the frequencies that it has when it is computed first."""
        for module, prefix in self._moving:
            original = getattr(module, f"{prefix}original_inv_freq")
            current = getattr(module, f"{prefix}inv_freq")
            # no tensor of inference mode, which transformers could not change outside it
            with torch.inference_mode(False):
                again = original.to(current.device).clone()
            module.register_buffer(f"{prefix}inv_freq", again, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _kinds(rope_type: Any) -> list[tuple[str, str]]:
    if isinstance(rope_type, str):
        return [("", rope_type)]
    return [(f"{layer}_", kind) for layer, kind in rope_type.items()] if isinstance(rope_type, dict) else []
