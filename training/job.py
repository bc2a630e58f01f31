"""The job file: what one process that trains, evaluates or drafts is to do.

Paths inside it are relative to the job file's folder. Unknown fields are errors, because a
misspelt one would silently train with a default.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from perennial.infra.artifacts import MANIFEST
from perennial.infra.errors import ConfigError, InputError
from perennial.training import config as configs
from perennial.training.config import TrainConfig

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """One round: rows in, adapter out."""

    base_model: str
    cache_dir: Path
    parent_adapter: Path | None
    fast_adapter: Path | None  # of start "slow-fast": the folder fast/ of the parent's round
    teachers: Path | None  # of the replayed rows: the folder teachers/ of the parent's round
    dev_rows: Path | None  # of start "blend": rows that choose α
    train_rows: Path
    replay_rows: Path | None
    general_rows: Path | None
    pair_rows: Path | None
    judgement_rows: Path | None
    config: TrainConfig
    num_threads: int | None  # None: chosen from the machine
    device: Device
    dtype: DType
    digest: str  # of the settings and of the bytes of every input; names the job's checkpoints


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalJob:
    """Every adapter scored on every suite, the same rows for all."""

    base_model: str
    cache_dir: Path
    adapters: Mapping[str, Path | None]  # None: the base model
    suites: Mapping[str, Path]
    max_new_tokens: int
    num_threads: int | None
    device: Device
    dtype: DType
    kl_suites: tuple[str, ...]  # on these the KL to the base model is measured too


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftJob:
    """General rows, written by the base model."""

    base_model: str
    cache_dir: Path
    num_rows: int
    seed: int
    num_threads: int | None
    device: Device
    dtype: DType


def read_train_job(path: Path) -> TrainJob:
    """The job in a JSON file.

    Raises:
        ConfigError: a field is unknown, missing or of the wrong type.
        InputError: the file or a file it names cannot be read.
    """
    raw = _read(path, required=("base_model", "train_rows"), optional=_TRAIN_OPTIONAL)
    home = path.parent
    rows = {name: _path(raw, name, home) for name in _ROWS}
    parent, fast = _path(raw, "parent_adapter", home), _path(raw, "fast_adapter", home)
    teachers = _path(raw, "teachers", home)
    train_rows = rows["train_rows"]
    if train_rows is None:
        raise ConfigError("train_rows must name a file, got null", name="train_rows")
    config = configs.from_json(_mapping(raw, "config", {}))
    adapters = [
        folder / name if folder else None
        for folder in (parent, fast)
        for name in ("adapter_model.safetensors", "adapter_config.json")
    ]
    manifest = teachers / MANIFEST if teachers else None
    settings = [raw["base_model"], config.to_json()]
    return TrainJob(
        base_model=_text(raw, "base_model"),
        cache_dir=_path(raw, "cache_dir", home) or home / "models",
        parent_adapter=parent,
        fast_adapter=fast,
        teachers=teachers,
        dev_rows=rows["dev_rows"],
        train_rows=train_rows,
        replay_rows=rows["replay_rows"],
        general_rows=rows["general_rows"],
        pair_rows=rows["pair_rows"],
        judgement_rows=rows["judgement_rows"],
        config=config,
        num_threads=_threads(raw),
        device=_choice(raw, "device", get_args(Device)),
        dtype=_choice(raw, "dtype", get_args(DType)),
        digest=_digest(settings, (*rows.values(), *adapters, manifest)),
    )


def read_eval_job(path: Path) -> EvalJob:
    """The job in a JSON file; errors as in `read_train_job`."""
    required = ("base_model", "adapters", "suites")
    raw = _read(path, required=required, optional=_EVAL_OPTIONAL)
    home = path.parent
    adapters, suites = _mapping(raw, "adapters"), _mapping(raw, "suites")
    kl_suites = raw.get("kl_suites", [])
    if not isinstance(kl_suites, list) or not {*kl_suites} <= {*suites}:
        raise ConfigError(f"kl_suites must be a list of names of suites, got {kl_suites!r}")
    for name in (*adapters, *suites):
        if not name or not all(char.isalnum() or char in "-_." for char in name):
            raise ConfigError(f"{name!r} cannot name a result file; use letters, digits, - _ .")
    return EvalJob(
        base_model=_text(raw, "base_model"),
        cache_dir=_path(raw, "cache_dir", home) or home / "models",
        adapters=MappingProxyType({name: _path(adapters, name, home) for name in adapters}),
        suites=MappingProxyType({name: home / _text(suites, name) for name in suites}),
        max_new_tokens=_positive(raw, "max_new_tokens", 32),
        num_threads=_threads(raw),
        device=_choice(raw, "device", get_args(Device)),
        dtype=_choice(raw, "dtype", get_args(DType)),
        kl_suites=tuple(kl_suites),
    )


def read_draft_job(path: Path) -> DraftJob:
    """The job in a JSON file; errors as in `read_train_job`."""
    optional = ("cache_dir", "seed", *_MACHINE)
    raw = _read(path, required=("base_model", "num_rows"), optional=optional)
    seed = raw.get("seed", 0)
    if type(seed) is not int:
        raise ConfigError(f"seed must be an int, got {seed!r}", name="seed")
    return DraftJob(
        base_model=_text(raw, "base_model"),
        cache_dir=_path(raw, "cache_dir", path.parent) or path.parent / "models",
        num_rows=_positive(raw, "num_rows"),
        seed=seed,
        num_threads=_threads(raw),
        device=_choice(raw, "device", get_args(Device)),
        dtype=_choice(raw, "dtype", get_args(DType)),
    )


def left_by(adapter: Path) -> dict[str, str]:
    """What the round of an adapter left beside it, as fields of the next round's job."""
    beside = {"teachers": adapter.parent / "teachers", "fast_adapter": adapter.parent / "fast"}
    return {name: str(folder) for name, folder in beside.items() if folder.exists()}


_MACHINE = ("num_threads", "device", "dtype")
_EVAL_OPTIONAL = ("cache_dir", *_MACHINE, "max_new_tokens", "kl_suites")
_ROWS = ("train_rows", "replay_rows", "general_rows", "pair_rows", "judgement_rows", "dev_rows")
_TRAIN_OPTIONAL = (
    "cache_dir",
    "parent_adapter",
    "fast_adapter",
    "teachers",
    *_ROWS[1:],
    "config",
    *_MACHINE,
)


def _read(path: Path, *, required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the job file {path}: {error}", path=str(path)) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"the job file {path} must hold a JSON object")
    missing = [name for name in required if name not in raw]
    unknown = [name for name in raw if name not in {*required, *optional}]
    if missing or unknown:
        known = ", ".join((*required, *optional))
        raise ConfigError(
            f"job file {path}: missing {missing}, unknown {unknown}; fields are {known}"
        )
    return raw


def _text(raw: Mapping[str, Any], name: str) -> str:
    value = raw[name]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a non-empty string, got {value!r}", name=name)
    return value


def _path(raw: Mapping[str, Any], name: str, home: Path) -> Path | None:
    return None if raw.get(name) is None else home / _text(raw, name)


def _mapping(raw: Mapping[str, Any], name: str, default: object = None) -> dict[str, Any]:
    value = raw.get(name, default)
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object, got {value!r}", name=name)
    return value


def _positive(raw: Mapping[str, Any], name: str, default: object = None) -> int:
    value = raw.get(name, default)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name} must be a positive int, got {value!r}", name=name)
    return value


def _threads(raw: Mapping[str, Any]) -> int | None:
    value = raw.get("num_threads")
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"num_threads must be a positive int or null, got {value!r}")
    return value


def _choice(raw: Mapping[str, Any], name: str, allowed: tuple[Any, ...]) -> Any:  # Any: a Literal
    value = raw.get(name, "auto")
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}", name=name)
    return value


def _digest(settings: object, paths: Sequence[Path | None]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        try:
            content = b"-" if path is None else path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}", path=str(path)) from error
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
