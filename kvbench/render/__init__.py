"""How what was found looks: one file a format, each with its renderer and what makes a name harmless in it."""

from functools import cache

from kvbench.registry import walk
from kvbench.render.document import (
    Axis,
    Bar,
    Cell,
    Column,
    Document,
    Plot,
    Prose,
    Renderer,
    Section,
    Table,
    View,
)

__all__ = [
    "Axis",
    "Bar",
    "Cell",
    "Column",
    "Document",
    "Plot",
    "Prose",
    "Renderer",
    "Section",
    "Table",
    "View",
    "all_renderers",
    "render",
]


@cache
def all_renderers() -> dict[str, Renderer]:
    """The formats by the name that --format has for them."""
    found = {one.name: one for one in walk(__name__, __path__, Renderer)}
    return dict(sorted(found.items(), key=lambda item: item[0] != "table"))


def render(document: Document, name: str) -> str:
    """The text of a document in a format."""
    return all_renderers()[name].render(document)
