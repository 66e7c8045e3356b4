"""The paged KV cache: who owns which page, and what the pages hold."""

from kvbench.cache.paged import PagedCache, to_device
from kvbench.cache.pages import OutOfPages, PagePool, PageTable
from kvbench.cache.ring import Rings

__all__ = ["OutOfPages", "PagePool", "PageTable", "PagedCache", "Rings", "to_device"]
