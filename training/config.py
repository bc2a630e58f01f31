"""The numbers of a training round, checked when they are made.

Defaults are for SmolLM2-135M; tests/bench/round_recipe.py measures what they give. Which rows are
trained on is left to the job file.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from perennial.infra.errors import ConfigError

TargetModules = Literal["all-linear", "mlp", "attention"]
Start = Literal["parent", "base", "slow-fast", "blend"]
RecipeName = Literal["sft", "replay", "replay-kd", "anchor", "replay-kd-anchor"]

TARGET_MODULES: Mapping[str, tuple[str, ...]] = {
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One round's numbers. `to_json`/`from_json` round-trip; `fingerprint` names them."""

    recipe: RecipeName = "replay-kd-anchor"  # the losses: the table in `recipes`
    method: Literal["lora", "dora"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    scaling: Literal["classic", "rslora"] = "classic"
    targets: TargetModules = "all-linear"
    top_layers: int = 20  # LoRA on the last so many layers; those below are frozen and cached
    start: Start = "parent"  # what becomes of a parent adapter: see `rounds`
    rebuild_every: int = 0  # rounds on one adapter until it is rebuilt on the buffer; 0: never
    lr: float = 1.5e-3
    b_lr_ratio: float = 1.0  # LoRA+: the learning rate of B over that of A
    warmup_share: float = 0.1
    final_lr_share: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 11  # passes over the new rows
    batch_tokens: int = 256  # trained tokens of one step
    max_len: int = 512  # a longer row is left out
    replay_share: float = 0.20  # of all tokens of an epoch
    general_share: float = 0.10
    mastered: float = 0.05  # nats a token; a new row under it rests, replay has its tokens; 0: none
    question_dropout: float = 0.3  # chance that a token of a question is left out
    kl_weight: float = 3.0  # of general rows beside cross-entropy
    general_blend: float = 0.5  # the base's part of a general row's target; its text has the rest
    kl_top_k: int = 20
    kl_scope: Literal["completion", "all"] = "completion"
    kl_budget: float = 0.0  # nats a token from the base on general rows; beyond it: stop; 0: none
    reference: Literal["start", "base"] = "start"  # of DPO and KTO: the adapter as loaded, or off
    preference_beta: float = 0.1
    preference_weight: float = 1.0  # of DPO and KTO beside cross-entropy
    dpo_sft_weight: float = 0.5  # of the cross-entropy of chosen answers, inside DPO
    shrink: float = 0.87  # ΔW as served over ΔW as trained, in (0, 1]; not of DoRA
    checkpoint_steps: int = 20
    kernels: Literal["fused", "plain"] = "fused"  # plain: layers as transformers and PEFT have them
    cache_mb: int = 2000  # frozen-trunk activations kept on disk across rounds; 0: none
    seed: int = 0

    def __post_init__(self) -> None:
        positive: tuple[str, ...] = ("rank", "alpha", "lr", "epochs", "batch_tokens", "max_len")
        positive += ("top_layers", "max_grad_norm", "checkpoint_steps", "b_lr_ratio", "shrink")
        for name in (*positive, "kl_top_k", "preference_beta"):
            self._require(name, getattr(self, name) > 0, "positive")
        for name in ("warmup_share", "final_lr_share", "shrink", "general_blend"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        unbounded = ("weight_decay", "kl_weight", "kl_budget", "seed", "rebuild_every", "cache_mb")
        for name in (*unbounded, "mastered", "preference_weight", "dpo_sft_weight"):
            self._require(name, getattr(self, name) >= 0, "zero or more")
        for name in ("replay_share", "general_share", "question_dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        total = self.replay_share + self.general_share
        self._require("replay_share", total < 1, "below 1 together with general_share")
        for name, allowed in _CHOICES.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        is_measured = self.kl_budget == 0 or "anchor" in self.recipe
        self._require("kl_budget", is_measured, "0 with a recipe that does not measure the KL")
        is_split = self.method == "lora" or self.start in ("parent", "base")
        self._require("start", is_split, "parent or base with method dora, which has no plain ΔW")

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
    "recipe": get_args(RecipeName),
    "method": ("lora", "dora"),
    "targets": tuple(TARGET_MODULES),
    "start": get_args(Start),
    "reference": ("start", "base"),
    "kernels": ("fused", "plain"),
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
