"""A sweep's cells: which there are, in which order, and what their names depend on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvbench.sweep.config import parse_sweep
from kvbench.sweep.plan import choose, done_otherwise, missing_data, plan, too_long, unserved
from kvbench.yaml_text import ConfigError

TEXT = """\
name: toys
model: toy
compute_dtype: float32
dtypes: [int8, fp16, int4]
tasks: [toy_a, toy_b]
"""


@pytest.fixture
def cells(toy):
    def planned(text=TEXT, *settings, done=()):
        return plan(parse_sweep(text, "toys.yaml", settings, parts=toy.PARTS), done, parts=toy.PARTS)

    return planned


def labels(cells):
    return [cell.label for cell in cells]


def last(cells):
    """The last one that is no control."""
    return [cell for cell in cells if cell.role == "cell"][-1]


def test_a_speed_is_that_of_a_machine(toy):
    """
    Device, attention and page size are part of a timed cell's identity and no part of another's.
    """

    def identities(device, timed, **changes):
        config = json.dumps(
            {"name": "t", "model": "toy", "dtypes": ["int8"], "tasks": [{"task": "toy_a", "timed": timed}], **changes}
        )
        sweep = parse_sweep(config, "toys.yaml", parts=toy.PARTS)
        return {cell.name for cell in plan(sweep, parts=toy.PARTS, device=lambda: device)}

    others = [("H200", {}), ("H100", {"page_size": 64}), ("H100", {"attention": "reference"})]
    for device, changes in others:
        assert identities(device, False, **changes) == identities("H100", False)
        assert not identities(device, True, **changes) & identities("H100", True)


def test_the_baseline_comes_first_then_the_controls(cells):
    """
    A model's cells follow each other: the baseline's, the canary's, the A/A cell's, then the others as written, once;
    last the first low-bit scheme's, twice more.
    """
    found = cells(TEXT.replace("model: toy", "models: [toy, other]"), "tasks=[toy_a]", "rotations=[default,none]")

    one_model = [
        "fp16 · none · toy_a",
        "canary · none · toy_a",
        "again · none · toy_a",
        "int8_per_token_head · none · toy_a",
        "int4_per_token_head · randomized_hadamard · toy_a",
        "int4_per_token_head · none · toy_a",
        "again 1 of int4_per_token_head · randomized_hadamard · toy_a",
        "again 2 of int4_per_token_head · randomized_hadamard · toy_a",
    ]
    assert labels(found) == one_model * 2
    assert [cell.model.name for cell in found] == ["toy"] * 8 + ["other"] * 8


def test_the_baseline_is_measured_though_no_one_lists_it(cells):
    """
    Without a baseline nothing could be compared; a canary and an A/A cell are turned off by name.
    """
    assert labels(cells(TEXT, "dtypes=[int8]", "tasks=[toy_a]", "canary=false", "again=false")) == [
        "fp16 · none · toy_a",
        "int8_per_token_head · none · toy_a",
    ]


def test_resume_is_set_subtraction(cells):
    """
    What is done is left out, and the order of the rest stays.
    """
    every = cells()

    assert [cell.name for cell in cells(done={every[0].name, every[3].name})] == [
        cell.name for i, cell in enumerate(every) if i not in (0, 3)
    ]


def test_a_name_is_the_same_tomorrow(cells):
    """
    A cell's name is fixed: a change of it would forget every finished cell. (Raise IDENTITY_VERSION when it must.)
    """
    assert last(cells()).name == "toy-int4_per_token_head-randomized_hadamard-toy_b-d5124f9395"


@pytest.mark.parametrize(
    "settings",
    [
        ("model=other",),
        ("compute_dtype=bfloat16",),
        ("dtypes[2]={dtype: int4, rotation: none}",),
        ("dtypes[2]=int4:int2",),
        ("tasks[1].n=49",),
        ("scoring=replay",),
        ("seed=1",),
        ("limit=100",),
    ],
)
def test_what_decides_the_numbers_decides_the_name(cells, settings):
    """
    Another model, precision, scheme, task option, scoring mode, seed or limit is another cell.
    """
    assert last(cells(TEXT, *settings)).name.rsplit("-", 1)[-1] != last(cells()).name.rsplit("-", 1)[-1]


@pytest.mark.parametrize(
    "settings",
    [("page_size=64",), ("note=hello",), ("name=others",), ("canary=false",), ("again=false",), ("margin=2pp",)],
)
def test_what_does_not_decide_the_numbers_does_not(cells, settings):
    """
    The page size, the sweep's name, its note, its controls and its margin leave finished cells finished.
    """
    assert last(cells(TEXT, *settings)).name == last(cells()).name


def test_a_control_is_no_baseline(cells):
    """
    The zeroed cache of a scheme, its whole one, and that one once more are different cells, and so are two repeats
    under noise.
    """
    every = cells()

    assert len({cell.name for cell in every}) == len(every) == 14


@pytest.mark.parametrize(
    ("dtypes", "repeated"),
    [
        ("[fp16, int8, int2, int4]", "int2_per_token_head"),
        ("[fp16, int8]", "int8_per_token_head"),
        ("[fp16]", None),
    ],
)
def test_the_first_low_bit_scheme_is_repeated(cells, dtypes, repeated):
    """
    The first of fewer than 8 bits; without one the first of fewer than 16; an exact cache has its own repeat.
    """
    found = [cell for cell in cells(TEXT, f"dtypes={dtypes}") if cell.nudge]

    assert {cell.scheme.dtype_name for cell in found} == ({repeated} if repeated else set())
    assert [(cell.nudge, cell.task.name, cell.identity["again"]) for cell in found] == [
        (seed, task, seed) for seed in (1, 2) for task in ("toy_a", "toy_b") if repeated
    ]


def test_a_speed_has_no_noise_of_rounding(cells):
    """
    A timed task is not repeated under noise, nor is anything without A/A cells.
    """
    timed = cells(TEXT, "tasks=[{task: toy_a, timed: true}, toy_b]")

    assert {cell.task.name for cell in timed if cell.nudge} == {"toy_b"}
    assert not [cell for cell in cells(TEXT, "again=false") if cell.nudge]


def test_sizes_are_the_models(cells):
    """
    Bits a value count every scale over all layers; bytes a token are of all layers, keys and values together.
    """
    int4 = last(cells())

    assert int4.bits_per_value == 4.5
    assert int4.kv_bytes_per_token == 3 * 2 * 2 * (64 // 2 + 4)


def test_a_head_dim_that_does_not_fit_is_one_line(cells):
    """
    A dtype that can't take the model's head_dim is refused before anything runs.
    """
    with pytest.raises(
        ConfigError,
        match=r"^model odd, scheme int4_per_token_head \S* \S*: head_dim 63 does not fit int4_per_token_head: .*$",
    ):
        cells(TEXT, "model=odd")


@pytest.mark.parametrize(
    ("only", "skip", "expected"),
    [
        (["dtype=int4"], [], [f"int4_per_token_head · randomized_hadamard · toy_{task}" for task in "ab"]),
        (
            ["dtype=int*", "task=*_b"],
            [],
            ["int8_per_token_head · none · toy_b", "int4_per_token_head · randomized_hadamard · toy_b"],
        ),
        (["dtype=int8", "dtype=fp16", "task=toy_a"], [], ["fp16 · none · toy_a", "int8_per_token_head · none · toy_a"]),
        ([], ["dtype=int*", "task=toy_a"], [f"{name} · none · toy_b" for name in ("fp16", "canary", "again")]),
        (["dtype=canary"], ["task=toy_b"], ["canary · none · toy_a"]),
        (["dtype=again"], ["task=toy_b"], ["again · none · toy_a"]),
        (
            ["rotation=randomized"],
            ["task=toy_b"],
            [
                f"{again}int4_per_token_head · randomized_hadamard · toy_a"
                for again in ("", "again 1 of ", "again 2 of ")
            ],
        ),
        (["rotation=randomized"], ["dtype=int4"], []),
        (["rotation=randomized"], ["dtype=again", "task=toy_b"], ["int4_per_token_head · randomized_hadamard · toy_a"]),
    ],
)
def test_filters_choose_cells(cells, only, skip, expected):
    """
    Filters of one key are alternatives, of several keys all hold; names may be short or patterns. A repeat under noise
    is nothing without what it repeats.
    """
    assert labels(choose(cells(), only, skip)) == expected


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("int4", r"--only int4: expected KEY=PATTERN with KEY one of model, dtype, rotation, scheme, task"),
        ("color=red", r"--only color=red: expected KEY=PATTERN"),
        ("dtype=int9", r"--only dtype=int9: unknown dtype 'int9'"),
        ("task=gsm8k", r"--only task=gsm8k matches no cell; there are toy_a, toy_b"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(cells, only, message):
    """
    A filter that matches no cell is a mistake, not an empty sweep.
    """
    with pytest.raises(ConfigError, match=message):
        choose(cells(), [only])


def test_done_cells_that_do_not_count_are_said(toy):
    """
    A cell of the same name that is done, over data files that are not here or with another option, is counted with why.
    """
    from types import SimpleNamespace

    def planned(**more):
        made = plan(parse_sweep(TEXT, "toys.yaml", parts=toy.PARTS), parts=toy.PARTS)
        return [
            replace(cell, task=SimpleNamespace(name=cell.task.name, needs=frozenset, identity=lambda: {"n": 4, **more}))
            for cell in made
            if cell.task.name == "toy_a"
        ]

    def done(cells):
        return [
            SimpleNamespace(
                cell=cell.name,
                identity=cell.identity,
                model={"name": "toy"},
                dtype=cell.dtype,
                rotation=cell.rotation,
                task="toy_a",
                status="done",
            )
            for cell in cells[:2]
        ]

    here = planned(data={})

    assert done_otherwise(here, done(here)) == []
    assert done_otherwise(here, done(planned(data={"a": "5f"}))) == [
        "toy_a: 2 cells are done over data files that are not here, and do not count"
    ]
    assert done_otherwise(here, done(planned(data={}, n=5))[:1]) == [
        "toy_a: 1 cell is done with another task.n, and does not count"
    ]


def test_what_is_missing_is_said_once(cells):
    """
    A task's lack is one line, however many cells it has.
    """
    text = TEXT.replace("[toy_a, toy_b]", "[toy_a, {task: toy_b, lacks: toy_b needs a file}]")

    assert missing_data(cells(text)) == ["toy_b needs a file"]


def test_a_task_longer_than_a_model_is_said_before_it_runs(cells):
    """
    A task whose sequences need more positions than a model has is one line a model; one that just fits is none.
    """
    models = "model: toy", "models: [toy, other]"
    text = TEXT.replace(*models).replace("[toy_a, toy_b]", "[{task: toy_a, tokens: 1024}, {task: toy_b, tokens: 1025}]")

    assert too_long(cells(text)) == [
        f"model {model}, task toy_b: 1025 tokens are more than the model's 1024; ask for fewer"
        for model in ("toy", "other")
    ]


@pytest.mark.parametrize(
    ("attention", "dtype", "reason"),
    [
        ("auto", "bfloat16", ""),
        ("triton", "bfloat16", "hadamard+center_constant:none: {}: no kernel computes hadamard+center_constant"),
        ("triton", "float32", "none: {}, nor 1 more: the kernels multiply in 16 bits, and the model"),
    ],
)
def test_what_the_kernels_cannot_serve_is_said(cells, attention, dtype, reason):
    """
    Where they alone are asked for, a line a reason has the first scheme that it keeps, and how many more.
    """
    late = {"dtype": "fp16", "rotation": {"key": "hadamard+center_constant", "value": "none"}}
    text = json.dumps({"name": "toys", "model": "toy", "tasks": ["toy_a"], "schemes": [late]})

    lines = unserved(cells(text, f"compute_dtype={dtype}"), attention, "cpu")

    wanted = "model toy, scheme fp16 · " + reason.format("attention: triton can't serve it")
    assert len(lines) == bool(reason)
    assert not reason or lines[0].startswith(wanted)


def test_kernels_need_a_gpu_or_the_interpreter(cells, monkeypatch):
    """
    Without either one line says so, in place of what Triton says of drivers.
    """
    from kvbench.attention import triton

    monkeypatch.setattr(triton, "INTERPRETED", False)
    text = json.dumps({"name": "toys", "model": "toy", "tasks": ["toy_a"], "schemes": ["int8", "int4"]})

    (line,) = unserved(cells(text, "compute_dtype=bfloat16"), "triton", "cpu")

    assert line.endswith(
        "nor 2 more: there is no GPU here, and Triton interprets kernels under TRITON_INTERPRET=1 alone"
    )
