"""The numbers of a training round, checked when they are made.

Defaults are for SmolLM2-135M; tests/bench/round_recipe.py measures what they give. Which rows are
trained on is left to the job file.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from perennial.infra.errors import ConfigError

Targets = Literal["all-linear", "mlp", "attention"]
Start = Literal["base", "parent"]

TARGET_MODULES: Mapping[str, tuple[str, ...]] = {
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One recipe. `to_json`/`from_json` round-trip; `fingerprint` names it."""

    rank: int = 16
    alpha: float = 32.0
    scaling: Literal["classic", "rslora"] = "classic"
    targets: Targets = "all-linear"
    top_layers: int = 20  # LoRA on the last so many layers; those below are frozen and cached
    start: Start = "parent"  # with a parent: go on from it, or rebuild on the buffer
    lr: float = 1e-3
    warmup_share: float = 0.1
    final_lr_share: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 10  # passes over the new rows
    batch_tokens: int = 512  # trained tokens of one step
    max_len: int = 512  # a longer row is refused
    replay_share: float = 0.35  # of all tokens of an epoch
    general_share: float = 0.20
    question_dropout: float = 0.3  # chance that a token of a question is masked
    kl_weight: float = 1.0
    kl_top_k: int = 20
    kl_scope: Literal["completion", "all"] = "completion"
    shrink: float = 1.0  # ΔW is multiplied by this at the end
    checkpoint_steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("rank", "alpha", "lr", "epochs", "batch_tokens", "max_len", "kl_top_k")
        for name in (*positive, "top_layers", "max_grad_norm", "checkpoint_steps"):
            self._require(name, getattr(self, name) > 0, "positive")
        for name in ("warmup_share", "final_lr_share", "shrink"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("weight_decay", "kl_weight", "seed"):
            self._require(name, getattr(self, name) >= 0, "zero or more")
        for name in ("replay_share", "general_share", "question_dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        total = self.replay_share + self.general_share
        self._require("replay_share", total < 1, "below 1 together with general_share")
        for name, allowed in _CHOICES.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")

    def to_json(self) -> dict[str, Any]:
        """A JSON object of every field."""
        return dataclasses.asdict(self)

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that change when any field changes."""
        body = json.dumps(self.to_json(), sort_keys=True).encode()
        return hashlib.sha256(body).hexdigest()[:12]

    def _require(self, name: str, is_met: bool, rule: str) -> None:
        if not is_met:
            raise ConfigError(f"{name} must be {rule}, got {getattr(self, name)!r}", name=name)


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "targets": tuple(TARGET_MODULES),
    "start": ("base", "parent"),
    "scaling": ("classic", "rslora"),
    "kl_scope": ("completion", "all"),
}


def from_json(raw: Mapping[str, Any]) -> TrainConfig:  # Any: the JSON edge
    """The config with `raw`'s fields over the defaults.

    Raises:
        ConfigError: a field is unknown, of the wrong type or out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name, value in raw.items():
        if name not in fields:
            raise ConfigError(f"unknown training setting {name!r}; known: {', '.join(fields)}")
        wanted = type(fields[name].default)
        is_number = wanted is float and isinstance(value, int) and not isinstance(value, bool)
        if type(value) is not wanted and not is_number:
            raise ConfigError(f"{name} must be {wanted.__name__}, got {value!r}", name=name)
    return TrainConfig(**raw)
