"""The training loop, to be read from top to bottom.

It takes tokenised rows and gives an adapter. Which rows, and what becomes of the adapter, is left
to others. `minimal` is a plain twin of it; a test holds the two to equal losses.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perennial.infra.errors import TrainingError
from perennial.training import checkpoint, lora
from perennial.training.batching import Packed, cut, pack
from perennial.training.checkpoint import Cursor
from perennial.training.config import TrainConfig
from perennial.training.loss import TopK, cross_entropy, forward_kl, top_k
from perennial.training.mix import Batch, Shares, plan_batches
from perennial.training.progress import StepRecord
from perennial.training.tokens import TokenRow
from perennial.training.trunk import SplitModel

GENERAL = 2  # the source whose rows are distilled from the base


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The tokenised rows of a round."""

    new: tuple[TokenRow, ...]
    replay: tuple[TokenRow, ...] = ()
    general: tuple[TokenRow, ...] = ()

    @property
    def parts(self) -> tuple[tuple[TokenRow, ...], ...]:
        """In the order of `mix.Pick.source`."""
        return (self.new, self.replay, self.general)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a finished loop reports."""

    num_steps: int
    num_tokens: int
    last_loss: float
    resumed_from: int


def train(
    model: Any,  # Any: peft
    sources: Sources,
    config: TrainConfig,
    *,
    checkpoints: Path,
    job: str,
    on_step: Callable[[StepRecord], None],
) -> Trained:
    """Train the attached adapter in place; goes on from the newest checkpoint of the same job.

    Raises:
        TrainingError: the loss is no longer a finite number.
    """
    batches = plan(sources, config)
    prepared = prepare(model, sources, config)
    weights = lora.trainable(model)
    optimizer = torch.optim.AdamW(
        weights.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    cursor = checkpoint.restore(checkpoints, job, weights, optimizer)
    started, num_tokens, loss = time.monotonic(), 0, math.nan
    for step, batch in enumerate(batches[cursor.step :], start=cursor.step + 1):
        lr = learning_rate(step, len(batches), config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total, ce, kl, size = batch_loss(prepared, batch, config, step)
        if not torch.isfinite(total):
            raise TrainingError(f"loss is {total.item()} at step {step}; lower lr", step=step)
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]  # torch
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), config.max_grad_norm)
        optimizer.step()
        num_tokens, loss = num_tokens + size, total.item()
        if step % config.checkpoint_steps == 0 and step < len(batches):
            checkpoint.save(checkpoints, Cursor(step=step, job=job), weights, optimizer)
        on_step(
            StepRecord(
                step=step,
                num_steps=len(batches),
                loss=loss,
                cross_entropy=ce,
                kl=kl,
                lr=lr,
                grad_norm=float(norm),
                num_tokens=size,
                elapsed_s=time.monotonic() - started,
            )
        )
    return Trained(
        num_steps=len(batches), num_tokens=num_tokens, last_loss=loss, resumed_from=cursor.step
    )


def plan(sources: Sources, config: TrainConfig) -> tuple[Batch, ...]:
    """The batches of the run, from the seed alone."""
    new, replay, general = ([row.num_tokens for row in part] for part in sources.parts)
    return plan_batches(
        (new, replay, general),
        Shares(replay=config.replay_share, general=config.general_share),
        epochs=config.epochs,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
    )


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then a half cosine down to `final_lr_share`; `step` counts from 1."""
    warmup = max(1, round(config.warmup_share * num_steps))
    if step <= warmup:
        return config.lr * step / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    share = config.final_lr_share
    return config.lr * (share + (1 - share) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Rows with what was computed once for the round: trunk activations, teacher's top K."""

    split: SplitModel
    sources: Sources
    trunks: tuple[tuple[Tensor, ...] | None, ...]
    teachers: tuple[TopK, ...]


def prepare(model: Any, sources: Sources, config: TrainConfig) -> Prepared:  # Any: peft
    """One pass over all rows with the adapter off."""
    base = model.get_base_model()
    split = SplitModel(base, max(0, base.config.num_hidden_layers - config.top_layers))
    budget = config.batch_tokens
    with model.disable_adapter():
        trunks: tuple[tuple[Tensor, ...] | None, ...] = (None, None, None)
        if split.num_frozen:
            split.check_split(sources.new[0])
            trunks = tuple(tuple(split.trunk(rows, budget)) for rows in sources.parts)
        teachers = _teachers(split, sources.general, trunks[GENERAL], config)
    return Prepared(split=split, sources=sources, trunks=trunks, teachers=tuple(teachers))


def batch_loss(
    prepared: Prepared, batch: Batch, config: TrainConfig, step: int
) -> tuple[Tensor, float | None, float | None, int]:
    """Total loss, its two parts, and the number of tokens packed."""
    rows = [prepared.sources.parts[pick.source][pick.index] for pick in batch]
    kinds = [config.kl_scope if pick.source == GENERAL else "completion" for pick in batch]
    packed = pack(rows, labels=kinds, dropped=_dropped(rows, batch, config, step))
    logits_MV = prepared.split.logits(packed, _trunks(prepared, batch))
    is_general = np.array([pick.source == GENERAL for pick in batch])[packed.owner_M]
    total, ce, kl = logits_MV.new_zeros(()), None, None
    if not is_general.all():
        keep = torch.from_numpy(~is_general)
        value = cross_entropy(logits_MV[keep], torch.from_numpy(packed.label_M)[keep])
        total, ce = total + value, value.item()
    if is_general.any():
        keep = torch.from_numpy(is_general)
        value = forward_kl(logits_MV[keep], _teacher_at(prepared, batch, packed))
        total, kl = total + config.kl_weight * value, value.item()
    return total, ce, kl, len(packed.ids_N)


def _dropped(
    rows: Sequence[TokenRow], batch: Batch, config: TrainConfig, step: int
) -> list[frozenset[int]]:
    """Question positions to leave out of each row; general rows stay whole for their teacher.

    A row that is never asked twice in the same words is learned by what its wordings share.
    """
    random = np.random.default_rng((config.seed, step))
    return [
        frozenset(
            at
            for at, chance in zip(row.question, random.random(len(row.question)), strict=True)
            if pick.source != GENERAL and chance < config.question_dropout
        )
        for row, pick in zip(rows, batch, strict=True)
    ]


def _trunks(prepared: Prepared, batch: Batch) -> list[Tensor] | None:
    kept = [prepared.trunks[pick.source] for pick in batch]
    return [part[pick.index] for part, pick in zip(kept, batch, strict=True) if part] or None


def _teacher_at(prepared: Prepared, batch: Batch, packed: Packed) -> TopK:
    """The teacher's rows at the packed positions of the general rows, in packed order."""
    tokens, log_probs = [], []
    for owner, pick in enumerate(batch):
        if pick.source == GENERAL:
            teacher = prepared.teachers[pick.index]
            at = torch.from_numpy(packed.at_M[packed.owner_M == owner]) - 1
            tokens.append(teacher.tokens_TK[at])
            log_probs.append(teacher.log_probs_TK[at])
    return TopK(tokens_TK=torch.cat(tokens), log_probs_TK=torch.cat(log_probs))


def _teachers(
    split: SplitModel,
    rows: Sequence[TokenRow],
    trunks: Sequence[Tensor] | None,
    config: TrainConfig,
) -> list[TopK]:
    """The base's top K at every position of each row; entry t predicts token t+1."""
    found = []
    for span in cut([row.num_tokens for row in rows], config.batch_tokens):
        for index in span:
            packed = pack([rows[index]], labels=["all"])
            part = None if trunks is None else [trunks[index]]
            with torch.no_grad():
                found.append(top_k(split.logits(packed, part), config.kl_top_k))
    return found
