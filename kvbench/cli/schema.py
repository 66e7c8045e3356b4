"""`kvbench schema`."""

from __future__ import annotations

import json

from kvbench.cli.shared import uncollected

EXAMPLES = """\
kvbench schema > sweep.schema.json
"""


@uncollected()
def schema() -> None:
    """Print the JSON Schema of a sweep's YAML, for an editor to complete and check it.

    A first line `# yaml-language-server: $schema=FILE` in the YAML names it; `kvbench init` writes both.
    """
    from kvbench.sweep.schema import schema as made

    print(json.dumps(made(), indent=1, ensure_ascii=False))
