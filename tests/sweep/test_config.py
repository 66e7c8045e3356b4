"""A configuration is taken as it was meant, or refused at the line and column where it is wrong."""

from __future__ import annotations

import json
import textwrap

import pytest

from kvbench.sweep.config import load_sweep, parse_sweep
from kvbench.sweep.plan import plan
from kvbench.yaml_text import ConfigError

GOOD = """\
name: toys
model: toy
dtypes: [fp16, int4]
tasks: [toy_a]
"""


@pytest.fixture
def parse(toy):
    def parsed(text, *settings):
        return parse_sweep(text, "bad.yaml", settings, parts=toy.PARTS)

    return parsed


@pytest.fixture
def refused(parse):
    """The message that a text is refused with."""

    def message(text, *settings):
        with pytest.raises(ConfigError) as error:
            parse(text, *settings)
        return str(error.value)

    return message


def schemes(sweep):
    return [(scheme.dtype_name, scheme.rotation_name) for scheme in sweep.all_schemes()]


def test_short_names_and_pairs(parse):
    """
    A dtype is a name, a short one, KEY:VALUE or a mapping; with its own rotations it leaves the sweep's aside.
    """
    text = """\
    name: toys
    model: toy
    rotations: [default, none]
    dtypes:
      - int8
      - int4:int2
      - {key: int4, value: int2, rotation: hadamard}
      - {dtype: int4, rotations: [none, hadamard]}
    tasks: [toy_a]
    """

    assert schemes(parse(textwrap.dedent(text))) == [
        ("int8_per_token_head", "none"),
        ("int4_per_token_head:int2_per_token_head", "randomized_hadamard:hadamard"),
        ("int4_per_token_head:int2_per_token_head", "none"),
        ("int4_per_token_head:int2_per_token_head", "hadamard"),
        ("int4_per_token_head", "none"),
        ("int4_per_token_head", "hadamard"),
    ]


def test_models_take_the_sweeps_compute_dtype(parse):
    """
    A model without a compute dtype of its own computes in the sweep's.
    """
    text = GOOD.replace("model: toy", "models: [toy, {name: other, compute_dtype: float16}]\ncompute_dtype: bfloat16")

    assert [(m.name, m.compute_dtype) for m in parse(text).all_models] == [("toy", "bfloat16"), ("other", "float16")]


@pytest.mark.parametrize(
    "args",
    [
        "revision=r7,dtype=bfloat16,trust_remote_code=True",
        {"revision": "r7", "dtype": "torch.bfloat16", "trust_remote_code": True},
    ],
)
def test_lm_evals_model_args_are_keys_of_a_model(parse, toy, args):
    """
    As lm-eval's command line writes them, or as a mapping: the model is the same, and so is each cell's name.
    """
    text = GOOD.replace("model: toy", "model: " + json.dumps({"name": "toy", "model_args": args}))
    own = {"name": "toy", "revision": "r7", "compute_dtype": "bfloat16", "trust_remote_code": True}
    other = GOOD.replace("model: toy", "model: " + json.dumps(own))

    assert parse(text).all_models == parse(other).all_models
    names = [[cell.name for cell in plan(parse(one), parts=toy.PARTS)] for one in (text, other)]
    assert names[0] == names[1]
    assert names[0] != [cell.name for cell in plan(parse(GOOD), parts=toy.PARTS)]


@pytest.mark.parametrize("args", ["device_map=auto", "parallelize=True"])
def test_a_model_over_several_gpus_has_the_same_cells(parse, toy, args):
    """
    However it is written. Which GPU has a layer decides no score, so no name either, but a speed: of so many of them.
    """
    text = GOOD.replace("model: toy", "model: " + json.dumps({"name": "toy", "model_args": args}))
    spread = parse(text)
    own = parse(GOOD.replace("model: toy", "model: {name: toy, device_map: auto, gpus: 2}"))
    cells = [plan(one, parts=toy.PARTS, gpus=lambda _: 2) for one in (spread, own, parse(GOOD))]

    assert spread.all_models[0].device_map == own.all_models[0].device_map == "auto"
    assert len({tuple(cell.name for cell in one) for one in cells}) == 1
    timed = json.dumps([{"task": "toy_a", "timed": True}])
    places = [
        plan(
            parse(GOOD.replace("model: toy", f"model: {model}"), f"tasks={timed}"),
            parts=toy.PARTS,
            device=lambda: "H100",
            gpus=lambda spec: 2,
        )[0].place.device
        for model in ("toy", "{name: toy, device_map: auto}")
    ]
    assert places == ["H100", "2 × H100"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            "{name: toy, model_args: 'attn_implementation=eager'}",
            "attn_implementation: a model's attention is kvbench's",
        ),
        ("{name: toy, model_args: 'pretrained=gpt2'}", "pretrained: it is the model's `name`"),
        ("{name: toy, model_args: {peft: x}}", "peft: only revision, dtype, trust_remote_code, device_map are taken"),
        ("{name: toy, model_args: 'dtype'}", "expected KEY=VALUE,KEY=VALUE, not 'dtype'"),
        ("{name: toy, model_args: 'dtype=auto'}", "dtype: name one of float32, bfloat16, float16"),
        ("{name: toy, model_args: 'dtype=int8'}", "unknown value 'int8': one of float32, bfloat16, float16"),
        ("{name: toy, gpus: 2}", "gpus: 2: a share of one GPU, or with device_map: auto a whole number of them"),
        ("{name: toy, device_map: auto, gpus: 1.5}", "gpus: 1.5: a share of one GPU"),
        ("{name: toy, device_map: cuda}", "unknown value 'cuda'"),
        ("{name: toy, device_map: auto, backend: vllm}", "device_map: backend vllm spreads models itself"),
        ("{name: toy, model_args: [1]}", "expected KEY=VALUE,KEY=VALUE or a mapping"),
        ("{name: toy, compute_dtype: float32, model_args: 'dtype=float32'}", "and compute_dtype say the same"),
    ],
)
def test_a_wrong_model_arg_is_refused_at_its_place(refused, model, expected):
    """
    With what to do where kvbench has another place for it.
    """
    message = refused(GOOD.replace("model: toy", f"model: {model}"))
    assert expected in message
    assert message.startswith("bad.yaml:2:")


def test_a_setting_is_laid_over_the_file(parse):
    """
    `--set` changes a value, adds one, and gives options to a task written as a name.
    """
    sweep = parse(GOOD, "tasks[0].n=7", "seed=3", "dtypes=[int8]", "model=other")

    assert sweep.tasks == [{"task": "toy_a", "n": 7}]
    assert (sweep.seed, sweep.all_models[0].name, schemes(sweep)) == (3, "other", [("int8_per_token_head", "none")])


def test_a_limit_cuts_every_task(parse, toy):
    """
    The sweep's limit holds for each task, but for one whose own is smaller.
    """
    sweep = parse(GOOD.replace("[toy_a]", "[toy_a, {task: toy_b, limit: 3}, {task: toy_c, limit: 9}]"), "limit=5")

    assert [task.limit for task in sweep.make_tasks(toy.PARTS)] == [5, 3, 5]


def with_line(line):
    return GOOD + line + "\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            GOOD.replace("[fp16, int4]", "\n  - fp16\n  - int8_per_token_hed  # a comment"),
            """\
            bad.yaml:5:5: dtypes[1]: unknown dtype 'int8_per_token_hed': did you mean int8_per_token_head?
                5 |   - int8_per_token_hed  # a comment
                  |     ^^^^^^^^^^^^^^^^^^
            """,
        ),
        (
            GOOD.replace("int4]", "{key: int4, value: int4_per_tokn}]"),
            """\
            bad.yaml:3:35: dtypes[1].value: unknown dtype 'int4_per_tokn': did you mean int4_per_token_head?
                3 | dtypes: [fp16, {key: int4, value: int4_per_tokn}]
                  |                                   ^^^^^^^^^^^^^
            """,
        ),
        (
            GOOD.replace("int4]", "{dtype: int4, rotation: hadamrd}]"),
            """\
            bad.yaml:3:40: dtypes[1].rotation: unknown rotation 'hadamrd': did you mean hadamard?
                3 | dtypes: [fp16, {dtype: int4, rotation: hadamrd}]
                  |                                        ^^^^^^^
            """,
        ),
        (
            with_line("rotations: [defalt]"),
            """\
            bad.yaml:5:13: rotations[0]: unknown rotation 'defalt': did you mean default?
                5 | rotations: [defalt]
                  |             ^^^^^^
            """,
        ),
        (
            GOOD.replace("[toy_a]", "[toy_a, gsm]"),
            """\
            bad.yaml:4:16: tasks[1]: unknown task 'gsm': did you mean toy?
                4 | tasks: [toy_a, gsm]
                  |                ^^^
            """,
        ),
        (
            GOOD.replace("[toy_a]", "[{task: toy_a, limt: 3}]"),
            """\
            bad.yaml:4:16: tasks[0]: task toy_a: unknown option 'limt'
                4 | tasks: [{task: toy_a, limt: 3}]
                  |                       ^^^^
            """.replace("4:16", "4:23"),
        ),
        (
            GOOD.replace("model: toy", "model: {name: tony, compute_dtype: float32}"),
            """\
            bad.yaml:2:15: model.name: unknown model 'tony': did you mean toy?
                2 | model: {name: tony, compute_dtype: float32}
                  |               ^^^^
            """,
        ),
        (
            GOOD.replace("dtypes", "dtyps"),
            """\
            bad.yaml:3:1: unknown key 'dtyps': did you mean dtypes?
                3 | dtyps: [fp16, int4]
                  | ^^^^^
            """,
        ),
        (
            with_line("seed: -1\nscoring: replays\ncanary: maybe\nlimit: true\npage_size: x\ncompute_dtype: bfloat"),
            """\
            bad.yaml:5:7: seed: expected a number of at least 0, not -1
                5 | seed: -1
                  |       ^^
            bad.yaml:6:10: scoring: unknown value 'replays': did you mean replay?
                6 | scoring: replays
                  |          ^^^^^^^
            bad.yaml:7:9: canary: expected true or false, not 'maybe'
                7 | canary: maybe
                  |         ^^^^^
            bad.yaml:8:8: limit: expected a whole number, not true
                8 | limit: true
                  |        ^^^^
            bad.yaml:9:12: page_size: expected a whole number, not 'x'
                9 | page_size: x
                  |            ^
            bad.yaml:10:16: compute_dtype: unknown value 'bfloat': did you mean bfloat16?
               10 | compute_dtype: bfloat
                  |                ^^^^^^
            """,
        ),
        (
            with_line("seed: 99999999999999999999"),
            """\
            bad.yaml:5:7: seed: expected a number of at most 9223372036854775807, not 99999999999999999999
                5 | seed: 99999999999999999999
                  |       ^^^^^^^^^^^^^^^^^^^^
            """,
        ),
        (
            GOOD.replace("[toy_a]", "toy_a"),
            """\
            bad.yaml:4:8: tasks: expected a list, not 'toy_a'
                4 | tasks: toy_a
                  |        ^^^^^
            """,
        ),
        (
            GOOD.replace("[toy_a]", "[]"),
            """\
            bad.yaml:4:8: tasks: expected at least one entry, the list is empty
                4 | tasks: []
                  |        ^^
            """,
        ),
        (GOOD.replace("model: toy\n", ""), "bad.yaml:1:1: give either 'model' or 'models'"),
        (
            GOOD + "model: other\n",
            """\
            bad.yaml:5:1: model: this key appears twice, first in line 2
                5 | model: other
                  | ^^^^^
            """,
        ),
        (
            "name: toys\ntasks:\n\t- toy_a\n",
            """\
            bad.yaml:3:1: a tab: YAML is indented with spaces
                3 | \t- toy_a
                  | ^
            """,
        ),
        (
            'name: "toys\n',
            """\
            bad.yaml:2:1: found unexpected end of stream (while scanning a quoted scalar)
                2 |
                  | ^
            """,
        ),
        (
            GOOD.replace("toy\n", "!!python/name:os.system x\n", 1),
            """\
            bad.yaml:2:8: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'
                2 | model: !!python/name:os.system x
                  |        ^
            """,
        ),
        (
            GOOD + "margin: 1\n",
            """\
            bad.yaml:5:9: margin: 1 has no unit: write 1pp, in percentage points
                5 | margin: 1
                  |         ^
            """,
        ),
        ("", "bad.yaml: the file is empty; a sweep has at least name, model, dtypes (or schemes) and tasks"),
        ("# nothing\n", "bad.yaml: the file is empty; a sweep has at least name, model, dtypes (or schemes) and tasks"),
        ("- a\n", "bad.yaml:1:1: expected a mapping: a sweep has at least name, model, dtypes (or schemes) and tasks"),
        ("a: &a [*a]\n", None),
        ("\x00", None),
    ],
)
def test_an_error_names_its_place(refused, text, expected):
    """
    Every mistake is named by file, line and column, with its line, the bad value, and the nearest good one.
    """
    message = refused(text)

    if expected is not None:
        lines = [line.rstrip() for line in message.splitlines()]
        assert lines == textwrap.dedent(expected).rstrip("\n").splitlines()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("sed=5", "--set sed=5: unknown key 'sed': did you mean seed?"),
        ("seed", "--set seed: expected KEY=VALUE, such as tasks[0].limit=50"),
        ("tasks[3].limit=5", "--set tasks[3].limit=5: there is no tasks[3]; the list has 1 entry"),
        ("seed.x=5", "--set seed.x=5: expected a whole number, not {'x': 5}"),
        (
            "dtypes[0]=int8_per_token_hed",
            "--set dtypes[0]=int8_per_token_hed: unknown dtype 'int8_per_token_hed': did you mean int8_per_token_head?",
        ),
        ("seed=[", "--set seed=[: '[' is not a YAML value"),
    ],
)
def test_a_wrong_setting_is_named(refused, setting, expected):
    """
    A mistake in `--set` is said of the flag, not of a line of the file.
    """
    assert refused(GOOD, setting) == expected


def test_the_mirror_is_the_yamls_else_the_environments(parse, tmp_path, monkeypatch):
    """
    `data:` comes before KVBENCH_DATA; a folder that is not there is refused either way.
    """
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    assert parse(GOOD).data_folder() == tmp_path
    (tmp_path / "own").mkdir()
    assert parse(GOOD, f"data={tmp_path / 'own'}").data_folder() == tmp_path / "own"

    with pytest.raises(ConfigError, match=r"bad.yaml:5:7: data: there is no folder absent"):
        parse(GOOD + "data: absent\n")
    monkeypatch.setenv("KVBENCH_DATA", "absent")
    with pytest.raises(ConfigError, match="KVBENCH_DATA: there is no folder absent"):
        parse(GOOD)


def test_a_missing_file_names_the_nearest(tmp_path, toy):
    """
    A file that is not there, a folder, and a file that is no text are refused in one line.
    """
    (tmp_path / "sweep.yaml").write_text(GOOD)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ConfigError, match=r"no file .*swep\.yaml: did you mean .*sweep\.yaml\?"):
        load_sweep(tmp_path / "swep.yaml", parts=toy.PARTS)
    with pytest.raises(ConfigError, match="is a folder"):
        load_sweep(tmp_path, parts=toy.PARTS)
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_sweep(tmp_path / "binary.yaml", parts=toy.PARTS)


SCHEMES = """\
name: toys
model: toy
schemes:
  - int4_centered_window
  - int8+w64s4
  - {dtype: int4, layers: {0: int8, "-1": {key: fp16}}, window: {sinks: 2}}
  - {scheme: int4_centered, calibration: {tokens: 100}}
tasks: [toy_a]
"""


def test_schemes_stand_beside_dtypes_and_rotations(parse):
    """
    A preset, a name and a mapping each are a scheme; dtypes × rotations come before them, and may be left out.
    """
    sides = "center+randomized_hadamard:randomized_hadamard"
    expected = [
        ("int4_per_token_head+w64s4", sides),
        ("int8_per_token_head+w64s4", "none"),
        ("int4_per_token_head+s2+l0=int8_per_token_head+l-1=fp16:-", "randomized_hadamard"),
        ("int4_per_token_head+c100", sides),
    ]

    assert schemes(parse(SCHEMES)) == expected
    assert schemes(parse(SCHEMES + "dtypes: [int2]\n")) == [("int2_per_token_head", "hadamard"), *expected]


def test_a_calibration_is_for_all_that_name_none(parse):
    """
    The sweep's tokens are those of every scheme that learns but for one with its own; the rest learns nothing.
    """
    names = [name for name, _ in schemes(parse(SCHEMES + "calibration: {tokens: 200}\n"))]

    assert names[0].endswith("+c200")
    assert names[3].endswith("+c100")
    assert names[1] == "int8_per_token_head+w64s4"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dtypes: [int4]\nrotations: [turn]", "unknown rotation 'turn'"),
        ("dtypes: [int4]\nrotations: [center]", "'center' on values can't be undone"),
        ("schemes: [int4_centred]", "unknown dtype 'int4_centred': did you mean int4_centered?"),
        ("schemes: [int4_cent]", "'int4_cent' is not unique: one of int4_centered, int4_centered_window"),
        ("schemes: [{dtype: int4_centered, rotation: none}]", "'int4_centered' has transforms of its own"),
        ("dtypes: [{dtype: int4_centered, rotations: [none]}]", "'int4_centered' has transforms of its own"),
        ("schemes: [int4+w63]", "'+w63' of a scheme's name is no window, such as +w64s4 (w in steps of 64)"),
        ("schemes: [{dtype: int4, windows: 3}]", "unknown key 'windows' of a scheme: one of dtype, key, value"),
        ("schemes: [{dtype: int4, window: {recent: -1}}]", "window: recent is a whole number from 0 on, not -1"),
        ("schemes: [{dtype: int4, window: {sinks: 0}}]", "leave nothing in 16 bits: leave it out"),
        ("schemes: [{dtype: int4, layers: {first: int8}}]", "layers: 'first' is no layer's number"),
        ("schemes: [{dtype: int4, layers: {0: int9}}]", "unknown dtype 'int9'"),
        ("dtypes: [int4]\ncalibration: {text: no.txt}", "calibration: text no.txt cannot be read: No such file"),
        ("dtypes: [int4]\ncalibration: {tokens: 10000000}", "too few for 10000000 tokens"),
        ("seed: 1", "give 'dtypes', 'schemes' or both: one at least"),
    ],
)
def test_a_wrong_scheme_is_refused(refused, line, expected):
    """
    One line says what is wrong and what was expected.
    """
    message = refused(f"name: toys\nmodel: toy\ntasks: [toy_a]\n{line}\n")

    assert expected in message
    assert message.startswith("bad.yaml:")


@pytest.mark.parametrize(
    ("line", "place"),
    [
        (
            "schemes: [{dtype: int4, rotation: {key: centre+hadamard, value: none}}]",
            "41: schemes[0].rotation.key: unkn",
        ),
        ("schemes: [{dtype: int4, layers: {0: int9}}]", "37: schemes[0].layers.0: unknown dtype"),
        ("schemes: [{dtype: int4, window: {sink: 4}}]", "33: schemes[0].window: expected a mapping"),
        ("schemes: [int8, {dtype: int4, calibration: {tokens: 10000000}}]", "44: schemes[1].calibration: the text"),
        ("dtypes: [int4]\ncalibration: {tokens: 10000000}", "14: calibration: the text that ships"),
    ],
)
def test_a_wrong_scheme_is_refused_at_its_place(refused, line, place):
    """
    The column is that of the value itself, however deep it lies, and what the path says is not said again.
    """
    row = 4 + line.count("\n")
    assert f"bad.yaml:{row}:{place}" in refused(f"name: toys\nmodel: toy\ntasks: [toy_a]\n{line}\n")


def test_a_preset_takes_windows_and_layers_and_keeps_its_transforms(parse):
    """
    Beside a sweep's rotations it runs once, as it is; a part after a plus is laid over it.
    """
    text = "name: toys\nmodel: toy\ntasks: [toy_a]\nrotations: [none, hadamard]\n"
    found = schemes(parse(f"{text}dtypes: [int4_centered+w64s4+l0=int8, int8]\n"))

    turned = "center+randomized_hadamard:randomized_hadamard"
    assert found == [
        ("int4_per_token_head+w64s4+l0=int8_per_token_head", turned),
        ("int8_per_token_head", "none"),
        ("int8_per_token_head", "hadamard"),
    ]


def test_layers_and_windows_that_a_model_has_not_are_refused_by_the_plan(parse, toy):
    """
    The toy's layers go from 0 to 2 and its positions are known.
    """
    text = 'name: toys\nmodel: toy\ntasks: [toy_a]\nschemes: [{dtype: int4, layers: {"-4": int8}}]\n'

    with pytest.raises(
        ConfigError, match=r"model toy, scheme .*: layers: there is no layer -4: the model's go from 0 to 2"
    ):
        plan(parse(text), parts=toy.PARTS)
