"""The pages of a runner's caches, and how much is computed at once."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from kvbench.cache import OutOfPages, PagedCache, PagePool, Rings
from kvbench.cache.paged import Learned, by_device
from kvbench.dtypes import Dtype
from kvbench.schemes import Layers, Scheme

SMALLEST_BATCH = 64  # tokens of a pass, below which a model that runs out of memory is given up
LARGEST_GRAPH = 256  # sequences that one CUDA graph decodes at most

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much is computed at once.

    tokens: of one forward pass. sequences: decoded at once. logits: values of full-vocabulary rows held at once.
    memory: share of the device's free memory that pages may take; 0 for as many as a few passes need.
    """

    tokens: int
    sequences: int
    logits: int
    memory: float

    def halved(self) -> Limits:
        """Half as much of everything."""
        return Limits(self.tokens // 2, max(1, self.sequences // 2), self.logits // 2, self.memory / 2)


CPU_LIMITS = Limits(tokens=2048, sequences=64, logits=2**24, memory=0.0)
IN_FLIGHT = 4  # passes for each of several devices that what one device computes at once is cut into
GPU_LIMITS = Limits(tokens=65536, sequences=LARGEST_GRAPH, logits=2**27, memory=0.6)


class Graphed(Protocol):
    """What has CUDA graphs that read the caches. graph_bytes: of the device's memory, which only they can use."""

    graph_bytes: int


class Memory:
    """A runner's caches over one pool of pages, made when they are asked for and kept from call to call.

    caches: packed; with a window its rows in 16 bits; with `exact_prefill` the exact cache.
    rings: where the window's rows lie, with `ring`; without, all rows have a copy in 16 bits, in the same slots.
    copied: dtypes whose packed rows are kept decoded too, in 16 bits.
    devices: of each layer with a cache; `device`, where passes begin.
    graphed: what must go when the caches go, for its graphs read them.
    limits: halved where the device runs out of memory.
    """

    pool: PagePool
    rings: Rings | None = None

    def __init__(
        self,
        layers: Layers,
        scheme: Scheme,
        *,
        page_size: int,
        model_dtype: torch.dtype,
        devices: Sequence[torch.device],
        learned: Learned | None = None,
        destroyed: bool = False,
        exact_prefill: bool = False,
        ring: bool = False,
        copied: Collection[Dtype] = (),
    ) -> None:
        self.caches: tuple[PagedCache, ...] = ()
        self.graphed: dict[Any, Graphed] = {}
        self.device = devices[0]
        self.devices = tuple(devices)
        self.limits = GPU_LIMITS if self.device.type == "cuda" else CPU_LIMITS
        if (count := len(set(self.devices))) > 1:
            # the first device computes a pass while the others are at those before it
            self.limits = replace(self.limits, tokens=self.limits.tokens // (IN_FLIGHT * count))
        self.page_size = page_size
        self._layers = layers
        self._model_dtype = model_dtype
        self._learned = learned
        self._destroyed = destroyed
        self._ring = scheme.window if ring else None
        self._copied = copied
        self._schemes = [scheme.resolve(model_dtype)]
        if scheme.window:
            self._schemes.append(scheme.exact(model_dtype))
        self._stored = len(self._schemes)
        if exact_prefill:
            self._schemes.append(Scheme.parse("auto").resolve(model_dtype))

    def reserve(self, longest: int, wanted: int, least: int) -> None:
        """Pages for `wanted`, or as many as there is memory for; made anew where there are fewer than that.

        least: what one sequence of `longest` tokens needs.

        Raises:
            OutOfPages: the memory does not hold one sequence of `longest` tokens.
        """
        pages = -(-4 * (self.limits.tokens + longest) // self.page_size)
        if self.limits.memory:
            # graphs are of a model on one device
            graphs = sum(one.graph_bytes for one in self.graphed.values())
            free = min(
                (free_memory(device) - graphs + sum(cache.nbytes_on(device) for cache in self.caches))
                // int(self.page_size * token_bytes)
                for device, token_bytes in by_device(self.devices, self._token_bytes(longest)).items()
            )
            # a share of the memory, or what one sequence needs
            pages = min(max(wanted, least), max(int(self.limits.memory * free), least))
            if pages > free:
                which = "device's" if len(set(self.devices)) == 1 else "fullest device's"
                raise OutOfPages(
                    f"the {which} free memory holds {free * self.page_size} tokens of {self._schemes[0].dtype_name}, "
                    f"and a sequence of {longest} takes {least * self.page_size} with the pages that are copied"
                )
        there = self.caches[0].pages if self.caches else 0
        # where memory is what limits them, a few pages more are not worth new graphs
        if pages <= there or (self.limits.memory and least <= there and pages < min(wanted, 1.25 * there)):
            return
        self.release()  # before the larger ones are made
        rings = None
        if window := self._ring:
            self.rings = rings = Rings(window.sinks, window.recent, window.page, self.page_size)
        self.pool = PagePool(pages, self.page_size, rings)
        sizes = [(pages, self.page_size)] * len(self._schemes)
        if rings is not None:
            sizes[1] = rings.pages, rings.page_size
        self.caches = tuple(
            PagedCache(
                self._layers,
                scheme,
                pages=sizes[i][0],
                page_size=sizes[i][1],
                model_dtype=self._model_dtype,
                device=self.devices,
                learned=self._learned if i < self._stored else None,
                destroyed=self._destroyed and i < self._stored,
            )
            for i, scheme in enumerate(self._schemes)
        )
        self.packed.keep_decoded(self._copied, empty=True)

    def release(self) -> None:
        """Gives up the caches, and the graphs that read them."""
        self.graphed.clear()
        self.caches = ()

    @property
    def packed(self) -> PagedCache:
        """What the scheme makes of keys and values."""
        return self.caches[0]

    @property
    def window(self) -> PagedCache | None:
        """Rows in 16 bits: with rings, room for all that are in one."""
        if self._stored == 1:
            return None
        if self.rings is not None:
            self.caches[1].grow(self.rings.pages)
        return self.caches[1]

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole pages (source, destination), in all caches, and what rings have to copy."""
        ring = self.window if self.rings is not None else None
        for cache in self.caches:
            if cache is not ring:
                cache.copy_pages(copies)
        if ring is not None and self.rings is not None:
            ring.copy_pages(self.rings.copies)
            self.rings.copies = []

    def _token_bytes(self, longest: int) -> list[float]:
        """Of each layer, bytes of a token in all caches; of a ring, those of `longest` tokens, shared by them."""
        each = [scheme.layer_bytes(self._layers) for scheme in self._schemes]
        if self._ring is not None:
            share = min(1.0, (self._ring.tokens(longest) + self._ring.page) / max(1, longest))
            each[1] = [share * layer_bytes for layer_bytes in each[1]]
        sides = (self._schemes[0].layer(i, len(self._layers)) for i in range(len(self._layers)))
        copies = (sum(side.dtype in self._copied for side in own) for own in sides)
        each.append([2.0 * count * math.prod(shape) for count, shape in zip(copies, self._layers, strict=True)])
        return [sum(layer) for layer in zip(*each, strict=True)]

    @contextmanager
    def released_by_errors(self) -> Iterator[None]:
        """An error inside the block leaves no page taken: the caches are made anew by the next call."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    @property
    def least(self) -> bool:
        """Whether half as much at once would be too little."""
        return self.limits.tokens // 2 < SMALLEST_BATCH

    def halve(self) -> None:
        """Computes half as much at once from now on."""
        half = self.limits.halved()
        logger.warning("out of memory with %d tokens a pass: trying %d", self.limits.tokens, half.tokens)
        self.limits = half
        self.release()
        gc.collect()  # the failed call's tensors hang on its traceback
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated: what the driver has left, and what torch holds without using it.

    No more than this process's share of the GPU, where others have the rest.
    """
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + torch.cuda.memory_reserved(device), share) - used
