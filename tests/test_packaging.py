"""The wheel and the sdist: what is in them, and that they work away from the checkout."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(target: str, source: Path, folder: Path) -> Path:
    """A wheel or an sdist of a source tree, by the build backend itself: no network."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel alone; its dependencies are those of this one, which are only read."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-deps", "--no-index", str(wheel)],
        check=True,
        capture_output=True,
    )
    # a path in a .pth file adds the packages, and runs none of their own .pth files: not the editable kvbench
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(installed: Path, *command: str, cwd: Path) -> str:
    done = subprocess.run(
        [str(installed / "bin" / command[0]), *command[1:]], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_packages_and_their_data(wheel):
    """
    Every file of kvbench/ and kvbench_kernels/ (task files and py.typed too), the configurations, the licence;
    nothing else.
    """
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    expected = set()
    for folder in (ROOT / "kvbench", ROOT / "kernels" / "kvbench_kernels"):
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(str(path.relative_to(folder.parent)))
    for path in (ROOT / "configs").rglob("*.*"):
        expected.add(f"kvbench-{PROJECT['version']}.data/data/share/kvbench/{path.relative_to(ROOT)}")
    assert names == expected
    assert "kvbench/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    """
    What is published as source gives the same files, byte for byte.
    """
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()

    again = build("wheel", source, tmp_path / "wheel")

    def contents(path: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    assert contents(again) == contents(wheel)
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "Makefile", "requirements-cpu.txt", "tests/conftest.py"):
        assert (source / name).is_file()


def test_the_console_script_works_away_from_the_checkout(installed, tmp_path):
    """
    `kvbench --help` and `kvbench ls dtypes` from the wheel, in another folder.
    """
    origin = run(installed, "python", "-c", "import kvbench; print(kvbench.__file__)", cwd=tmp_path)
    assert Path(origin.strip()).is_relative_to(installed)

    assert "sweep" in run(installed, "kvbench", "--help", cwd=tmp_path)
    assert "int4_per_token_head" in run(installed, "kvbench", "ls", "dtypes", cwd=tmp_path)


def test_nothing_is_called_kernels(installed, tmp_path):
    """
    transformers looks for a package `kernels`, and must not find our folder, in the wheel or in an editable install.
    """
    question = "import importlib.util as u; print(u.find_spec('kernels'), u.find_spec('kvbench_kernels') is not None)"

    assert run(installed, "python", "-c", question, cwd=tmp_path).split() == ["None", "True"]
    editable = subprocess.run(
        [sys.executable, "-c", question], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert editable.stdout.split() == ["None", "True"]


def test_the_version_stands_in_one_place(installed, tmp_path):
    """
    pyproject.toml says it, the metadata repeats it, and no module has it written down.
    """
    question = "import importlib.metadata as m; print(m.version('kvbench'))"

    assert run(installed, "python", "-c", question, cwd=tmp_path).strip() == PROJECT["version"]
    written = re.compile(rf"__version__ *= *[\"']|{re.escape(PROJECT['version'])}")
    assert [path for path in (ROOT / "kvbench").rglob("*.py") if written.search(path.read_text(encoding="utf-8"))] == []


def test_every_direct_dependency_is_pinned():
    """
    requirements-cpu.txt constrains all that pyproject.toml asks for, by version alone: no hosts, paths or local builds.
    """
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    asked = {
        re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")
        for requirement in [*PROJECT["dependencies"], *groups["dev"]]
    }
    pins = [line for line in (ROOT / "requirements-cpu.txt").read_text().splitlines() if not line.startswith("#")]

    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    assert asked <= {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
