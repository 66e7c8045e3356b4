"""The paged KV cache: who owns which page, and what the pages hold."""

from kvbench.cache.device import on_device, to_device
from kvbench.cache.paged import PagedCache
from kvbench.cache.pages import OutOfPages, PagePool, PageTable
from kvbench.cache.ring import Rings

__all__ = ["OutOfPages", "PagePool", "PageTable", "PagedCache", "Rings", "on_device", "to_device"]
