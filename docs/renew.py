"""Puts tables made anew between the marks of a page: what the generators of the docs' tables share."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path


def renewed(page: Path, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page's text with each table made anew: between `<!-- NAME: … -->` and `<!-- end of NAME -->`, once each."""
    text = page.read_text(encoding="utf-8")
    for name, made in tables.items():
        text, times = re.subn(
            rf"(<!-- {name}: [^\n]*-->\n\n).*?(\n\n<!-- end of {name} -->)",
            lambda m, made=made: m[1] + made() + m[2],
            text,
            flags=re.DOTALL,
        )
        assert times == 1, name
    return text
