"""The adapter: attached to a frozen base, saved as safetensors and JSON, read back.

The layout is PEFT's, without the base's path: a path is of one machine, and an adapter outlives it.
Training it is `trainer`'s business.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor

from perennial.infra.errors import IntegrityError, ModelMissingError, TrainingError
from perennial.training.config import TARGET_MODULES, TrainConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def attach(model: Any, config: TrainConfig) -> Any:  # Any: peft
    """`model` with a fresh adapter whose product is zero, so that it still answers as the base."""
    num_layers = model.config.num_hidden_layers
    top = min(config.top_layers, num_layers)
    torch.manual_seed(config.seed)
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.scaling == "rslora",
        use_dora=config.method == "dora",
        target_modules=list(TARGET_MODULES[config.targets]),
        layers_to_transform=list(range(num_layers - top, num_layers)),
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, lora)
    assert_only_adapters_train(wrapped)
    return wrapped


def assert_only_adapters_train(model: Any) -> None:  # Any: peft
    """Raise TrainingError unless the trainable parameters are exactly the adapter's."""
    named = list(model.named_parameters())
    wrong = [name for name, weight in named if weight.requires_grad != ("lora_" in name)]
    if wrong or not any(weight.requires_grad for _, weight in named):
        raise TrainingError(f"only adapter weights may train; wrong: {wrong[:3]}")


def trainable(model: Any) -> dict[str, Tensor]:  # Any: peft
    """Adapter parameters by name, in a stable order."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save(model: Any, folder: Path, *, shrink: float = 1.0) -> None:  # Any: peft
    """Write weights and config into `folder`, ΔW multiplied by `shrink`.

    Raises:
        OSError: the weights cannot be written.
    """
    write_tensors(folder / WEIGHTS, scaled(state(model), shrink))
    fields = _plain(model.peft_config["default"].to_dict())
    fields |= {"base_model_name_or_path": "", "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(fields, indent=1, sort_keys=True))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file.

    Raises:
        OSError: it cannot be written, the disk is full say.
    """
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read_state(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT name.

    Raises:
        ModelMissingError: there is no adapter in the folder.
        IntegrityError: the file is not safetensors.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelMissingError(f"no adapter in {folder}: {WEIGHTS} is missing", path=str(folder))
    try:
        return dict(safetensors.torch.load_file(path))
    except safetensors.SafetensorError as error:
        raise IntegrityError(f"{path} is not a safetensors file: {error}") from error


def state(model: Any) -> dict[str, Tensor]:  # Any: peft
    """A copy of the adapter's tensors by PEFT name, on the CPU."""
    found = peft.get_peft_model_state_dict(model)
    return {name: weight.detach().to("cpu", copy=True) for name, weight in found.items()}


def scaled(given: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The tensors with ΔW multiplied by `factor`: B has all of it."""
    return {
        name: (weight * factor if "lora_B" in name else weight).contiguous()
        for name, weight in given.items()
    }


def set_state(model: Any, given: Mapping[str, Tensor], origin: Path) -> None:  # Any: peft
    """Set the attached adapter's weights to those that come from `origin`.

    Raises:
        TrainingError: they are of another rank, other targets or layers.
    """
    own = peft.get_peft_model_state_dict(model)
    odd = sorted(set(given) ^ set(own)) or [n for n in own if own[n].shape != given[n].shape]
    if odd:
        raise TrainingError(
            f"the parent adapter in {origin} does not fit this config (first: {odd[0]}); "
            "use start = 'base' or the parent's rank, targets, method and top_layers"
        )
    peft.set_peft_model_state_dict(model, dict(given))


def check_scale(model: Any, folder: Path) -> None:  # Any: peft
    """Raise TrainingError unless weights in `folder` give the ΔW here that they gave there."""
    fields, own = read_config(folder), model.peft_config["default"]
    there, here = scale_of(fields), scale_of(own.to_dict())
    if not math.isclose(there, here) or fields["use_dora"] != own.use_dora:
        raise TrainingError(
            f"the parent adapter in {folder} does not fit this config (ΔW is {there:g}·B·A there, "
            f"{here:g}·B·A here); use start = 'base' or its rank, alpha, scaling and method"
        )


def read_config(folder: Path) -> dict[str, Any]:  # Any: JSON
    """The adapter's config, as PEFT writes it.

    Raises:
        ModelMissingError: there is none in the folder.
        IntegrityError: the file is not one.
    """
    path = folder / CONFIG
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        scale_of(fields)
    except OSError as error:
        raise ModelMissingError(f"cannot read {path}: {error.strerror}", path=str(path)) from error
    except (ValueError, LookupError, TypeError) as error:
        raise IntegrityError(f"{path} is not an adapter's config: {error!r}") from error
    return {"use_dora": False, **fields}


def scale_of(fields: Mapping[str, Any]) -> float:  # Any: JSON
    """The factor on B·A: alpha / rank, or alpha / √rank with rsLoRA (Kalajdzievski 2023, eq. 4)."""
    rank: int = fields["r"]
    alpha: float = fields["lora_alpha"]
    return alpha / (rank**0.5 if fields.get("use_rslora") else rank)


def merge(model: Any, folder: Path) -> dict[str, Tensor]:  # Any: transformers
    """Add the ΔW in `folder` to a plain model; returns the replaced weights for `unmerge`.

    Merged weights spare evaluation the adapter's extra products; ΔW is added in fp32, and the sum
    rounded to the dtype of the model.
    """
    scale = scale_of(read_config(folder))
    state = read_state(folder)
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in (n for n in state if n.endswith("lora_A.weight")):
            key = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            weight = model.get_parameter(key)
            kept[key] = weight.detach().clone()
            a, b = (state[n].to(weight.device) for n in (name, name.replace("lora_A", "lora_B")))
            changed = weight + scale * (b.float() @ a.float())
            magnitude = state.get(name.replace("lora_A.weight", "lora_magnitude_vector"))
            if (
                magnitude is not None
            ):  # DoRA: the rows' lengths are learned (Liu et al. 2024, eq. 5)
                changed *= (magnitude.to(weight.device) / changed.norm(dim=1))[:, None]
            weight.copy_(changed)
    return kept


def unmerge(model: Any, kept: Mapping[str, Tensor]) -> None:  # Any: transformers
    """Put the weights back that `merge` replaced, bit for bit."""
    with torch.no_grad():
        for key, weight in kept.items():
            model.get_parameter(key).copy_(weight)


def _plain(value: Any) -> Any:  # Any: the JSON edge
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(inner) for inner in value)
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
