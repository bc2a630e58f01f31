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

from perennial.infra.errors import DivergedError, InputError, OutOfMemoryError
from perennial.training import checkpoint, lora, objective
from perennial.training.checkpoint import Cursor, Found
from perennial.training.config import TrainConfig
from perennial.training.machine import is_out_of_memory
from perennial.training.mix import Batch, Mix, Planned, Source, make_mix, steps
from perennial.training.objective import BatchLoss
from perennial.training.prepared import COMPUTED, Frozen, Prepared, Sources, prepare
from perennial.training.progress import StepRecord
from perennial.training.recipes import shares_of

_LOG = logging.getLogger(__name__)
_LOOK_BACK = 5  # steps whose mean loss tells whether a run diverges


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a finished loop reports.

    num_steps: 0 where the KL budget was spent before the first checkpoint: the adapter is then not
    one to keep. num_parts: into how many a batch had to be cut for memory, since resumed_from.
    kl_to_base: nats a token of general rows, as in `recent_kl`.
    """

    num_steps: int
    resumed_from: int
    num_tokens: int
    last_loss: float
    num_parts: int
    kl_to_base: float | None
    stopped_because: str | None = None


def train(
    model: Any,  # Any: peft
    sources: Sources,
    config: TrainConfig,
    *,
    checkpoints: Path,
    job: str,
    on_step: Callable[[StepRecord], None],
    frozen: Frozen = COMPUTED,
) -> Trained:
    """Train the attached adapter in place; goes on from the newest checkpoint of the same job.

    Raises:
        InputError: there is a KL budget, and no general row to measure the KL on.
        DivergedError: the loss is not finite or climbs.
        OutOfMemoryError: one row alone does not fit in memory.
        UnavailableError: a checkpoint cannot be written; the ones before it are whole.
    """
    mix = mix_of(sources, config)
    check_budget(mix, config)
    prepared = prepare(model, sources, config, mix.drawable, frozen)
    weights = lora.trainable(model)
    optimizer = make_optimizer(weights, config)
    restored = checkpoint.restore(checkpoints, job, weights, optimizer)
    started, num_parts = time.monotonic(), 1
    done, seen = list(restored.found), [found.row_losses for found in restored.found]
    for planned in steps(mix, seen):
        lr = set_rate(optimizer, learning_rate(planned, config))
        found, num_parts = gradients(prepared, planned, config, optimizer, num_parts)
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), config.max_grad_norm)
        done.append(_found(found, objective.unit_losses(prepared, planned.batch, found)))
        vocabulary = model.config.vocab_size
        check_loss([step.loss for step in done], float(norm), found, planned.step, vocabulary)
        optimizer.step()
        seen.append(done[-1].row_losses)
        on_step(_record(planned, found, lr, float(norm), time.monotonic() - started))
        if said := over_budget(done, planned, config):
            good = checkpoint.restore(checkpoints, job, weights, optimizer)
            _LOG.warning("%s: back to step=%d", said, good.step)
            return _trained(good.found, config, restored.step, num_parts, said)
        if planned.step % config.checkpoint_steps == 0 and planned.step < planned.num_steps:
            checkpoint.save(checkpoints, Cursor(job=job, found=tuple(done)), weights, optimizer)
    return _trained(done, config, restored.step, num_parts)


def check_budget(mix: Mix, config: TrainConfig) -> None:
    """Raise InputError for a KL budget that nothing would be measured for."""
    if config.kl_budget and not any(pick.source == Source.GENERAL for pick in mix.drawable):
        raise InputError(
            f"kl_budget is {config.kl_budget:g}, but this round draws no general rows, on which "
            "the KL is measured; take a recipe with an anchor and a general_share, or set it to 0"
        )


def recent_kl(done: Sequence[Found], num_looks: int) -> float | None:
    """Mean KL of the newest `num_looks` steps that had general rows; None if none had."""
    kls = [step.kl for step in done if step.kl is not None][-num_looks:]
    return sum(kls) / len(kls) if kls else None


def over_budget(done: Sequence[Found], planned: Planned, config: TrainConfig) -> str | None:
    """Why a run goes back to its last checkpoint; None within the KL budget, or without one.

    It is looked at where checkpoints are, and after the last step.
    """
    is_look = planned.step % config.checkpoint_steps == 0 or planned.step == planned.num_steps
    kl = recent_kl(done, config.checkpoint_steps) if config.kl_budget and is_look else None
    if kl is None or kl <= config.kl_budget:
        return None
    return f"KL to the base is {kl:.3g} at step {planned.step}, over kl_budget {config.kl_budget:g}"


def mix_of(sources: Sources, config: TrainConfig) -> Mix:
    """What the run may see."""
    return make_mix(
        [[unit.num_tokens for unit in part] for part in sources.parts],
        shares_of(config),
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
        OutOfMemoryError: a part of one row, pair or group of judged answers does not fit.
    """
    step, batch = planned.step, planned.batch
    over = objective.sums(prepared, batch)
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
            raise OutOfMemoryError(
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
    """Raise DivergedError, with the rows of the batch to look at, when the run has gone wrong.

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
    raise DivergedError(
        f"{trouble} at step {step}; rows with the highest loss: {rows}; lower lr: the rows "
        "of a round stay as they are, unless their user is erased",
        step=step,
    )


def _found(found: BatchLoss, row_losses: Sequence[float]) -> Found:
    return Found(
        loss=found.total.item(),
        row_losses=tuple(row_losses),
        kl=found.kl,
        num_tokens=found.num_tokens,
    )


def _trained(
    done: Sequence[Found],
    config: TrainConfig,
    resumed_from: int,
    num_parts: int,
    stopped_because: str | None = None,
) -> Trained:
    return Trained(
        num_steps=len(done),
        resumed_from=resumed_from,
        num_tokens=sum(step.num_tokens for step in done),
        last_loss=done[-1].loss if done else math.nan,
        num_parts=num_parts,
        kl_to_base=recent_kl(done, config.checkpoint_steps),
        stopped_because=stopped_because,
    )


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
