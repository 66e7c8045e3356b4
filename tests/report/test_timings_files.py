"""Files of timed rows: read as `kvbench kernel` writes them, or refused with file and place."""

from __future__ import annotations

import json
import os

import pytest

from kvbench.report.timings import find, is_timings, read
from kvbench.results import NotARunError

ROW = {"op": "decode", "dtype": "fp16", "rotation": "none", "batch": 1, "context": 8, "samples_us": [1.0, 2.0, 1.5]}
GPUS = {"gpus": [{"name": "H100"}]}


def write(path, environment=GPUS, **changes):
    path.write_text(json.dumps({"rows": [ROW, {**ROW, **changes}], "environment": environment}))
    return path


def test_rows_and_gpu_are_read(tmp_path):
    """
    Rows of a file, and of a folder's files.
    """
    write(tmp_path / "rows.json")

    assert read(tmp_path / "rows.json") == read(tmp_path)
    assert read(tmp_path).gpu == "H100"
    assert len(read(tmp_path).rows) == 2


BROKEN = {
    "a batch": ({"batch": "1"}, "rows[1].batch: expected a whole number, not '1'"),
    "a dtype": ({"dtype": None}, "rows[1].dtype: expected text, not None"),
    "samples": ({"samples_us": "fast"}, "rows[1].samples_us: expected a list, not 'fast'"),
    "a sample": ({"samples_us": [1.0, None]}, "rows[1].samples_us[1]: expected a number, not None"),
    "a sample that is none": ({"samples_us": ["nan"]}, "rows[1].samples_us: expected numbers"),
    "a sample beyond every float": ({"samples_us": [10**400]}, "rows[1].samples_us[0]: expected a number, not 1000"),
    "heads": ({"kv_heads": []}, "rows[1].kv_heads: expected a whole number, not []"),
    "an environment": ({"environment": {"gpus": ["H100"]}}, "environment.gpus[0]: expected a mapping"),
}


@pytest.mark.parametrize(("changes", "why"), BROKEN.values(), ids=BROKEN)
def test_a_wrong_type_is_named(tmp_path, changes, why):
    """
    Timings with a broken row are not taken for something else, and are refused in one line.
    """
    file = write(tmp_path / "rows.json", **changes)

    assert is_timings(file)
    for one in (read, find):
        with pytest.raises(NotARunError) as error:
            one(file)
        assert str(error.value).startswith(f"{file} holds a broken timing ({why}")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["x.json", "x.json/../"], ids=["itself", "in a folder"])
def test_a_pipe_is_not_opened(tmp_path, path):
    """
    A FIFO where timings are looked for holds none; reading it would never end.
    """
    os.mkfifo(tmp_path / "x.json")

    assert not is_timings(tmp_path / "x.json" if path == "x.json" else tmp_path)
