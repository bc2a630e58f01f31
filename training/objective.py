"""The loss of one batch: what each packed row is compared with, and how the terms add up.

Shapes: M predicted positions, R packed rows, K tokens of a teacher.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from perennial.training.batching import Packed, pack
from perennial.training.config import TrainConfig
from perennial.training.loss import Targets, dpo, kto
from perennial.training.mix import Batch, Pick, Source
from perennial.training.prepared import Prepared, labels_of, log_probs_of, row_log_probs
from perennial.training.recipes import JudgedRows, PairRows, Unit, rows_of
from perennial.training.tokens import TokenRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """What the means of a batch divide by. Its parts divide by the same, so they add up to it."""

    labels: int
    general: int
    pairs: int
    judged: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLoss:
    """Loss of a batch or a part of one; terms are None where it has no such row.

    row_losses: the mean over each row's positions, by row id.
    """

    total: Tensor
    cross_entropy: float | None
    kl: float | None
    preference: float | None
    num_tokens: int
    row_losses: Mapping[str, float]


def sums(prepared: Prepared, batch: Batch) -> Sums:
    """How many labels, general positions, pairs and judged answers the batch has."""
    num: Counter[str] = Counter()
    for pick in batch:
        unit = prepared.unit(pick)
        if isinstance(unit, PairRows):
            num["pairs"] += 1
        elif isinstance(unit, JudgedRows):
            num["judged"] += len(unit.judged)
        elif pick.source == Source.GENERAL:
            num["general"] += len(prepared.teachers[pick].tokens_TK)
        else:
            num["labels"] += unit.num_tokens - unit.num_prompt
    return Sums(
        labels=num["labels"], general=num["general"], pairs=num["pairs"], judged=num["judged"]
    )


def batch_loss(
    prepared: Prepared, batch: Batch, over: Sums, config: TrainConfig, step: int
) -> BatchLoss:
    """Loss of a batch, or of a part of one whose sums are `over`."""
    units = [prepared.unit(pick) for pick in batch]
    rows = [row for unit in units for row in rows_of(unit)]
    kinds, dropped = _row_settings(units, batch, config, step)
    packed = pack(rows, labels=kinds, dropped=dropped)
    trunks = [trunk for pick in batch for trunk in _learning_trunks(prepared, pick)] or None
    split, targets = prepared.split, _targets(prepared, batch, packed, rows)
    found = split.losses(packed, trunks, targets.to(split.device))
    source_R = [pick.source for unit, pick in zip(units, batch, strict=True) for _ in rows_of(unit)]
    source_M = np.array(source_R)[packed.owner_M]
    general, labelled = (
        split.on_device(np.flatnonzero(np.isin(source_M, sources)))
        for sources in ([Source.GENERAL], [Source.NEW, Source.REPLAY])
    )
    ce = found.loss_M[labelled].sum() / max(1, over.labels)
    kl = found.loss_M[general].sum() / max(1, over.general)
    preference = _preference_loss(prepared, batch, packed, found.loss_M, over, config)
    total = ce + config.kl_weight * kl + config.preference_weight * preference
    return BatchLoss(
        total=total,
        cross_entropy=_mean(found.ce_M[labelled], over.labels),
        kl=_mean(found.kl_M[general], over.general),
        preference=preference.item() if over.pairs + over.judged else None,
        num_tokens=len(packed.ids_N),
        row_losses=_row_losses(rows, packed, found.loss_M),
    )


def unit_losses(prepared: Prepared, batch: Batch, found: BatchLoss) -> tuple[float, ...]:
    """The mean loss of each unit of a batch, over its rows."""
    losses = []
    for pick in batch:
        rows = rows_of(prepared.unit(pick))
        losses.append(sum(found.row_losses[row.id] for row in rows) / len(rows))
    return tuple(losses)


def add(parts: Sequence[BatchLoss]) -> BatchLoss:
    """The whole batch from its parts."""
    return BatchLoss(
        total=torch.stack([part.total.detach() for part in parts]).sum(),
        cross_entropy=_added([part.cross_entropy for part in parts]),
        kl=_added([part.kl for part in parts]),
        preference=_added([part.preference for part in parts]),
        num_tokens=sum(part.num_tokens for part in parts),
        row_losses={id_: loss for part in parts for id_, loss in part.row_losses.items()},
    )


def _row_settings(
    units: Sequence[Unit], batch: Batch, config: TrainConfig, step: int
) -> tuple[list[str], list[frozenset[int]]]:
    """Of each row: which tokens are labels, and which positions of its question to leave out.

    General rows and preferences stay whole for what they are compared with.
    """
    kinds: list[str] = []
    dropped: list[frozenset[int]] = []
    for unit, pick in zip(units, batch, strict=True):
        is_general = pick.source == Source.GENERAL
        kinds += [config.kl_scope if is_general else "completion"] * len(rows_of(unit))
        if is_general or not isinstance(unit, TokenRow):
            dropped += [frozenset[int]()] * len(rows_of(unit))
            continue
        dropped.append(dropped_positions(unit, pick, config, step))
    return kinds, dropped


def dropped_positions(row: TokenRow, pick: Pick, config: TrainConfig, step: int) -> frozenset[int]:
    """The positions of a row's question to leave out of one step.

    A question that is never asked twice in the same words is learned by what its wordings share.
    """
    chances = np.random.default_rng((config.seed, step, pick.source, pick.index))
    is_gone = chances.random(len(row.question)) < config.question_dropout
    return frozenset(np.array(row.question)[is_gone].tolist())


def _targets(prepared: Prepared, batch: Batch, packed: Packed, rows: Sequence[TokenRow]) -> Targets:
    """Labels, and for the rows of a teacher what it says; a teacher ends where its row ends."""
    plain = labels_of(packed)
    picks = [pick for pick in batch for _ in rows_of(prepared.unit(pick))]
    taught = [(o, pick) for o, pick in enumerate(picks) if pick in prepared.teachers]
    if not taught:
        return plain
    num, k = len(packed.label_M), prepared.teachers[taught[0][1]].tokens_TK.shape[1]
    tokens_MK, probs_MK = torch.zeros(num, k, dtype=torch.long), torch.zeros(num, k)
    for owner, pick in taught:
        teacher = prepared.teachers[pick]
        at = np.flatnonzero(packed.owner_M == owner)
        entry = packed.at_M[at] - (rows[owner].num_tokens - len(teacher.tokens_TK))
        tokens_MK[at] = teacher.tokens_TK[entry].long()
        probs_MK[at] = teacher.log_probs_TK[entry].float().exp()
        plain.blend_M[at] = prepared.blend_of[pick.source]
    return replace(plain, tokens_MK=tokens_MK, probs_MK=probs_MK)


def _preference_loss(
    prepared: Prepared,
    batch: Batch,
    packed: Packed,
    loss_M: Tensor,
    over: Sums,
    config: TrainConfig,
) -> Tensor:
    """Mean DPO, with its cross-entropy, over pairs plus mean weighted KTO over judged answers."""
    total, first = loss_M.new_zeros(()), 0
    units = [prepared.unit(pick) for pick in batch]
    log_probs_R = row_log_probs(packed, loss_M, sum(len(rows_of(unit)) for unit in units))
    for unit, pick in zip(units, batch, strict=True):
        ours = log_probs_R[first : first + len(rows_of(unit))]
        first += len(ours)
        if isinstance(unit, PairRows):
            total = total + _pair_loss(unit, ours, prepared.references[pick], config) / over.pairs
        elif isinstance(unit, JudgedRows):
            total = total + _judged_loss(prepared, pick, unit, ours, config) / over.judged
    return total


def _pair_loss(pair: PairRows, ours_2: Tensor, reference_2: Tensor, config: TrainConfig) -> Tensor:
    margin = reference_2[0] - reference_2[1]
    value = dpo(ours_2[0], ours_2[1], margin, beta=config.preference_beta)
    num_labels = pair.chosen.num_tokens - pair.chosen.num_prompt
    return value - config.dpo_sft_weight * ours_2[0] / num_labels


def _judged_loss(
    prepared: Prepared, pick: Pick, group: JudgedRows, ours_R: Tensor, config: TrainConfig
) -> Tensor:
    num = len(group.judged)
    trunks = prepared.trunks.get(pick)
    scores_R = log_probs_of(prepared.split, group.mismatched, trunks[num:] if trunks else None)
    reference = prepared.references[pick]
    is_desirable = ours_R.new_tensor([label == "desirable" for label in group.labels])
    losses = kto(
        ours_R - reference[:num],
        scores_R - reference[num:],
        is_desirable,
        beta=config.preference_beta,
    )
    return (ours_R.new_tensor(group.weights) * losses).sum()


def _row_losses(
    rows: Sequence[TokenRow], packed: Packed, loss_M: Tensor
) -> dict[str, float]:  # fmt: skip
    total_R = row_log_probs(packed, -loss_M.detach(), len(rows)).tolist()
    nums = [max(1, num) for num in packed.num_labels]
    return {row.id: total / num for row, total, num in zip(rows, total_R, nums, strict=True)}


def _mean(values: Tensor, num: int) -> float | None:
    return float(values.sum()) / num if num else None


def _added(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _learning_trunks(prepared: Prepared, pick: Pick) -> tuple[Tensor, ...]:
    return prepared.trunks.get(pick, ())[: len(rows_of(prepared.unit(pick)))]
