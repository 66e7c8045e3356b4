"""Loading a model: made an ordinary folder where it is none, then read by transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.runners.catalog import EMBEDDED, ModelSource
from kvbench.runners.facts import (
    cache_layer_indices,
    cache_layers,
    max_length,
    quantization,
    revision,
    text_config,
    value_of,
)
from kvbench.runners.gguf import convert
from kvbench.runners.model_files import (
    NO_TOKENIZER,
    ComputeDtype,
    ModelError,
    RefusedError,
    one_error,
    read_json,
    transformers_config,
)

if TYPE_CHECKING:
    from kvbench.runners.base import ModelInfo
    from kvbench.runners.placement import Places

# the projections that make keys, as architectures name them
KEY_BIAS = re.compile(r"(^|\.)(k_proj|key|key_proj|qkv_proj|query_key_value|c_attn|Wqkv|qkv)\.bias$")


def load(source: ModelSource, dtype: ComputeDtype, device: str = "cpu") -> tuple[Any, Any, ModelInfo, Places]:
    """(model, tokenizer, what identifies them, where it is): a transformers model in eval mode, without gradients.

    device: "cuda" is every GPU of this process for a source that is to be spread, else the first.
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
        model, tokenizer, places = _random_model(source, getattr(torch, dtype), device)
    else:
        source, folder, options = _prepare(source, dtype)
        options |= {"trust_remote_code": source.trusted, "local_files_only": True}
        with _quiet(), one_error(f"model '{source.name}' cannot be loaded"), _code_is_named():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), output_loading_info=True, **options
            )
            model, keys = loaded
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        _check_keys(source.name, keys)
        _check_tokenizer(source.name, tokenizer, model)
        places = _placed(source, model, device)
    weights = quantization(source)
    if weights:
        _check_quantized(source.name, model, dtype, weights)
    model = model.eval().requires_grad_(False)
    info = ModelInfo(
        name=source.name,
        revision=revision(source),
        compute_dtype=dtype,
        layers=cache_layers(model.config),
        max_length=max_length(model.config, tokenizer),
        extra={
            "model_type": model.config.model_type,
            "layer_indices": list(cache_layer_indices(model.config)),
            "key_bias": _has_key_bias(model),
            **({"weights": _as_computed(model, weights)} if weights else {}),
        },
    )
    return model, tokenizer, info, places


def _placed(source: ModelSource, model: Any, device: str) -> Places:
    """Moves a model to its device, or to those that it is to be spread over."""
    from kvbench.runners.placement import devices_of, divide, in_one_place, spread

    if not source.spread:
        model.to(device)
        return in_one_place(model)
    places = divide(model, *devices_of(device))
    spread(model, places)
    return places


def _as_computed(model: Any, method: str) -> str:
    """How quantized weights are computed with: as they are stored, or expanded into plain numbers."""
    from torch.nn import Parameter

    weights = [getattr(one, "weight", None) for one in model.modules() if hasattr(one, "in_features")]
    plain = all(type(weight) is Parameter and weight.dtype == model.dtype for weight in weights)
    return f"{method}, expanded to {str(model.dtype).removeprefix('torch.')}" if plain else method


def _check_quantized(name: str, model: Any, dtype: ComputeDtype, method: str) -> None:
    """Calls a quantized model whole, once: what its library does at a first call is done before its parts are called.

    Raises:
        ModelError: it can't compute here, or does so in another dtype.
    """
    import torch

    found = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    if found != dtype:
        raise ModelError(f"model '{name}': its {method} weights compute in {found}: take compute_dtype: {found}")
    with one_error(f"model '{name}': its {method} weights can't compute in {dtype} here"), torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)


def _has_key_bias(model: Any) -> bool:
    """Whether a projection that makes keys, alone or with queries and values, has a bias other than 0."""
    return any(KEY_BIAS.search(name) and bool(bias.any()) for name, bias in model.named_parameters())


def _check_keys(name: str, keys: Mapping[str, Any]) -> None:
    """Raises RefusedError where the files' weights are not the architecture's: what is missing would be random."""
    for kind, what in (("missing", "lack"), ("mismatched", "have in another shape"), ("unexpected", "have besides")):
        if found := sorted(str(key) for key in keys.get(f"{kind}_keys") or ()):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise RefusedError(
                f"model '{name}': its files {what} {found[0]}{more}: they are not of the architecture that config.json "
                f"names, or not whole"
            )


def _check_tokenizer(name: str, tokenizer: Any, model: Any) -> None:
    """Raises RefusedError for a tokenizer without an end, or whose ids the model has no embedding for."""
    if tokenizer.eos_token_id is None:
        raise RefusedError(f"model '{name}': its tokenizer has no end-of-text token (eos_token): name one in its files")
    # tokens that were added, such as one for an image, may lie behind the embedding: texts have none of them
    rows = model.get_input_embeddings().num_embeddings
    size = max(tokenizer.vocab_size, tokenizer.eos_token_id + 1, (tokenizer.bos_token_id or 0) + 1)
    if size > rows:
        raise RefusedError(
            f"model '{name}': its tokenizer has {size} tokens and its embedding {rows}: the two belong to other models"
        )


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
        raise ModelError(NO_TOKENIZER)

    __call__ = encode


def _random_model(source: ModelSource, dtype: Any, device: str) -> tuple[Any, NoTokenizer, Places]:
    """A model of this shape, its weights drawn on the device, or on those that it is spread over; always the same."""
    import torch
    from transformers import AutoModelForCausalLM

    from kvbench.runners.placement import devices_of, divide, draw, in_one_place

    assert source.path is not None
    # no token ends an answer
    config = transformers_config({**read_json(source.path), "eos_token_id": None})
    devices = [torch.device(device)] if device.startswith("cuda") else []
    what = f"model '{source.name}' cannot be made"
    tokenizer = NoTokenizer(value_of(text_config(config), "vocab_size"))
    with _quiet(), one_error(what), torch.random.fork_rng(devices):
        if source.spread:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            places = divide(model, *devices_of(device))
            draw(model, places)
            return model, tokenizer, places
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, tokenizer, in_one_place(model)


def prepare(source: ModelSource, dtype: ComputeDtype = "float32") -> Path:
    """An ordinary model folder with this model in it, for other tools: a GGUF file is converted, a hub model fetched.

    dtype: of a converted file's weights.

    Raises:
        ModelError: it can't be had, or is a GGUF file of an architecture that only transformers' own loader reads.
    """
    source, folder, options = _prepare(source, dtype)
    if options:
        raise ModelError(f"model '{source.name}': a GGUF file of this architecture is not converted to a folder")
    return folder


def _prepare(source: ModelSource, dtype: ComputeDtype) -> tuple[ModelSource, Path, dict[str, Any]]:
    """The source once it is here, its folder, and what transformers must be told to read it."""
    if source.kind == "hub" and source.missing:
        source = _download(source)
    if source.missing or source.path is None:
        raise ModelError(f"model '{source.name}' is not on this machine: {source.missing}")
    if source.kind in ("folder", "hub"):
        return source, source.path, {}
    if source.kind == "embedded":
        model = EMBEDDED[source.name]
        # of one file the folder has the file's name
        stem = source.path.stem if len(source.slices) == 1 else source.name
        try:
            folder = convert(source.slices, stem, dtype, model.sha256)
        except ModelError as error:
            raise ModelError(f"model '{source.name}' in {model.source}: {error}: {model.missing}") from error
    else:
        folder = convert([source.path], source.path.stem, dtype)
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
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", *["*.py"] * source.trusted],
        )
    return replace(source, path=Path(folder), missing="")


@contextmanager
def _code_is_named() -> Iterator[None]:
    """transformers' refusal to run a model's own Python in our words: its own name an argument of a function."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            "it is Python code of its own, which does not run here; `model: {name: …, trust_remote_code: true}` in the "
            "YAML would run it"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers' inside the block: what matters of them is an error of ours."""
    import transformers

    logging: Any = transformers.utils.logging
    before, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if before:
            logging.enable_progress_bar()
