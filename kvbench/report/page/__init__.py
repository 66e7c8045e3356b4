"""A run folder as a page to look at: the answer, pictures of the trade-off, every comparison. Loads without torch."""

from kvbench.report.page.assemble import page, trade_off

__all__ = ["page", "trade_off"]
