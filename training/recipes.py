"""Which loss each kind of row has, by recipe. One table, and the row kinds that are not plain text.

| recipe | new | replayed | general |
|---|---|---|---|
| sft | CE | not drawn | not drawn |
| replay | CE | CE | not drawn |
| replay-kd | CE | 0.5 CE + 0.5 KL | not drawn |
| anchor | CE | CE | CE + KL to the base |
| replay-kd-anchor | CE | 0.5 CE + 0.5 KL | CE + KL to the base |

KL is forward, over the 20 likeliest tokens of a teacher: for a replayed row the model that had just
learned it, cached then; for a general row the base, that is the adapter switched off, and
`general_blend` is the KL's part. In every recipe a preference pair has DPO with a CE term on the
chosen answer, a judged answer KTO with the weights of its class.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perennial.infra.errors import InputError
from perennial.training.compile import ClassWeights
from perennial.training.config import TrainConfig
from perennial.training.examples import Judgement, Label, Pair
from perennial.training.mix import Shares
from perennial.training.tokens import TokenRow, encode_answer

_GROUP = 8  # judged answers whose mismatched ones estimate one reference point


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """None: rows of that source are not drawn. replay_blend: the teacher's part of the target."""

    replay_blend: float | None = None
    is_anchored: bool = False


RECIPES: Mapping[str, Recipe] = {
    "sft": Recipe(),
    "replay": Recipe(replay_blend=0.0),
    "replay-kd": Recipe(replay_blend=0.5),
    "anchor": Recipe(replay_blend=0.0, is_anchored=True),
    "replay-kd-anchor": Recipe(replay_blend=0.5, is_anchored=True),
}


def shares_of(config: TrainConfig) -> Shares:
    """Wanted parts of an epoch's tokens; a source outside the recipe has none."""
    recipe = RECIPES[config.recipe]
    return Shares(
        replay=0.0 if recipe.replay_blend is None else config.replay_share,
        general=config.general_share if recipe.is_anchored else 0.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRows:
    """Two answers to one prompt; they share a step, for their difference is what is learned."""

    id: str
    chosen: TokenRow
    rejected: TokenRow

    @property
    def rows(self) -> tuple[TokenRow, ...]:
        """Chosen, then rejected."""
        return (self.chosen, self.rejected)

    @property
    def num_tokens(self) -> int:
        """Of both rows."""
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedRows:
    """Judged answers that share a step, and each prompt again with the answer to the next one.

    The mismatched ones are only scored. weights: λ of each judged answer.
    """

    id: str
    judged: tuple[TokenRow, ...]
    mismatched: tuple[TokenRow, ...]
    labels: tuple[Label, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.judged) < 2:
            raise InputError(
                f"KTO needs two judged answers or more, got {self.id} alone: its reference point "
                "is taken from another row's answer"
            )

    @property
    def num_tokens(self) -> int:
        """Of the judged answers."""
        return sum(row.num_tokens for row in self.judged)


Unit = TokenRow | PairRows | JudgedRows


def rows_of(unit: Unit) -> tuple[TokenRow, ...]:
    """The token rows that learn when a unit is in a step."""
    if isinstance(unit, PairRows):
        return unit.rows
    return unit.judged if isinstance(unit, JudgedRows) else (unit,)


def scored_rows(unit: Unit) -> tuple[TokenRow, ...]:
    """The token rows that are scored in such a step without a gradient."""
    return unit.mismatched if isinstance(unit, JudgedRows) else ()


def encode_pair(tokenizer: Any, pair: Pair, max_len: int) -> PairRows:  # Any: transformers
    """Both answers as rows; errors as in `encode_example`."""
    chosen, rejected = (
        encode_answer(tokenizer, f"{pair.id}/{side}", pair.messages, answer, max_len)
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected))
    )
    return PairRows(id=pair.id, chosen=chosen, rejected=rejected)


def encode_judged(
    tokenizer: Any,  # Any: transformers
    judgements: Sequence[Judgement],
    weights: ClassWeights,
    max_len: int,
    seed: int,
) -> tuple[JudgedRows, ...]:
    """Groups of about eight in seeded order; a lone last row joins the group before it.

    Errors as in `encode_example`, of the judged answers; a mismatched one may have up to twice
    `max_len` tokens.
    """
    order = list(judgements)
    random.Random(seed).shuffle(order)
    groups = [order[start : start + _GROUP] for start in range(0, len(order), _GROUP)]
    if len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    return tuple(_encode_group(tokenizer, group, weights, max_len) for group in groups)


def _encode_group(
    tokenizer: Any,  # Any: transformers
    group: Sequence[Judgement],
    weights: ClassWeights,
    max_len: int,
) -> JudgedRows:
    others = [*group[1:], group[0]]
    return JudgedRows(
        id=group[0].id,
        judged=tuple(
            encode_answer(tokenizer, row.id, row.messages, row.completion, max_len) for row in group
        ),
        mismatched=tuple(
            encode_answer(
                tokenizer, f"{row.id}/mismatched", row.messages, other.completion, 2 * max_len
            )
            for row, other in zip(group, others, strict=True)
        ),
        labels=tuple(row.label for row in group),
        weights=tuple(
            weights.desirable if row.label == "desirable" else weights.undesirable for row in group
        ),
    )
