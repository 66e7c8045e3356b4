"""docs/dtypes.md, docs/yaml.md and the JSON Schema are generated, and up to date."""

import json
import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_the_dtypes_page_is_that_of_the_registry():
    """
    `make docs` would change nothing.
    """
    document = runpy.run_path(str(DOCS / "generate_dtypes.py"))["document"]

    assert (DOCS / "dtypes.md").read_text(encoding="utf-8") == document(), "run `make docs`"


@pytest.mark.parametrize(("name", "generator"), [("kernels", "generate_kernels"), ("method", "generate_engine")])
def test_the_tables_of_a_page_are_those_of_the_records(name, generator):
    """
    `make docs` would change nothing.
    """
    page = runpy.run_path(str(DOCS / f"{generator}.py"))["page"]

    assert (DOCS / f"{name}.md").read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_file_of_kernels_has_a_row():
    """
    The table at the top of docs/kernels.md says of each what it launches.
    """
    page = (DOCS / "kernels.md").read_text(encoding="utf-8")
    named = {name for line in page.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+\.py)`", line)}
    files = {path.name for path in (DOCS.parent / "kernels" / "kvbench_kernels").glob("*.py")} - {"__init__.py"}

    assert files <= named


def test_the_yaml_page_and_the_schema_are_those_of_the_code():
    """
    `make docs` would change nothing, and no key is without a description, which the page refuses to be written without.
    """
    from kvbench.sweep.schema import schema

    page = runpy.run_path(str(DOCS / "generate_yaml.py"))["page"]
    committed = (DOCS.parent / "configs" / "sweep.schema.json").read_text(encoding="utf-8")

    assert (DOCS / "yaml.md").read_text(encoding="utf-8") == page(), "run `make docs`"
    assert json.loads(committed) == schema(), "run `make docs`"


def test_every_sweep_that_ships_names_the_schema_and_has_its_keys():
    """
    The first line names the file beside it, so that an editor completes; no key is one that the schema lacks.
    """
    import yaml

    known = json.loads((DOCS.parent / "configs" / "sweep.schema.json").read_text(encoding="utf-8"))["properties"]
    for path in (DOCS.parent / "configs").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        if "\ntasks:" in text:
            assert text.startswith("# yaml-language-server: $schema=sweep.schema.json\n"), path.name
            assert yaml.safe_load(text).keys() <= known.keys(), path.name


def test_every_variable_that_the_code_reads_is_documented():
    """
    os.environ is asked for nothing that docs/yaml.md does not name, but for what kvbench sets for others.
    """
    from kvbench.environment import READS

    code = "".join(path.read_text(encoding="utf-8") for path in (DOCS.parent / "kvbench").rglob("*.py"))
    read = set(re.findall(r"""os\.environ(?:\.get\(|\[)"([A-Z_]+)\"""", code))

    assert read - {"DISABLE_MULTIPROC"} <= READS.keys()
