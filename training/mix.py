"""In which order new, replayed and general rows are seen, with pairs and judgements among them.

Shares are of tokens, not rows: a long answer counts for what it costs. New rows that are mastered
rest, and replay has their tokens. Everything follows from the seed and from the losses that the run
has seen, so one that was killed finds the same batches. What a batch looks like inside is
`batching`.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from perennial.infra.errors import InputError
from perennial.training.batching import cut


class Source(IntEnum):
    """Where rows come from; whatever is given by source is in this order."""

    NEW = 0
    REPLAY = 1
    GENERAL = 2
    PAIRS = 3
    JUDGEMENTS = 4  # in groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Wanted parts of an epoch's tokens; new rows, pairs and judgements take the rest."""

    replay: float
    general: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pick:
    """One row of one source, at one place of the order."""

    source: Source
    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """How often a row was seen in this run, and in which epoch last.

    num_mastered: how often in succession its loss was under `Mix.mastered`.
    """

    num: int = 0
    epoch: int = 0
    num_mastered: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """All that is fixed before a run, by source: tokens of each row, wanted tokens of an epoch.

    orders_S: the rows that can be drawn, in the order in which they are seen first. mastered: a new
    row whose loss, in nats a token, is under it rests.
    """

    sizes_S: tuple[tuple[int, ...], ...]
    wanted_S: tuple[float, ...]
    orders_S: tuple[tuple[int, ...], ...]
    epochs: int
    batch_tokens: int
    mastered: float
    seed: int

    @property
    def drawable(self) -> frozenset[Pick]:
        """Every row that the run may see."""
        parts = zip(Source, self.orders_S, strict=True)
        return frozenset(Pick(source=source, index=i) for source, part in parts for i in part)


Batch = tuple[Pick, ...]
Seen = Mapping[Pick, Sight]
_SHARED = (Source.REPLAY, Source.GENERAL)  # drawn up to a share; of the others every row is seen


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """The next step, counted from 1; num_steps is exact in the last epoch, and close before."""

    step: int
    num_steps: int
    batch: Batch


def make_mix(
    sizes: Sequence[Sequence[int]],
    shares: Shares,
    *,
    epochs: int,
    batch_tokens: int,
    mastered: float,
    seed: int,
) -> Mix:
    """What a run may see: all that is new, and as much of the rest as its tokens allow.

    A source without rows gives its share to the others. Without replay no row rests: nothing would
    take its tokens.

    Args:
        sizes: by source, positive tokens of each row; a pair and a group of judgements have those
            of all their answers.
        shares: of replay and general rows.
        epochs: passes over the new rows.
        batch_tokens: what a batch holds at most, unless one row has more.
        mastered: 0 for no rest.
        seed: equal for equal batches.

    Raises:
        InputError: there is nothing new.
    """
    if not any(part for source, part in zip(Source, sizes, strict=True) if source not in _SHARED):
        raise InputError("there is no new row to train on")
    wanted = _wanted_tokens(sizes, shares)
    mastered = mastered if wanted[Source.REPLAY] else 0.0
    most = [epochs * tokens for tokens in wanted]
    most[Source.REPLAY] += most[Source.NEW] if mastered else 0.0
    random_ = random.Random(seed)
    orders = [random_.sample(range(len(part)), len(part)) for part in sizes]
    for source in _SHARED:
        orders[source] = _draw(orders[source], sizes[source], most[source])
    return Mix(
        sizes_S=tuple(tuple(part) for part in sizes),
        wanted_S=tuple(wanted),
        orders_S=tuple(tuple(order) for order in orders),
        epochs=epochs,
        batch_tokens=batch_tokens,
        mastered=mastered,
        seed=seed,
    )


def steps(mix: Mix, losses: Sequence[Sequence[float]]) -> Iterator[Planned]:
    """The steps that follow those whose losses are given, one loss for each row of a batch.

    The caller adds the losses of a step before it takes the next: they decide what comes later.
    """
    seen: dict[Pick, Sight] = {}
    step = 0
    for epoch in range(mix.epochs):
        batches = epoch_batches(mix, seen, epoch)
        num_steps = step + (mix.epochs - epoch) * len(batches)
        for batch in batches:
            step += 1
            if step > len(losses):
                yield Planned(step=step, num_steps=num_steps, batch=batch)
            for pick, loss in zip(batch, losses[step - 1], strict=True):
                seen[pick] = _seen_again(seen.get(pick, Sight()), epoch, loss, mix.mastered)


def epoch_batches(mix: Mix, seen: Seen, epoch: int) -> tuple[Batch, ...]:
    """The batches of one epoch; all epochs have about the same tokens.

    New rows that do not rest, pairs and judgements are seen once. Replay has its share and the
    tokens of those that rest. Replayed and general rows take turns; no row is seen twice.
    """
    random_ = random.Random(f"{mix.seed} {epoch}")
    drawn: list[list[int]] = []
    num_rested = 0
    for source, order, sizes in zip(Source, mix.orders_S, mix.sizes_S, strict=True):
        sights = {i: seen.get(Pick(source=source, index=i), Sight()) for i in order}
        if source in _SHARED:
            first = sorted(order, key=lambda i: sights[i].num)
            more = num_rested if source == Source.REPLAY else 0
            drawn.append(_draw(first, sizes, mix.wanted_S[source] + more))
        else:
            awake = [i for i in order if source != Source.NEW or not _rests(sights[i], epoch)]
            num_rested += sum(sizes) - sum(sizes[i] for i in awake)
            drawn.append(random_.sample(awake, len(awake)))
    picks = _interleave(drawn, mix.sizes_S)
    lengths = [mix.sizes_S[pick.source][pick.index] for pick in picks]
    return tuple(tuple(picks[i] for i in span) for span in cut(lengths, mix.batch_tokens))


def _rests(sight: Sight, epoch: int) -> bool:
    """True for one epoch after a row was mastered, for two after it was so again, and so on."""
    return epoch - sight.epoch <= sight.num_mastered and sight.num_mastered > 0


def _seen_again(before: Sight, epoch: int, loss: float, mastered: float) -> Sight:
    num_mastered = before.num_mastered + 1 if loss < mastered else 0
    return Sight(num=before.num + 1, epoch=epoch, num_mastered=num_mastered)


def _draw(order: Sequence[int], sizes: Sequence[int], num_tokens: float) -> list[int]:
    """The first rows, of about `num_tokens` in all: the last is taken if half of it fits."""
    drawn: list[int] = []
    filled = 0.0
    for index in order:
        if filled + sizes[index] / 2 > num_tokens:
            break
        drawn.append(index)
        filled += sizes[index]
    return drawn


def _wanted_tokens(sizes: Sequence[Sequence[int]], shares: Shares) -> list[float]:
    wanted = [float(sum(part)) for part in sizes]
    parts = {Source.REPLAY: shares.replay, Source.GENERAL: shares.general}
    share = {source: part if sizes[source] else 0.0 for source, part in parts.items()}
    num_new = sum(num for source, num in zip(Source, wanted, strict=True) if source not in share)
    total = num_new / (1 - sum(share.values()))
    for source, part in share.items():
        wanted[source] = total * part
    return wanted


def _interleave(drawn: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> list[Pick]:
    """Each source spread evenly, so that every stretch of the order holds about its share."""
    placed = []
    for source, indices in zip(Source, drawn, strict=True):
        total = sum(sizes[source][index] for index in indices)
        before = 0.0
        for index in indices:
            size = sizes[source][index]
            placed.append(((before + size / 2) / total, source, index))
            before += size
    # Stable: rows at one place stay in the order they were drawn in.
    placed.sort(key=lambda place: place[:2])
    return [Pick(source=source, index=index) for _, source, index in placed]
