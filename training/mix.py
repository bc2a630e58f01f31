"""In which order new, replayed and general rows are seen, with pairs and judgements among them.

Shares are of tokens, not rows: a long answer counts for what it costs. Everything follows from the
seed, so a run that was killed finds the same batches. What a batch looks like inside is `batching`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from perennial.infra.errors import InputError
from perennial.training.batching import cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Wanted parts of an epoch's tokens; new rows, pairs and judgements take the rest."""

    replay: float
    general: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pick:
    """One row of one source, at one place of the order."""

    source: int  # 0 new, 1 replay, 2 general, 3 pairs, 4 groups of judgements
    index: int


Batch = tuple[Pick, ...]
_REPLAY, _GENERAL = 1, 2


def plan_batches(
    sizes: Sequence[Sequence[int]],
    shares: Shares,
    *,
    epochs: int,
    batch_tokens: int,
    seed: int,
) -> tuple[Batch, ...]:
    """All batches of a run; more epochs begin with the batches of fewer.

    Each new row, pair and judgement is seen once an epoch. Replay and general rows are drawn
    without repetition until all were seen, then again. A source without rows gives its share to the
    others.

    Args:
        sizes: positive tokens of each row of the sources, in the order of `Pick.source`; a pair and
            a group of judgements have those of all their answers. The last two may be left out.
        shares: of replay and general rows.
        epochs: passes over the new rows.
        batch_tokens: what a batch holds at most, unless one row has more.
        seed: equal for equal batches.

    Raises:
        InputError: there is nothing new.
    """
    if not any(part for source, part in enumerate(sizes) if source not in (_REPLAY, _GENERAL)):
        raise InputError("there is no new row to train on")
    source = random.Random(seed)
    wanted = _wanted_tokens(sizes, shares)
    decks = [_Deck(part, source) for part in sizes]
    batches: list[Batch] = []
    for _ in range(epochs):
        drawn = [deck.draw(num) for deck, num in zip(decks, wanted, strict=True)]
        order = _interleave(drawn, sizes)
        lengths = [sizes[pick.source][pick.index] for pick in order]
        batches += [tuple(order[i] for i in span) for span in cut(lengths, batch_tokens)]
    return tuple(batches)


class _Deck:
    """Rows of one source in seeded order, dealt again when all were dealt."""

    def __init__(self, sizes: Sequence[int], source: random.Random) -> None:
        self._sizes = sizes
        self._source = source
        self._left: list[int] = []

    def draw(self, num_tokens: float) -> list[int]:
        """Rows of about `num_tokens` in all: the last is taken if half of it fits."""
        drawn: list[int] = []
        filled = 0.0
        while self._sizes:
            if not self._left:
                self._left = list(range(len(self._sizes)))
                self._source.shuffle(self._left)
            size = self._sizes[self._left[-1]]
            if filled + size / 2 > num_tokens:
                break
            drawn.append(self._left.pop())
            filled += size
        return drawn


def _wanted_tokens(sizes: Sequence[Sequence[int]], shares: Shares) -> list[float]:
    wanted = [float(sum(part)) for part in sizes]
    parts = {_REPLAY: shares.replay, _GENERAL: shares.general}
    share = {source: part if sizes[source] else 0.0 for source, part in parts.items()}
    num_new = sum(num for source, num in enumerate(wanted) if source not in share)
    total = num_new / (1 - sum(share.values()))
    return [total * share[source] if source in share else num for source, num in enumerate(wanted)]


def _interleave(drawn: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> list[Pick]:
    """Each source spread evenly, so that every stretch of the order holds about its share."""
    placed = []
    for source, indices in enumerate(drawn):
        total = sum(sizes[source][index] for index in indices)
        before = 0.0
        for index in indices:
            size = sizes[source][index]
            placed.append(((before + size / 2) / total, source, index))
            before += size
    # Stable: rows at one place stay in the order they were drawn in.
    placed.sort(key=lambda place: place[:2])
    return [Pick(source=source, index=index) for _, source, index in placed]
