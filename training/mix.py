"""In which order new, replayed and general rows are seen.

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
    """Wanted parts of an epoch's tokens; new rows take the rest."""

    replay: float
    general: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pick:
    """One row of one source, at one place of the order."""

    source: int  # 0 new, 1 replay, 2 general
    index: int


Batch = tuple[Pick, ...]


def plan_batches(
    sizes: tuple[Sequence[int], Sequence[int], Sequence[int]],
    shares: Shares,
    *,
    epochs: int,
    batch_tokens: int,
    seed: int,
) -> tuple[Batch, ...]:
    """All batches of a run. `sizes` are tokens of the new, replay and general rows.

    Each new row is seen once an epoch. Replay and general rows are drawn without repetition until
    all were seen, then again. A source without rows gives its share to the others.
    """
    if not sizes[0]:
        raise InputError("there is no new row to train on")
    source = random.Random(seed)
    wanted = _wanted_tokens(sizes, shares)
    decks = [_Deck(part, source) for part in sizes]
    batches: list[Batch] = []
    for _ in range(epochs):
        drawn = [deck.draw(num) for deck, num in zip(decks, wanted, strict=True)]
        order = _interleave(drawn, sizes)
        lengths = [sizes[pick.source][pick.index] for pick in order]
        spans = cut(lengths, batch_tokens)
        batches += [tuple(order[i] for i in span) for span in spans]
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


def _wanted_tokens(sizes: Sequence[Sequence[int]], shares: Shares) -> tuple[float, float, float]:
    replay = shares.replay if sizes[1] else 0.0
    general = shares.general if sizes[2] else 0.0
    num_new = float(sum(sizes[0]))
    total = num_new / (1 - replay - general)
    return num_new, total * replay, total * general


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
    return [Pick(source=source, index=index) for _, source, index in sorted(placed)]
