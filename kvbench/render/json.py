"""The rows that programs read, as a JSON list."""

from __future__ import annotations

import json

from kvbench.render.document import Document, Renderer
from kvbench.results import plain_json


def render(document: Document) -> str:
    """The rows; what JSON has no number for is "inf", "-inf" or "nan"."""
    return json.dumps(plain_json(document.rows), indent=1, allow_nan=False) + "\n"


JSON = Renderer("json", "json", render)
