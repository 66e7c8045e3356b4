"""What the machine lacks is no model's fault and no cell's: Triton's cache, its compiler, memory."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import kvbench_kernels.loading  # noqa: F401 - it tells Triton to look
import pytest
import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import store
from triton.runtime.build import compile_module_from_src
from triton.runtime.jit import JITFunction

from kvbench.cli.shared import fail
from kvbench.faults import is_the_machine_s, triton_fault
from kvbench.results import Store
from kvbench.runners import agreement
from kvbench.runners.model_files import RefusedError
from kvbench.sweep.command import Options, run_sweep
from kvbench.sweep.spec import ModelSpec
from kvbench.sweep.stopping import UnusableError

pytestmark = [
    # a kernel that could not be loaded has nothing to unload, which Triton looks for all the same
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


def put_one(x):
    store(x, 1.0)


def build():
    """Compiles a kernel for a GPU that need not be here, or takes it from the cache."""
    source = ASTSource(JITFunction(put_one), {"x": "*fp32"}, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache of Triton's with one kernel, and the kernel's own folder."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(cache))
        build()
        yield cache, next(file.parent for file in cache.rglob("*.cubin"))


def without_its_binary(folder):
    group = folder / "__grp__put_one.json"
    paths = json.loads(group.read_text())["child_paths"]
    group.write_text(json.dumps({"child_paths": {name: paths[name] for name in paths if "cubin" not in name}}))


def cut_off(folder):
    (folder / "put_one.json").write_text('{"name": "put')


def of_other_bytes(folder):
    (folder / "put_one.ptx").write_bytes(b"\xff\xfe")


DAMAGES = {without_its_binary: "KeyError", cut_off: "JSONDecodeError", of_other_bytes: "UnicodeDecodeError"}


@pytest.fixture(params=DAMAGES, ids=lambda one: one.__name__)
def damaged(request, compiled):
    """What a launch raises over a cache of which a file is damaged: the folder, the error's type."""
    cache, folder = compiled
    before = {file: file.read_bytes() for file in folder.iterdir()}
    request.param(folder)
    yield cache, DAMAGES[request.param]
    for file, content in before.items():
        file.write_bytes(content)


def test_a_damaged_cache_of_triton_s_is_named(damaged, capsys):
    """
    The folder, and that it is to be removed; exit code 4, though some of these errors are those of bad input.
    """
    cache, kind = damaged
    with pytest.raises((KeyError, ValueError)) as raised:
        build()

    line = triton_fault(raised.value)
    assert line.startswith(f"Triton's cache {cache} has a damaged file ({kind}: ")
    assert line.endswith("): remove that folder")
    with pytest.raises(typer.Exit) as ended:
        fail(raised.value, 2)
    assert ended.value.exit_code == 4
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("damaged", [without_its_binary], indirect=True)
def test_a_damaged_cache_is_no_model_s_fault(damaged, toy, tmp_path, monkeypatch):
    """
    Met where a model is compared with itself or in a cell: the sweep ends with that line, and nothing of it is kept.
    """

    def compare(model, page_size, attention):
        monkeypatch.setattr(agreement._Prompts, "of", lambda loaded: None)
        monkeypatch.setattr(agreement, "_parts", lambda *_: [build()])
        return agreement.check(model)

    def opened(*arguments):
        model = toy.open_model(*arguments)
        model.runner = lambda *_, **__: build()
        return model

    path = toy.write_config(tmp_path / "toys.yaml")
    options = Options(output=tmp_path / "run", executor="inline")
    for parts in (replace(toy.PARTS, compare=compare), replace(toy.PARTS, open_model=opened)):
        with pytest.raises(UnusableError, match=r"Triton's cache .* remove that folder; the same command goes on$"):
            run_sweep(path, options, parts)
        assert Store(options.output).load().records == {}


def test_what_triton_lacks_is_said(tmp_path, monkeypatch):
    """
    A cache that can't be written, and no C compiler.
    """
    (tmp_path / "file").touch()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "file/cache"))
    with pytest.raises(OSError, match="file") as raised:
        build()
    assert triton_fault(raised.value).endswith("Not a directory): name another folder with TRITON_CACHE_DIR")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError) as raised:
        compile_module_from_src("int main;", "launcher")
    assert triton_fault(raised.value).startswith("Triton can't build what launches kernels on this machine: Runtime")


def test_memory_is_the_machine_s_and_a_model_s_error_is_not(toy, monkeypatch):
    """
    A model that no memory is left for is not refused; one whose code fails is.
    """
    whole = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
    model = toy.open_model(ModelSpec(name="toy"), "float32", "cpu")
    raised = iter([whole, MemoryError(), KeyError("cubin")])

    def parts(*_):
        raise next(raised)

    monkeypatch.setattr(agreement._Prompts, "of", lambda loaded: None)
    monkeypatch.setattr(agreement, "_parts", parts)
    for kind in (RuntimeError, MemoryError, RefusedError):
        with pytest.raises(kind) as found:
            agreement.check(model)
        assert is_the_machine_s(found.value) == (kind is not RefusedError)


@pytest.mark.parametrize("bytes_left", [0, 700, -1])
def test_a_kernel_cut_off_in_triton_s_cache_is_not_loaded(bytes_left, compiled, monkeypatch):
    """
    CUDA is not given it, which on an H200 ended the process by a segmentation fault; the folder is named. A whole one
    is loaded.
    """
    cache, folder = compiled
    loaded = []

    def load_binary(name, image, shared, device):
        loaded.append(name)
        return None, None, 0, 0, 1024

    utils = SimpleNamespace(load_binary=load_binary, unload_module=lambda module: None)
    active = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda *_: None,
        utils=utils,
    )
    monkeypatch.setattr(triton.compiler.compiler, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton.compiler.compiler, "max_shared_mem", lambda device: 2**17)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(cache))
    build()._init_handles()
    assert loaded == ["put_one"]
    binary = folder / "put_one.cubin"
    image = binary.read_bytes()
    binary.write_bytes(image[:bytes_left])
    try:
        with pytest.raises(ValueError, match="kernel image") as raised:
            build()._init_handles()
    finally:
        binary.write_bytes(image)

    assert loaded == ["put_one"]
    line = triton_fault(raised.value)
    assert line.startswith(f"Triton's cache {cache} has a damaged file (ValueError: kernel image put_one.cubin has ")
    assert line.endswith("): remove that folder")
