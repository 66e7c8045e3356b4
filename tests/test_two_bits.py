"""docs/two-bits.md: what docs/generate_two_bits.py writes is what the records say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_generated_tables_are_those_of_the_records():
    """
    `make docs` would change nothing.
    """
    made = runpy.run_path(str(ROOT / "docs" / "generate_two_bits.py"))

    assert made["page"]() == (ROOT / "docs" / "two-bits.md").read_text(encoding="utf-8")
