"""What a round computes once, before its first step: numbers that do not change while it trains.

They are the activations of the frozen trunk, the base's likeliest tokens, and the log-probabilities
of the preference reference. The loss of a batch is left to `objective`.

Shapes: M predicted positions, R packed rows, K tokens of a teacher.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from perennial.training.batching import Packed, cut, pack
from perennial.training.config import TrainConfig
from perennial.training.loss import Targets, TopK, top_k
from perennial.training.machine import in_halves, telling_out_of_memory
from perennial.training.mix import Pick, Source
from perennial.training.recipes import RECIPES, JudgedRows, PairRows, Unit, rows_of, scored_rows
from perennial.training.tokens import TokenRow
from perennial.training.trunk import SplitModel

Trunks = Sequence[Tensor]  # of rows, (T, width) each


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The tokenised rows of a round; `teachers` by the id of the replayed row that they taught."""

    new: tuple[TokenRow, ...] = ()
    replay: tuple[TokenRow, ...] = ()
    general: tuple[TokenRow, ...] = ()
    pairs: tuple[PairRows, ...] = ()
    judgements: tuple[JudgedRows, ...] = ()
    teachers: Mapping[str, TopK] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[tuple[Unit, ...], ...]:
        """In the order of `mix.Source`."""
        return (self.new, self.replay, self.general, self.pairs, self.judgements)

    @property
    def picks(self) -> tuple[Pick, ...]:
        """Every row, source by source."""
        parts = zip(Source, self.parts, strict=True)
        return tuple(
            Pick(source=source, index=i) for source, part in parts for i in range(len(part))
        )

    def unit(self, pick: Pick) -> Unit:
        """What was drawn."""
        return self.parts[pick.source][pick.index]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A unit's fixed numbers: trunks of its rows, and what it is held to."""

    split: SplitModel
    sources: Sources
    trunks: Mapping[Pick, tuple[Tensor, ...]]
    teachers: Mapping[Pick, TopK]
    references: Mapping[Pick, Tensor]
    blend_of: Mapping[Source, float]  # the teacher's part of the target, by source

    def unit(self, pick: Pick) -> Unit:
        """What was drawn."""
        return self.sources.unit(pick)


def split_model(model: Any, config: TrainConfig) -> SplitModel:  # Any: peft
    """The model cut below the layers that the adapter is on."""
    base = model.get_base_model()
    num_frozen = max(0, base.config.num_hidden_layers - config.top_layers)
    return SplitModel(base, num_frozen, config.kernels)


@telling_out_of_memory()
def teach(
    split: SplitModel,
    rows: Sequence[TokenRow],
    trunks: Trunks | None,
    scope: str,
    config: TrainConfig,
) -> list[TopK]:
    """The model's top K at the labels of each row, on the CPU; entry i is for the i-th label."""

    def run(span: Sequence[int]) -> list[TopK]:
        packed = pack([rows[index] for index in span], labels=[scope] * len(span))
        part = None if trunks is None else [trunks[index] for index in span]
        with torch.no_grad():
            best = top_k(split.logits(packed, part), config.kl_top_k)
        tokens, log_probs = (
            torch.split(part.cpu(), packed.num_labels)
            for part in (best.tokens_TK, best.log_probs_TK)
        )
        parts = zip(tokens, log_probs, strict=True)
        return [TopK(tokens_TK=part, log_probs_TK=probs) for part, probs in parts]

    spans = cut([row.num_tokens for row in rows], config.batch_tokens)
    return [taught for span in spans for taught in in_halves(run, span)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """What the frozen base makes of rows: computed, unless a cache stands in."""

    trunk: Callable[[SplitModel, Sequence[TokenRow], int], list[Tensor]] = SplitModel.trunk
    teach: Callable[
        [SplitModel, Sequence[TokenRow], Trunks | None, str, TrainConfig], list[TopK]
    ] = teach


COMPUTED = Frozen()


@telling_out_of_memory()
def prepare(
    model: Any,  # Any: peft
    sources: Sources,
    config: TrainConfig,
    drawn: Collection[Pick],
    frozen: Frozen = COMPUTED,
) -> Prepared:
    """One pass over the rows that are drawn; the adapter is off, but for the reference "start"."""
    picks = [pick for pick in sources.picks if pick in drawn]
    split, recipe = split_model(model, config), RECIPES[config.recipe]
    with model.disable_adapter():
        split.check_split(next(row for part in sources.parts for u in part for row in rows_of(u)))
        trunks = _trunks(split, sources, picks, config, frozen)
        general = [pick for pick in picks if pick.source == Source.GENERAL]
        known = [trunks[pick][0] for pick in general] if trunks else None
        rows = [sources.general[pick.index] for pick in general]
        taught = frozen.teach(split, rows, known, config.kl_scope, config)
    teachers = dict(zip(general, taught, strict=True))
    if recipe.replay_blend:
        teachers |= {
            pick: sources.teachers[sources.unit(pick).id]
            for pick in picks
            if pick.source == Source.REPLAY and sources.unit(pick).id in sources.teachers
        }
    off = model.disable_adapter() if config.reference == "base" else contextlib.nullcontext()
    with off:
        references = _references(split, sources, picks, trunks)
    return Prepared(
        split=split,
        sources=sources,
        trunks=trunks,
        teachers=teachers,
        references=references,
        blend_of={
            Source.REPLAY: recipe.replay_blend or 0.0,
            Source.GENERAL: config.general_blend,
        },
    )


def log_probs_of(split: SplitModel, rows: Sequence[TokenRow], trunks: Trunks | None) -> Tensor:
    """Log-probability of each completion, without gradient."""

    def run(span: Sequence[int]) -> list[Tensor]:
        packed = pack([rows[index] for index in span], labels=["completion"] * len(span))
        part = None if trunks is None else [trunks[index] for index in span]
        with torch.no_grad():
            losses = split.losses(packed, part, labels_of(packed).to(split.device))
        return [row_log_probs(packed, losses.loss_M, len(span))]

    return torch.cat(in_halves(run, range(len(rows))))


def labels_of(packed: Packed) -> Targets:
    """What cross-entropy alone compares with: the labels, and no teacher."""
    num = len(packed.label_M)
    return Targets(
        label_M=torch.from_numpy(packed.label_M),
        blend_M=torch.zeros(num),
        tokens_MK=torch.zeros(num, 0, dtype=torch.long),
        probs_MK=torch.zeros(num, 0),
    )


def row_log_probs(packed: Packed, loss_M: Tensor, num_rows: int) -> Tensor:
    """Log-probability of each row (R,) from the negative ones of its positions (M,)."""
    owner_M = torch.from_numpy(packed.owner_M).to(loss_M.device)
    return loss_M.new_zeros(num_rows).index_add(0, owner_M, -loss_M)


def _trunks(
    split: SplitModel,
    sources: Sources,
    picks: Sequence[Pick],
    config: TrainConfig,
    frozen: Frozen,
) -> dict[Pick, tuple[Tensor, ...]]:
    if not split.num_frozen:
        return {}
    keyed = [(pick, row) for pick in picks for row in _all_rows(sources.unit(pick))]
    found: dict[Pick, tuple[Tensor, ...]] = {}
    trunks = frozen.trunk(split, [row for _, row in keyed], config.batch_tokens)
    for (key, _), trunk in zip(keyed, trunks, strict=True):
        found[key] = (*found.get(key, ()), trunk)
    return found


def _references(
    split: SplitModel,
    sources: Sources,
    picks: Sequence[Pick],
    trunks: Mapping[Pick, tuple[Tensor, ...]],
) -> dict[Pick, Tensor]:
    """Log-probability of each completion of a pair, or of judged and then mismatched answers."""
    return {
        pick: log_probs_of(split, _all_rows(sources.unit(pick)), trunks.get(pick))
        for pick in picks
        if pick.source in (Source.PAIRS, Source.JUDGEMENTS)
    }


def _all_rows(unit: Unit) -> tuple[TokenRow, ...]:
    return (*rows_of(unit), *scored_rows(unit))
