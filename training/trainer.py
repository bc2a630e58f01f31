"""The training loop, to be read from top to bottom.

It takes tokenised rows and gives an adapter. Which rows, and what becomes of the adapter, is left
to others; so is the loss of a batch. `minimal` is a plain twin of it; a test holds the two to equal
losses.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perennial.infra.errors import TrainingError
from perennial.training import checkpoint, lora, objective
from perennial.training.checkpoint import Cursor
from perennial.training.config import TrainConfig
from perennial.training.machine import is_out_of_memory
from perennial.training.mix import Batch, Mix, Planned, Shares, make_mix, steps
from perennial.training.objective import BatchLoss
from perennial.training.prepared import Prepared, Sources, TrunkOf, prepare
from perennial.training.progress import StepRecord
from perennial.training.recipes import RECIPES
from perennial.training.trunk import SplitModel

_LOG = logging.getLogger(__name__)
_LOOK_BACK = 5  # steps whose mean loss tells whether a run diverges


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a finished loop reports.

    num_parts: into how many a batch had to be cut for memory. kl_to_base: nats a token of general
    rows, since the checkpoint before the last look.
    """

    num_steps: int
    resumed_from: int
    num_tokens: int = 0
    last_loss: float = math.nan
    num_parts: int = 1
    kl_to_base: float | None = None
    stopped_because: str | None = None

    def after(self, found: BatchLoss, step: int, num_parts: int) -> "Trained":
        """With one more step."""
        return replace(
            self,
            num_steps=step,
            num_tokens=self.num_tokens + found.num_tokens,
            last_loss=found.total.item(),
            num_parts=num_parts,
        )


def train(
    model: Any,  # Any: peft
    sources: Sources,
    config: TrainConfig,
    *,
    checkpoints: Path,
    job: str,
    on_step: Callable[[StepRecord], None],
    trunk_of: TrunkOf = SplitModel.trunk,
) -> Trained:
    """Train the attached adapter in place; goes on from the newest checkpoint of the same job.

    Raises:
        TrainingError: the loss is not finite or diverges, or one row alone does not fit in memory.
        UnavailableError: a checkpoint cannot be written; the ones before it are whole.
    """
    mix = mix_of(sources, config)
    prepared = prepare(model, sources, config, trunk_of, mix.drawable)
    weights = lora.trainable(model)
    optimizer = make_optimizer(weights, config)
    cursor = checkpoint.restore(checkpoints, job, weights, optimizer)
    trained = Trained(num_steps=cursor.step, resumed_from=cursor.step)
    started, losses, kls = time.monotonic(), list[float](), list[float]()
    seen = list(cursor.losses)
    for planned in steps(mix, seen):
        lr = set_rate(optimizer, learning_rate(planned, config))
        found, num_parts = gradients(prepared, planned, config, optimizer, trained.num_parts)
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), config.max_grad_norm)
        losses.append(found.total.item())
        check_loss(losses, float(norm), found, planned.step, model.config.vocab_size)
        optimizer.step()
        seen.append(objective.unit_losses(prepared, planned.batch, found))
        kls += [found.kl] if found.kl is not None else []
        trained = trained.after(found, planned.step, num_parts)
        on_step(_record(planned, found, lr, float(norm), time.monotonic() - started))
        is_last = planned.step == planned.num_steps
        if planned.step % config.checkpoint_steps and not is_last:
            continue
        trained = replace(trained, kl_to_base=sum(kls) / len(kls) if kls else None)
        if config.kl_budget and (trained.kl_to_base or 0) > config.kl_budget:
            good = checkpoint.restore(checkpoints, job, weights, optimizer)
            return stopped_by_budget(trained, good, planned.step, config.kl_budget)
        if not is_last:
            checkpoint.save(checkpoints, Cursor(job=job, losses=tuple(seen)), weights, optimizer)
        kls = []
    return trained


def mix_of(sources: Sources, config: TrainConfig) -> Mix:
    """What the run may see; a source outside the recipe has no share."""
    recipe = RECIPES[config.recipe]
    return make_mix(
        [[unit.num_tokens for unit in part] for part in sources.parts],
        Shares(
            replay=0.0 if recipe.replay_blend is None else config.replay_share,
            general=config.general_share if recipe.is_anchored else 0.0,
        ),
        epochs=config.epochs,
        batch_tokens=config.batch_tokens,
        mastered=config.mastered,
        seed=config.seed,
    )


def make_optimizer(weights: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; with `b_lr_ratio` B learns faster than A (Hayou et al. 2024, "LoRA+", section 4)."""
    b_weights = [weight for name, weight in weights.items() if "lora_B" in name]
    others = [weight for name, weight in weights.items() if "lora_B" not in name]
    groups = [
        {"params": others, "ratio": 1.0},
        {"params": b_weights, "ratio": config.b_lr_ratio},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """`lr`, after it was given to each group in its ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
    return lr


def learning_rate(planned: Planned, config: TrainConfig) -> float:
    """Linear warm-up, then a half cosine down to `final_lr_share`."""
    warmup = max(1, round(config.warmup_share * planned.num_steps))
    if planned.step <= warmup:
        return config.lr * planned.step / warmup
    done = (planned.step - warmup) / max(1, planned.num_steps - warmup)
    share = config.final_lr_share
    return config.lr * (share + (1 - share) * (1 + math.cos(math.pi * done)) / 2)


def gradients(
    prepared: Prepared,
    planned: Planned,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    num_parts: int,
) -> tuple[BatchLoss, int]:
    """The batch's loss with its gradients set, and in how many parts it fitted into memory.

    Gradients of parts add up to the whole batch's, so a halved batch learns the same.

    Raises:
        TrainingError: a part of one row, pair or group of judged answers does not fit.
    """
    step, batch = planned.step, planned.batch
    over = objective.sums(prepared, batch, config)
    while True:
        optimizer.zero_grad(set_to_none=True)
        parts = []
        try:
            for part in halved(batch, num_parts):
                found = objective.batch_loss(prepared, part, over, config, step)
                found.total.backward()  # type: ignore[no-untyped-call]  # torch
                parts.append(replace(found, total=found.total.detach()))
            return objective.add(parts), num_parts
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if num_parts >= len(batch):
            raise TrainingError(
                f"out of memory at step {step} with one row at a time, "
                f"batch of {len(batch)}; lower max_len, top_layers or rank, or free memory",
                step=step,
            )
        num_parts = min(2 * num_parts, len(batch))
        _LOG.warning("out of memory: the batch is halved step=%d num_parts=%d", step, num_parts)


def halved(batch: Batch, num_parts: int) -> list[Batch]:
    """The batch in at most `num_parts` parts of like size, in order."""
    size = math.ceil(len(batch) / num_parts)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def check_loss(
    losses: Sequence[float], norm: float, found: BatchLoss, step: int, vocabulary: int
) -> None:
    """Raise TrainingError, with the rows of the batch to look at, when the run has gone wrong.

    It has when loss or gradient is not finite, or when the mean of five steps is more than twice
    that of the first five and worse than a uniform guess, whose loss is ln(vocabulary).
    """
    if math.isfinite(losses[-1]) and math.isfinite(norm):
        first, last = (
            sum(part) / _LOOK_BACK for part in (losses[:_LOOK_BACK], losses[-_LOOK_BACK:])
        )
        if len(losses) < 2 * _LOOK_BACK or last <= max(2 * first, math.log(vocabulary)):
            return
        trouble = f"loss diverges: {first:.3g} at first, now {last:.3g}"
    else:
        trouble = f"loss is {losses[-1]:.3g} and the gradient's norm {norm:.3g}"
    worst = sorted(found.row_losses, key=lambda id_: _badness(found.row_losses[id_]))[:3]
    rows = ", ".join(f"{id_} ({found.row_losses[id_]:.3g})" for id_ in worst)
    raise TrainingError(
        f"{trouble} at step {step}; rows with the highest loss: {rows}; lower lr, or correct "
        "or remove these rows",
        step=step,
    )


def stopped_by_budget(trained: Trained, good: Cursor, step: int, budget: float) -> Trained:
    """The report of a run that went back to its last good checkpoint.

    Raises:
        TrainingError: there is none.
    """
    said = f"KL to the base is {trained.kl_to_base:.3g} at step {step}, over kl_budget {budget:g}"
    if good.step == 0:
        raise TrainingError(f"{said}, before the first checkpoint; lower lr or raise kl_weight")
    _LOG.warning("%s: back to step=%d", said, good.step)
    return replace(trained, num_steps=good.step, stopped_because=said)


def _badness(loss: float) -> float:
    return -loss if math.isfinite(loss) else -math.inf


def _record(
    planned: Planned, found: BatchLoss, lr: float, norm: float, elapsed_s: float
) -> StepRecord:
    return StepRecord(
        step=planned.step,
        num_steps=planned.num_steps,
        loss=found.total.item(),
        cross_entropy=found.cross_entropy,
        kl=found.kl,
        preference=found.preference,
        lr=lr,
        grad_norm=norm,
        num_tokens=found.num_tokens,
        elapsed_s=elapsed_s,
    )
