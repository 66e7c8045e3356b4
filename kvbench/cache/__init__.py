"""The paged KV cache: who owns which page, and what the pages hold."""

from kvbench.cache.paged import PagedCache, to_device
from kvbench.cache.pages import OutOfPages, PagePool, PageTable

__all__ = ["OutOfPages", "PagePool", "PageTable", "PagedCache", "to_device"]
