"""Tasks by name, and what a wrong name or option is told."""

import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from kvbench.tasks import OURS, list_tasks, lm_eval_index, make_task


@pytest.mark.parametrize("spec", ["arc_easy", "divergence", "needle", "pydoc_cloze", "mmlu", "ai2_arc"])
def test_a_name_alone_makes_a_task(spec):
    """
    Ours, lm-eval's tasks, groups and tags are all made from a bare name, which they keep.
    """
    assert make_task(spec).name == spec


def test_a_task_can_be_listed_twice_under_two_names():
    """
    A `name` option replaces the name, not the task.
    """
    task = make_task({"task": "gsm8k", "name": "gsm8k-8shot", "num_fewshot": 8})

    assert task.name == "gsm8k-8shot"
    assert task.identity()["task"] == "gsm8k"
    assert task.identity()["num_fewshot"] == 8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("arc_eazy", "unknown task 'arc_eazy': did you mean arc_easy?"),
        ("divergance", "unknown task 'divergance': did you mean divergence?"),
        ({"task": "divergence", "contxt": 8}, "task divergence: unknown option 'contxt': did you mean context?"),
        ({"task": "gsm8k", "num_fewshots": 8}, "task gsm8k: unknown option 'num_fewshots': did you mean num_fewshot?"),
        ({"task": "needle", "contexts": [256, 5]}, "needle: contexts[1]: expected a number of at least 128, not 5"),
        ({"task": "needle", "contexts": []}, "needle: contexts: expected at least one entry, the list is empty"),
        ({"task": "needle", "contexts": 1024}, "needle: contexts: expected a list, not 1024"),
        ({"task": "divergence", "text": 5}, "divergence: text: expected a path, not 5"),
        ({"task": "throughput", "batch": None}, "throughput: batch: expected a whole number, not nothing"),
        ({"task": "gsm8k", "metadata": 3}, "gsm8k: metadata: expected a mapping, not 3"),
        ({"task": "gsm8k", "apply_chat_template": "y"}, "apply_chat_template: expected true or false, not 'y'"),
        ({"task": "gsm8k", 5: 3}, "gsm8k: [5]: expected a key that is text, not 5"),
        ({"task": "gsm8k", "limit": "5"}, "task gsm8k: limit: expected a whole number, not '5'"),
        ({"task": "gsm8k", "limit": 0}, "task gsm8k: limit: expected a number above 0, not 0"),
        ({"tsk": "gsm8k"}, "a task is a name"),
    ],
)
def test_a_mistake_is_named_with_what_was_meant(spec, message):
    """
    An unknown task, an unknown option and a bad value each give one line in a YAML's words, with the nearest good one.
    """
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        make_task(spec)

    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_list_names_ours_first_with_a_line_each():
    """
    `kvbench ls tasks` starts with what ships here, described, and then has every name of lm-eval.
    """
    tasks = list_tasks()

    ours = [task for task in tasks if task.source == "kvbench"]
    assert tasks[: len(ours)] == ours
    assert {task.name for task in ours} == {*OURS, "pydoc_cloze"}
    assert all(task.description for task in ours)
    assert {"gsm8k", "mmlu", "ai2_arc"} <= {task.name for task in tasks}


@pytest.mark.parametrize("folder", ["arc", "mmlu/default", "belebele", "squadv2"])
def test_the_text_scan_finds_what_lm_eval_finds(folder):
    """
    Names, kinds, files and tags are those of lm-eval's own parsing scan.
    """
    root = Path(lm_eval.__file__).parent / "tasks" / folder
    theirs = TaskManager(include_defaults=False, include_path=root).task_index
    ours = lm_eval_index.scan(root)

    assert ours.keys() == theirs.keys()
    for name, entry in theirs.items():
        assert ours[name].kind == entry.kind.name.lower().removeprefix("py_")
        assert ours[name].path == (str(entry.yaml_path) if entry.yaml_path else None)
        if ours[name].kind == "tag":
            assert set(ours[name].members) == entry.tags


def test_the_index_is_read_from_the_cache_the_second_time(tmp_path, monkeypatch):
    """
    The scan of lm-eval's files happens once a version; a broken cache file is made anew.
    """
    root = tmp_path / "tasks"
    root.mkdir()
    (root / "a.yaml").write_text("task: a\ntag: t\n")
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))

    first = lm_eval_index._cached_scan(root)
    (root / "a.yaml").unlink()
    assert lm_eval_index._cached_scan(root) == first

    (file,) = (tmp_path / "cache").glob("lm-eval-*.json")
    file.write_text("{")
    assert lm_eval_index._cached_scan(root) == {}


def test_a_config_is_validated_without_torch_or_lm_eval():
    """
    Making and identifying tasks loads nothing heavy.
    """
    code = (
        "import sys; from kvbench.tasks import make_task; [make_task(t).identity() for t in ('gsm8k', 'divergence')];"
        "print(sorted({'torch', 'lm_eval', 'datasets', 'transformers', 'scipy'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
