"""docs/dtypes.md is generated, and up to date."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_dtypes_page_is_that_of_the_registry():
    """
    `make docs` would change nothing.
    """
    document = runpy.run_path(str(DOCS / "generate_dtypes.py"))["document"]

    assert (DOCS / "dtypes.md").read_text(encoding="utf-8") == document(), "run `make docs`"
