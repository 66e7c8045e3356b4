"""The command line: what goes to which stream, and with which exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvbench.cli import main
from kvbench.results import Store, runs
from kvbench.sweep import command
from kvbench.tasks import make_task

ROOT = Path(__file__).parents[1]
TOY = Path(__file__).parent / "sweep" / "toy.py"


def one_error(result, code):
    """The line of an error, if that is all there is."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def raise_(error):
    raise error


def test_nothing_heavy_is_imported_for_help():
    """
    Parsing a command line imports neither torch nor anything else that takes a noticeable time.
    """
    heavy = "{'torch', 'transformers', 'lm_eval', 'pandas', 'numpy', 'pydantic', 'rich', 'yaml'}"
    code = f"import sys, kvbench.cli; print({heavy} & set(sys.modules))"

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout == "set()\n"


def test_help_lists_the_verbs(kvbench):
    """
    --help shows every verb and the exit codes.
    """
    result = kvbench("--help")

    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert all(verb in shown for verb in ("sweep", "plan", "report", "ls", "doctor", "130 interrupted"))


@pytest.mark.parametrize(
    "command",
    [
        "sweep CONFIG --output",
        "search CONFIG --budget 2.5 --output",
        "kernel --output",
        "export RUN --to eee --output",
        "init smollm2-135m-instruct --output",
        "report RUN --plot",
        "check RUN --write",
    ],
)
def test_an_object_store_is_no_place_to_write(kvbench, tmp_path, monkeypatch, command):
    """
    It is refused in a line that says what to do, wherever something is written; no folder of that name is made.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "CONFIG").touch()
    result = kvbench(*command.split(), "s3://bucket/run")

    assert "s3://bucket/run: kvbench writes to paths, mounted ones too" in one_error(result, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CONFIG", "RUN"]


def test_the_version_is_the_packages(kvbench):
    """
    --version names the installed version.
    """
    from importlib.metadata import version

    assert kvbench("--version").stdout == f"kvbench {version('kvbench')}\n"


@pytest.mark.parametrize(
    "arguments",
    [("swep",), ("sweep",), ("sweep", "c.yaml", "--limt", "3"), ("ls", "dtypse"), ("report", "x", "--format", "xml")],
)
def test_wrong_usage_is_2(kvbench, arguments):
    """
    An unknown verb, option or value is a usage error.
    """
    result = kvbench(*arguments)

    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_help_says_what_an_option_takes(kvbench):
    """
    Where cells run unless told otherwise, what else is a device, what may be repeated, and no type of Python's.
    """
    pages = {verb: " ".join(kvbench(verb, "--help").stdout.split()) for verb in ("sweep", "plan", "compare", "kernel")}

    assert "or cpu,cpu. [default: the first GPU, else the CPU]" in pages["sweep"]
    assert pages["plan"].count("repeatable") == 3
    assert "[default: the sweep's; of timings fp16]" in pages["compare"]
    assert "the smallest difference that each task can show" in pages["plan"]
    assert not any("list[" in page for page in pages.values())


def test_a_session(kvbench, toy, tmp_path):
    """
    plan, sweep, plan, report: results on stdout, progress on stderr, everything in out/<name>.
    """
    config = toy.write_config(tmp_path / "toys.yaml")

    before = kvbench("plan", config)
    assert before.exit_code == 0
    assert "16 cells: 0 done, 0 failed, 16 to run" in before.stdout
    assert not (tmp_path / "out").exists()

    swept = kvbench("sweep", config)
    assert swept.exit_code == 0
    assert swept.stdout == ""
    assert "16 of 16 cells done" in swept.stderr

    assert "16 cells: 16 done, 0 failed, 0 to run" in kvbench("plan", config).stdout

    report = kvbench("report", "out/toys")
    assert report.exit_code == 0
    assert report.stderr == ""
    assert report.stdout.splitlines()[-1] == "out/toys/report.md · report.csv · report.json"
    assert all((tmp_path / "out/toys" / f"report.{kind}").is_file() for kind in ("md", "csv", "json"))


def test_a_comparison(kvbench, toy, tmp_path):
    """
    compare, check and show after a sweep: verdicts, a baseline file, an equal run that passes, a tampered that fails.
    """
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=[{"task": "toy_a", "n": 200}])
    assert kvbench("sweep", config).exit_code == 0
    assert kvbench("sweep", config, "--output", "again").exit_code == 0

    compared = kvbench("compare", "out/toys", "--baseline", "fp16", "--margin", "2pp")
    assert compared.exit_code == 0
    assert "WORSE" in compared.stdout
    assert "toy_a acc 0 of 200 flipped" in compared.stdout
    rows = json.loads(kvbench("compare", "out/toys", "--format", "json").stdout)
    promised = "model dtype rotation task metric baseline value difference ci_low ci_high n test p_holm verdict"
    assert all(set(promised.split()) <= set(row) for row in rows)
    assert {row["dtype"] for row in rows} == {
        "again",
        "int8_per_token_head",
        *(f"again {seed} of int8_per_token_head" for seed in (1, 2)),
    }

    assert kvbench("check", "again", "--write", "baseline.json").exit_code == 0
    for against in ("again", "baseline.json"):
        equal = kvbench("check", "out/toys", "--against", against)
        assert equal.exit_code == 0
        assert equal.stdout.endswith("4 compared, 0 failed, 0 skipped\n")
    (cell,) = Path("out/toys/cells").glob("toy-int8*")
    tamper(cell, points=3)
    failed = kvbench("check", "out/toys", "--against", "baseline.json")
    assert failed.exit_code == 1
    assert failed.stdout.startswith("FAILED toy int8_per_token_head none toy_a acc: 0.535 -> 0.505 (−3.0 pp, 6 of 200")

    shown = kvbench("show", cell)
    assert shown.exit_code == 0
    assert "int8_per_token_head · none against fp16 · none: acc 99 of 200" in shown.stdout


def tamper(cell, points):
    """Takes right answers from a cell of 200 documents, in its samples and its record."""
    store = Store(cell.parents[1])
    record, samples = store.read(cell.name), store.samples(cell.name)
    right = samples.index[samples["acc"] == 1][: 2 * points]
    samples.loc[right, "acc"] = 0.0
    first, *others = record.metrics
    metrics = (replace(first, value=float(samples["acc"].mean())), *others)
    store.save(replace(record, metrics=metrics), samples.to_dict("records"))


def test_what_cannot_be_compared_is_5(kvbench, toy, tmp_path):
    """
    Another limit is refused with the reason and exit code 5, by compare and by check; nothing there is 5 too.
    """
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=[{"task": "toy_a", "n": 200}])
    kvbench("sweep", config)
    kvbench("sweep", config, "--limit", "150", "--output", "short")

    compared = kvbench("compare", "out/toys", "short")
    assert compared.exit_code == 5
    assert "INVALID: 150 documents here, 200 in the baseline, 150 in both" in compared.stdout
    checked = kvbench("check", "short", "--against", "out/toys")
    assert checked.exit_code == 5
    assert "FAILED toy fp16 none toy_a acc, kld: 150 documents here" in checked.stdout
    assert checked.stdout.endswith("0 compared, 2 failed, 0 skipped\n")
    (tmp_path / "empty").mkdir()
    assert "has no finished cell" in one_error(kvbench("compare", "empty"), 5)


def test_only_a_baseline_file_is_written_over(kvbench, toy, tmp_path):
    """
    `check --write` refuses a file that kvbench did not make, with exit code 2, and leaves it as it is.
    """
    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"]))
    Path("thesis.txt").write_text("mine")

    refused = one_error(kvbench("check", "out/toys", "--write", "thesis.txt"), 2)

    assert "cannot write thesis.txt: it is no baseline file of kvbench, and stays as it is" in refused
    assert Path("thesis.txt").read_text() == "mine"


def test_a_fault_of_our_own_is_70(monkeypatch, capsys):
    """
    An exception that no verb knows is one line that asks for a report and names the file with the traceback.
    """

    def broken():
        raise ZeroDivisionError("of all\nthings")

    monkeypatch.setattr(sys.modules["kvbench.cli.app"], "app", broken)
    with pytest.raises(SystemExit) as left:
        main()

    line = capsys.readouterr().err
    assert left.value.code == 70
    assert line.startswith("error: a fault of kvbench's own, ZeroDivisionError: of all things; please report it")
    assert line.count("\n") == 1
    file = Path(line.split()[-1])
    assert "ZeroDivisionError: of all\nthings" in file.read_text()
    assert 'raise ZeroDivisionError("of all' in file.read_text()
    file.unlink()


def test_what_is_closed_to_us_is_one_line(kvbench, toy, tmp_path, monkeypatch, capsys):
    """
    A file or a folder that may not be read is named, with exit code 4 where no verb knows it, 2 for a model; `runs`
    lists those beside it.
    """
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "closed")
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["kvbench.cli.app"], "app", lambda: raise_(denied))
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 4
        assert capsys.readouterr().err == "error: closed: Permission denied\n"
    with monkeypatch.context() as patched:
        patched.setattr("kvbench.sweep.parts._source", lambda spec: raise_(denied))
        assert one_error(kvbench("init", "closed"), 2) == "error: model 'closed': closed: Permission denied\n"
        patched.setattr("kvbench.sweep.parts._source", lambda spec: raise_(OSError("no such cache")))
        assert one_error(kvbench("init", "closed"), 2) == "error: model 'closed': no such cache\n"

    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"]))
    Path("out/closed").mkdir()
    known = runs.is_real_folder
    monkeypatch.setattr(runs, "is_real_folder", lambda path: raise_(denied) if "closed" in path.parts else known(path))
    listed = kvbench("runs", "out")
    assert (listed.exit_code, "toys" in listed.stdout, "closed" in listed.stdout) == (0, True, False)


def test_prompts_of_no_folder_are_refused(kvbench, toy, tmp_path):
    """
    `report --data` names a folder that is there, or the page would silently lack them.
    """
    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"]))

    told = one_error(kvbench("report", "out/toys", "--format", "html", "--data", "absent"), 2)

    assert told == "error: --data: no folder absent\n"


def test_what_is_printed_may_go_nowhere(monkeypatch):
    """
    A closed stdout or stderr (`>&-`) takes nothing and breaks nothing; of an error that a full disk's stderr does not
    take the exit code is left.
    """
    monkeypatch.setattr(sys, "argv", ["kvbench", "ls", "rotations"])
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0

    monkeypatch.setattr(sys, "argv", ["kvbench", "plan", "absent.yaml"])
    for stderr in (None, Path("/dev/full").open("w", buffering=1, encoding="utf-8")):  # noqa: SIM115 - closed by pytest
        monkeypatch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stream_of_another_encoding_takes_every_text(monkeypatch, terminal):
    """
    A file or a pipe gets UTF-8, as all files of kvbench; a terminal of ASCII shows what it can.
    """

    class Stream(io.TextIOWrapper):
        def isatty(self):
            return terminal

    written = io.BytesIO()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["kvbench", "ls", "rotations"])
    monkeypatch.setattr(sys, "stdout", Stream(written, "ascii", "backslashreplace", write_through=True))
    with pytest.raises(SystemExit) as left:
        main()

    assert left.value.code == 0
    assert sys.stdout.errors == ("replace" if terminal else "backslashreplace")
    assert ("─".encode() in written.getvalue()) == (not terminal)
    assert (b"????" in written.getvalue()) == terminal


def test_a_full_disk_is_the_machines_fault_and_named(kvbench, toy, tmp_path, monkeypatch):
    """
    Whatever is written: one line with the file, exit code 4, and no part of a file is left. A table is shown first.
    """
    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"]))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for arguments, file in (
        (("init", "smollm2-135m-instruct"), "smollm2-135m-instruct.yaml"),
        (("report", "out/toys", "--format", "html"), "out/toys/report.html"),
        (("check", "out/toys", "--write", "kept.json"), "kept.json"),
    ):
        assert one_error(kvbench(*arguments), 4) == f"error: cannot write {file}: No space left on device\n"
        assert not list(Path().glob(f"**/{file}"))
    shown = kvbench("report", "out/toys")
    assert (shown.exit_code, "toy_a" in shown.stdout) == (0, True)
    assert shown.stderr == "not written: out/toys/report.md: No space left on device\n"
    assert not list(Path().glob("**/.draft-*"))


def test_a_baseline_file_needs_a_folder(kvbench, toy, tmp_path):
    """
    Where it cannot be written the error says why, and what --write takes.
    """
    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"]))

    missing = one_error(kvbench("check", "out/toys", "--write", "absent/baseline.json"), 2)
    taken = one_error(kvbench("check", "out/toys", "--write", "out"), 2)

    assert "cannot write absent/baseline.json: there is no folder absent; --write takes a file in a folder" in missing
    assert "cannot write out: Is a directory; --write takes a file" in taken


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "absent"), "no run folder or baseline file absent"),
        (("compare", "out/toys", "--margin", "1"), "expected a margin in percentage points, such as 1pp"),
        (
            ("compare", "out/toys", "--baseline", "int9"),
            "--baseline int9: unknown dtype 'int9': there is int8",
        ),
        (("check", "out/toys"), "give either --against BASELINE or --write FILE"),
        (("check", "out/toys", "--against", "x", "--fail-on", "bad"), "--fail-on bad: expected one of worse, drop"),
        (("show", "out/toys", "dtype=int9"), "dtype=int9 matches no cell; there are again, "),
    ],
)
def test_wrong_comparisons_are_2(kvbench, toy, tmp_path, arguments, message):
    """
    A folder, margin, baseline or condition that cannot be is bad input.
    """
    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"]))

    assert message in one_error(kvbench(*arguments), 2)


def test_timings_are_compared(kvbench, tmp_path):
    """
    Rows of `kvbench kernel --output`: ratios of medians against fp16 of the same shape, or against the same of a file.
    """
    shape = {"op": "decode", "rotation": "none", "batch": 1, "context": 8192, "head_dim": 128}
    noise = [i % 7 / 100 for i in range(20)]

    def write(name, gpu, **us):
        rows = [
            {**shape, "dtype": dtype, "us": median, "samples_us": [median + x for x in noise]}
            for dtype, median in us.items()
        ]
        Path(name).write_text(json.dumps({"environment": {"gpus": [{"name": gpu}]}, "rows": rows}))

    write("before.json", "H100", fp16=20.0, bf16=20.05, int8=11.0, int4=30.0)
    write("after.json", "H100", int8=12.0)
    write("elsewhere.json", "H200", int8=8.0)

    rows = json.loads(kvbench("compare", "before.json", "--format", "json").stdout)
    assert [(row["dtype"], row["verdict"]) for row in rows] == [
        ("bf16", "SAME"),
        ("int8", "FASTER"),
        ("int4", "SLOWER"),
    ]
    assert rows[1]["ci_low"] < rows[1]["ratio"] < rows[1]["ci_high"]
    assert rows[1]["ratio"] == pytest.approx(11 / 20, abs=0.01)
    (row,) = json.loads(kvbench("compare", "before.json", "after.json", "--format", "json").stdout)
    assert (row["against"], row["verdict"]) == ("int8 · none", "SLOWER")
    keep("kept", json.loads(Path("before.json").read_text())["rows"], "H100")
    unclear = kvbench("compare", "before.json", "--baseline", "int")
    assert unclear.exit_code == 2
    assert "dtype 'int' is not unique: one of int4, int8" in unclear.stderr
    assert "one of fp16/none, bf16/none, int8/none" in kvbench("compare", "before.json", "--baseline", "int9").stderr
    kept = json.loads(kvbench("compare", "kept", "--format", "json").stdout)
    assert {row["dtype"]: (row["ratio"], row["verdict"]) for row in kept} == {
        row["dtype"]: (row["ratio"], row["verdict"]) for row in rows
    }
    refused = kvbench("compare", "before.json", "elsewhere.json")
    assert refused.exit_code == 5
    assert "INVALID: timed on H200, the baseline on H100" in refused.stdout


def test_kernel_times_are_gated(kvbench):
    """
    A time whose interval is slower by more than the margin fails, and so does one that is gone; an equal copy passes.
    What could not be compared is named: another GPU, or a baseline without times, which a baseline file is.
    """
    shape = {"op": "decode", "rotation": "none", "batch": 1, "context": 8192, "head_dim": 128}

    def run(name, gpu="H100", **us):
        samples = {dtype: [median + i % 7 / 100 for i in range(20)] for dtype, median in us.items()}
        keep(name, [{**shape, "dtype": one, "us": us[one], "samples_us": samples[one]} for one in us], gpu)

    run("before", fp16=20.0, int8=11.0, int4=8.0)
    run("after", fp16=20.0, int8=11.5, int4=8.04)
    run("fewer", fp16=20.0, int4=8.0)
    run("elsewhere", gpu="H200", int8=8.0)

    equal = kvbench("check", "before", "--against", "before")
    assert (equal.exit_code, equal.stdout.splitlines()[-1]) == (0, "3 compared, 0 failed, 0 skipped")
    slower = kvbench("check", "after", "--against", "before")
    assert slower.exit_code == 1
    (line,) = [line for line in slower.stdout.splitlines() if line.startswith("FAILED")]
    assert "decode 1×8192 · 32/8 heads × 128 · pages of 64 · int8 · none: 11.0 -> 11.5 µs (× 1.045" in line
    assert kvbench("check", "after", "--against", "before", "--margin", "6pp").exit_code == 0
    gone = kvbench("check", "fewer", "--against", "before").stdout
    assert "int8 · none: no time here" in gone
    other = kvbench("check", "elsewhere", "--against", "before", "--fail-on", "worse")
    assert other.exit_code == 5
    assert "timed on H200, the baseline on H100" in other.stdout
    assert "holds kernel times alone" in one_error(kvbench("check", "before", "--write", "base.json"), 5)


def test_a_baseline_file_gates_no_kernel_times(kvbench, toy, tmp_path):
    """
    Of a folder with both, --write keeps the scores and says so; a check against the file names what it leaves out.
    """
    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"]))
    row = {"op": "decode", "rotation": "none", "batch": 1, "context": 8192, "head_dim": 128, "dtype": "fp16"}
    keep("out/toys", [{**row, "us": 20.0, "samples_us": [20.0, 20.1]}], "H100")

    written = kvbench("check", "out/toys", "--write", "base.json")
    assert written.exit_code == 0
    assert "kernel times are not kept in it" in written.stderr
    checked = kvbench("check", "out/toys", "--against", "base.json").stdout
    assert "skipped 1 kernel times: the baseline has none" in checked
    assert checked.endswith("4 compared, 0 failed, 1 skipped\n")


def keep(folder, rows, gpu):
    """The rows as `kvbench kernel --output` keeps them."""
    from kvbench.timing import as_record

    environment = {"device": "cuda", "gpus": [{"name": gpu}]}
    place = {"prefix": 0, "query_heads": 32, "kv_heads": 8, "page_size": 64, "gate": "ok", "rel_error": 1e-3}
    for row in rows:
        us, nothing = row["us"], {"speedup": None, "read_bytes": 0, "gbps": 0.0, "share_of_copy": 0.0}
        spread = {"us_p10": us, "us_p90": us}
        Store(Path(folder)).save(*as_record({**place, **nothing, **spread, **row}, environment))


def test_a_plan_says_what_could_be_seen(kvbench, toy, tmp_path):
    """
    Before a sweep by an assumed discordance, after it by the measured; a difference wider than the margin is marked.
    """
    config = toy.write_config(tmp_path / "toys.yaml", tasks=[{"task": "toy_a", "n": 1319}, {"task": "toy_b", "n": 50}])
    before = kvbench("plan", config, "--only", "dtype=int8").stdout

    assert "Holm over 4 comparisons; margin 1pp" in before
    assert "2.1 pp   n=1319, if 5% of answers flip   WIDER THAN THE MARGIN" in before
    assert "n=50, if 5% of answers flip   WIDER THAN THE MARGIN" in before
    assert "WIDER" not in kvbench("plan", config, "--only", "task=toy_a", "--set", "margin=5pp").stdout
    kvbench("sweep", config)
    after = kvbench("plan", config).stdout
    assert "Holm over 12 comparisons" in after
    assert "toy_a acc" in after
    assert "of answers flipped before (median scheme)" in after


def test_a_plan_counts_what_the_run_will_compare(kvbench, toy, tmp_path, monkeypatch):
    """
    The family is every metric of every compared cell; where only a run tells how many those are, a bound, said so.
    """
    monkeypatch.setattr(command, "REAL", replace(toy.PARTS, make_task=make_task))
    tasks = ["arc_easy", "wikitext", "divergence", {"task": "needle", "contexts": [1024, 2048]}]
    options = {"dtypes": ["int8", "int4"], "rotations": ["none"]}
    config = toy.write_config(tmp_path / "toys.yaml", tasks=tasks, **options)
    assert f"Holm over {2 * (2 + 1 + 3 + 3)} comparisons" in kvbench("plan", config).stdout

    toy.write_config(config, tasks=[*tasks, "niah_single_1", "throughput"], **options)
    assert f"Holm over at least {2 * (2 + 1 + 3 + 3 + 1)} comparisons" in kvbench("plan", config).stdout
    alone = kvbench("plan", config, "--only", "task=throughput").stdout
    assert "5 cells" in alone
    assert "comparisons" not in alone


def test_a_table_is_never_cut(kvbench, toy, tmp_path, monkeypatch):
    """
    However narrow the terminal, a name goes on after its colon and is whole otherwise; --wide keeps it in one line.
    """
    monkeypatch.setenv("COLUMNS", "20")
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int4:int2"])
    kvbench("sweep", config)

    for output in (kvbench("report", "out/toys").stdout, kvbench("plan", config).stdout):
        assert "int4_per_token_head:  " in output
        assert re.search(r"int2_per_token_head\s", output)
        assert "randomized_hadamard:" in output
        assert "…" not in output
    assert "int4_per_token_head:int2_per_token_head" in kvbench("report", "out/toys", "--wide").stdout


@pytest.mark.parametrize("kind", ["md", "csv", "json"])
def test_other_formats_are_pure(kvbench, toy, tmp_path, kind):
    """
    Markdown, CSV and JSON on stdout are what is written to the file, and nothing else.
    """
    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml"))

    result = kvbench("report", "out/toys", "--format", kind)

    assert result.stdout == (tmp_path / f"out/toys/report.{kind}").read_text()
    assert result.stderr.startswith("out/toys/report.md")


def test_a_dry_run_runs_nothing(kvbench, toy, tmp_path):
    """
    --dry-run is the plan.
    """
    config = toy.write_config(tmp_path / "toys.yaml")

    result = kvbench("sweep", config, "--dry-run", "--only", "dtype=int4")

    assert result.exit_code == 0
    assert "2 cells: 0 done, 0 failed, 2 to run" in result.stdout
    assert not (tmp_path / "out").exists()


def test_plan_as_json(kvbench, toy, tmp_path):
    """
    A row a cell, with its true bits, its bytes and its state.
    """
    rows = json.loads(kvbench("plan", toy.write_config(tmp_path / "toys.yaml"), "--format", "json").stdout)

    assert len(rows) == 16
    assert {row["status"] for row in rows} == {"to run"}
    assert {row["dtype"]: row["kv_bytes_per_token"] for row in rows}["int2_per_token_head"] == 3 * 2 * 2 * (16 + 4)


def test_a_plan_says_what_is_missing(kvbench, toy, tmp_path):
    """
    A model and data that are not here are named with what to do; the rest of the plan stands.
    """
    config = toy.write_config(
        tmp_path / "toys.yaml", model="absent", tasks=["toy_a", {"task": "toy_b", "lacks": "toy_b wants a file"}]
    )

    result = kvbench("plan", config)

    assert result.exit_code == 0
    assert "  model absent: fetch it from somewhere\n  toy_b wants a file\n" in result.stdout
    assert "16 to run" in result.stdout


def test_a_plan_warns_of_a_task_longer_than_the_model(kvbench, toy, tmp_path):
    """
    It stands under what is missing, and the other tasks still run.
    """
    config = toy.write_config(tmp_path / "toys.yaml", tasks=["toy_a", {"task": "toy_b", "tokens": 2000}])

    result = kvbench("plan", config)

    assert (
        "missing here:\n  model toy, task toy_b: 2000 tokens are more than the model's 1024; ask for fewer\n"
    ) in result.stdout
    assert kvbench("sweep", config, "--only", "task=toy_a").exit_code == 0


def test_a_quick_look_is_marked(kvbench, toy, tmp_path):
    """
    --limit is marked in the progress, the plan and the report.
    """
    config = toy.write_config(tmp_path / "toys.yaml")

    assert "NOT A REAL SCORE" in kvbench("sweep", config, "--limit", 5).stderr
    assert "NOT A REAL SCORE" in kvbench("plan", config, "--limit", 5).stdout
    assert "NOT A REAL SCORE" in kvbench("report", "out/toys").stdout


@pytest.mark.parametrize(
    ("changes", "options", "code", "message"),
    [
        ({"dtypes": ["int99"]}, [], 2, "toys.yaml:"),
        ({"model": "nobody"}, [], 2, "unknown model 'nobody': did you mean toy?"),
        ({"tasks": ["gsm"]}, [], 2, "unknown task 'gsm'"),
        (
            {"model": "odd"},
            [],
            2,
            "model odd, scheme int4_per_token_head · randomized_hadamard: head_dim 63 does not fit",
        ),
        ({"model": "absent"}, [], 4, "model absent: fetch it from somewhere"),
        ({}, ["--only", "dtype=int99"], 2, "--only dtype=int99: unknown dtype 'int99'"),
        ({}, ["--only", "dtype=int8", "--skip", "task=toy_*"], 2, "leave no cell"),
        ({}, ["--set", "tasks[7]=x"], 2, "there is no tasks[7]"),
    ],
)
def test_bad_input_is_one_message(kvbench, toy, tmp_path, changes, options, code, message):
    """
    What a person got wrong is said without a traceback, with its exit code, and nothing is written.
    """
    config = toy.write_config(tmp_path / "toys.yaml", **changes)

    assert message in one_error(kvbench("sweep", config, *options), code)
    assert not (tmp_path / "out/toys/cells").exists()


def test_a_gpu_is_named_once(kvbench, toy, tmp_path):
    """
    Two processes on one GPU would share its memory and its time, so `--devices 0,0` is refused before anything is read.
    """
    config = toy.write_config(tmp_path / "toys.yaml")

    error = one_error(kvbench("sweep", config, "--devices", "1,0,0"), 2)

    assert "--devices 1,0,0: GPU 0 appears twice" in error
    assert "name each once" in error


def test_a_run_goes_where_a_run_may_be(kvbench, toy, tmp_path):
    """
    plan, sweep and kernel refuse a file, and a folder that holds other things; a run folder and an empty one they take.
    """
    config = toy.write_config(tmp_path / "toys.yaml")
    (tmp_path / "file").write_text("")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.tex").write_text("")
    (tmp_path / "empty").mkdir()

    for place, what in (("file", "is a file"), ("others", "holds other files and no run")):
        for verb in (["plan", config], ["sweep", config], ["kernel", "--dtype", "int2"]):
            assert f"{place} {what}; --output takes a run folder" in one_error(kvbench(*verb, "--output", place), 2)
    assert [path.name for path in (tmp_path / "others").iterdir()] == ["thesis.tex"]
    assert kvbench("sweep", config, "--output", "empty").exit_code == 0
    assert kvbench("plan", config, "--output", "empty").exit_code == 0


def test_a_run_folder_is_of_one_sweep(kvbench, toy, tmp_path):
    """
    Another sweep's run is not written over; by its name its cells can be added to, and --fresh starts over.
    """
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"])
    assert kvbench("sweep", config).exit_code == 0
    other = ("sweep", config, "--set", "name=other", "--output", "out/toys")

    assert "is a run of the sweep 'toys', and this is 'other'" in one_error(kvbench(*other), 2)
    assert Store(Path("out/toys")).run()["sweep"] == "toys"
    assert kvbench(*other, "--set", "name=toys", "--set", "dtypes=[int4]").exit_code == 0
    assert kvbench(*other, "--fresh").exit_code == 0


def test_a_failed_cell_is_3_and_a_living_canary_1(kvbench, toy, tmp_path, monkeypatch):
    """
    The exit code of a sweep says whether its numbers can be used.
    """
    config = toy.write_config(tmp_path / "toys.yaml", tasks=[{"task": "toy_a", "fails": "int2"}])
    assert kvbench("sweep", config).exit_code == 3

    monkeypatch.setenv("TOY_IGNORES_CACHE", "1")
    assert kvbench("sweep", config, "--fresh").exit_code == 1


def test_nothing_to_report_is_5_and_no_folder_2(kvbench, tmp_path):
    """
    A folder that is no run has nothing to report; one that is not there is a mistake.
    """
    (tmp_path / "empty").mkdir()

    assert "is no run folder" in one_error(kvbench("report", "empty"), 5)
    assert "no folder absent" in one_error(kvbench("report", "absent"), 2)


def test_a_page_and_a_picture_of_a_sweep(kvbench, toy, tmp_path):
    """
    --format html writes report.html and says where, and no other table; --plot draws where it is told, or says why not.
    """
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"])
    assert kvbench("sweep", config).exit_code == 0

    made = kvbench("report", "out/toys", "--format", "html")
    assert made.stdout.strip() == "out/toys/report.html"
    assert Path("out/toys/report.html").read_text().startswith("<!doctype html>")
    assert not Path("out/toys/report.md").exists()

    assert kvbench("report", "out/toys", "--plot", "trade.svg").stdout.strip().endswith("trade.svg")
    assert Path("trade.svg").stat().st_size > 1000
    assert "ends in .svg or .png" in one_error(kvbench("report", "out/toys", "--plot", "trade.pdf"), 2)
    assert "cannot write absent/trade.svg" in one_error(kvbench("report", "out/toys", "--plot", "absent/trade.svg"), 2)
    for verb in ("plan toys.yaml", "compare out/toys"):
        assert kvbench(*verb.split(), "--format", "html").stdout.startswith("<!doctype html>")


def test_a_lost_run_json_is_no_verdict(kvbench, toy, tmp_path):
    """
    Without run.json nobody knows the baseline: no cell is compared with itself, and the report says why it judges none.
    """
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"])
    assert kvbench("sweep", config).exit_code == 0
    assert kvbench("check", "out/toys", "--write", "base.json").exit_code == 0
    (tmp_path / "out/toys/run.json").write_text("{")

    assert "names no baseline" in one_error(kvbench("compare", "out/toys"), 5)
    assert "no verdicts: run.json is missing or broken" in kvbench("report", "out/toys").stdout
    assert "int8_per_token_head" in kvbench("compare", "out/toys", "--baseline", "fp16").stdout
    assert "0 failed, 0 skipped" in kvbench("check", "out/toys", "--against", "base.json").stdout
    broken = kvbench("check", "out/toys", "--against", "out/toys")
    assert broken.stdout.startswith("FAILED in the baseline: out/toys/run.json: not read")


def test_a_broken_record_is_named(kvbench, toy, tmp_path):
    """
    A record cut short costs its cell alone: report and compare go on and name it, show says what is wrong with it.
    """
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"])
    assert kvbench("sweep", config).exit_code == 0
    (cell,) = Path("out/toys/cells").glob("toy-int8*")
    (cell / "record.json").write_text((cell / "record.json").read_text()[:200])

    for verb in ("report", "compare"):
        assert f"{cell.name}: not a whole record" in kvbench(verb, "out/toys").stdout
    assert f"{cell.name}: not a whole record" in one_error(kvbench("show", cell), 5)
    for record in Path("out/toys/cells").glob("*/record.json"):
        record.write_text("")
    assert "has no finished cell; out/toys/cells/" in one_error(kvbench("report", "out/toys"), 5)


def test_kernels_alone_are_no_scores(kvbench, toy, tmp_path):
    """
    A run folder of untimed kernels has nothing to compare, keep or show, and the message says so, on either side.
    """
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"])
    assert kvbench("sweep", config).exit_code == 0
    small = ("--heads", "2/1", "--head-dim", "64", "--page-size", "16")
    assert kvbench("kernel", "--dtype", "fp16", *small, "--output", "kernels").exit_code == 0
    (cell,) = Path("kernels/cells").iterdir()

    for folders in (["kernels"], ["out/toys", "kernels"], ["kernels", "out/toys"]):
        assert "kernels holds no cell of a model" in one_error(kvbench("compare", *folders), 5)
    assert "holds kernel times alone" in one_error(kvbench("check", "kernels", "--write", "base.json"), 5)
    assert "is of a kernel, which reads no documents" in one_error(kvbench("show", cell), 5)


@pytest.mark.parametrize("what", ["dtypes", "rotations", "schemes", "models", "tasks"])
def test_lists_are_tables_and_json(kvbench, what):
    """
    Every list can be read by a person and by a program.
    """
    rows = json.loads(kvbench("ls", what, "--format", "json").stdout)
    table = kvbench("ls", what).stdout.splitlines()

    assert rows[0]["name"]
    body = table[next(index for index, line in enumerate(table) if line.startswith("─")) + 1 :]
    # below an empty line stands how to install what is missing
    body = body[: body.index("")] if "" in body else body
    assert len(body) == len(rows)
    assert body[0].startswith(rows[0]["name"])


def test_dtypes_carry_their_true_bits(kvbench):
    """
    Bits a value at head_dim 128 count the scale; `auto` has the model's own.
    """
    bits = {
        row["name"]: row["bits_per_value"] for row in json.loads(kvbench("ls", "dtypes", "--format", "json").stdout)
    }

    assert bits["auto"] is None
    assert (bits["fp16"], bits["int8_per_token_head"], bits["int4_per_token_head"]) == (16.0, 8.25, 4.25)
    assert bits["int2_per_token_head"] == 2.25


def test_a_closed_pipe_is_no_error():
    """
    `kvbench ls tasks | head` ends quietly.
    """
    code = "import sys; from kvbench.cli import main; sys.argv = ['kvbench', 'ls', 'tasks']; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()

    assert process.stderr.read() == b""
    process.wait(60)


def test_kernels_are_checked_where_nothing_can_be_timed(kvbench):
    """
    Without a GPU `kvbench kernel` compares each dtype with its definition, shows no time, and says so; exit 0.
    """
    small = ("--heads", "4/2", "--head-dim", "64", "--page-size", "16", "--output", "out/kernel")
    result = kvbench("kernel", "--dtype", "int2", *small)
    (record,) = Store(Path("out/kernel")).load().records.values()

    assert result.exit_code == 0, result.output
    assert "no GPU: nothing timed, only checked" in result.stdout
    assert "batch 2 in place of 1, 8, 32, context 80 in place of 8192, 32768" in result.stdout
    assert (record.dtype, record.facts["gate"], record.facts["us"]) == ("int2_per_token_head", "ok", None)
    shown = kvbench("report", "out/kernel")
    assert shown.exit_code == 0, shown.output
    (row,) = [line.split() for line in shown.stdout.splitlines() if line.startswith("int2")]
    assert float(row[4]) == pytest.approx(record.facts["read_bytes"] / 1e6, rel=0.005)
    assert row[5:8] == ["-"] * 3
    assert row[-1] == "ok"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--timed"], 4, "error: there is no GPU here to time on"),
        (["--dtype", "int7"], 2, "error: unknown dtype 'int7': there is int2, int3, int4 and int8"),
        (["--heads", "32"], 2, "error: heads are QUERY/KV, such as 32/8, not '32'"),
        (["--heads", "9/4"], 2, "error: 9 query heads are no multiple of 4 KV heads"),
        (["--batch", "many"], 2, "error: --batch: 'many' is no number from 1 to 999999999: write 32768 or 32k"),
        (["--batch", "0"], 2, "error: --batch: '0' is no number from 1 to"),
        (["--prefix", "4k"], 2, "error: --prefix is of a prefill"),
        (["nowhere.yaml"], 2, "error: no file nowhere.yaml"),
        ([str(ROOT / "README.md")], 2, f"error: {ROOT / 'README.md'}:3:2: expected alphabetic"),
        ([str(ROOT / "configs/kernels.yaml"), "--dtype", "int4"], 2, f"error: {ROOT / 'configs/kernels.yaml'} states"),
        (["--model", str(ROOT / "README.md")], 2, f"error: cannot read {ROOT / 'README.md'}"),
        (
            [str(ROOT / "configs/kernels.yaml"), "--head-dim", "64", "--no-peers"],
            2,
            f"error: {ROOT / 'configs/kernels.yaml'} states the grids: leave out --head-dim, --peers",
        ),
        (["--model", str(ROOT), "--heads", "8/2"], 2, "error: --model states the heads: leave out --heads"),
        (["--heads", "0/0"], 2, "error: heads, head_dim and page size are at least 1, not query_heads 0, kv_heads 0"),
        (["--op", "prefill", "--prefix", "1k,2k"], 2, "error: --prefix is one number, such as 28k, not '1k,2k'"),
        (["--dtype", "fp16", "--dtype", "auto"], 2, "error: auto needs a GPU: Triton's interpreter computes bf16"),
        (["--dtype", "int2", "--head-dim", "100"], 2, "error: head_dim 100 does not fit int2_per_token_head"),
    ],
)
def test_bad_kernel_options_are_one_line(kvbench, arguments, code, message):
    """
    What is wrong, alone on stderr, with the exit code of its kind.
    """
    assert one_error(kvbench("kernel", *arguments), code).startswith(message)


def test_the_result_is_the_last_line(toy, tmp_path):
    """
    When a sweep has ended its process ends too, and no library writes below the result.
    """
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int4"], tasks=["toy_a"])
    # triton is what complains where its objects outlive Python
    program = f"import runpy, sys, triton; sys.argv[0] = 'kvbench'; runpy.run_path({str(TOY)!r}, run_name='__main__')"
    arguments = ["sweep", str(config), "--output", str(tmp_path / "run")]

    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)

    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"6 of 6 cells done · kvbench report {tmp_path / 'run'}"


def test_a_run_names_no_folder_of_this_machine(kvbench, toy, tmp_path):
    """
    A text given by its whole path stands in run.json by its name alone, and a relative path as it was written.
    """
    whole, relative = tmp_path / "texts/a.txt", tmp_path / "texts/b.txt"
    whole.parent.mkdir()
    for text in (whole, relative):
        text.write_text("words " * 2000)
    centred = {"dtype": "int4", "rotation": {"key": "center", "value": "none"}, "calibration": {"text": str(whole)}}
    changes = {"calibration": {"text": "texts/b.txt"}, "schemes": [centred, "int8_centered"], "tasks": ["toy_a"]}
    assert kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", **changes)).exit_code == 0

    kept = Store(tmp_path / "out/toys").run()["config"]
    assert kept["calibration"] == {"text": "texts/b.txt"}
    assert kept["schemes"][0]["calibration"] == {"text": "a.txt"}
    assert str(tmp_path) not in (tmp_path / "out/toys/run.json").read_text()
