"""What a model kept and learned over a stream of tasks: R-matrix, its summaries, their intervals.

Pure: row scores in, figures out. Shapes: B bootstrap draws, C runs through the stream (seed and
order), T rounds, N rows. Draw 0 weighs all rows and runs alike, so it is the estimate. All arms are
weighed by the same draws, which makes every difference between them a paired one. Definitions:
R[i, j] is the mean score on task j after round i; Lopez-Paz and Ranzato 2017 (arXiv:1706.08840) for
BWT and FWT, Chaudhry et al. 2018 (arXiv:1801.10112) for forgetting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from perennial.infra.errors import InputError

Floats = NDArray[np.float64]
Metric = Literal[
    "ap",
    "bwt",
    "la",
    "forgetting",
    "fwt",
    "general_points_delta",
    "general_nll_delta",
    "kl_to_base",
    "stale_rate",
]
GENERAL = "general"
_COVERAGE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class General:
    """Rows of the general probe: nats a token, tokens, score in [0, 1], KL to the base."""

    nll_N: Floats
    num_tokens_N: Floats
    score_N: Floats
    kl_N: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Row scores, in [0, 1], of one run through the stream; `tasks` in the order of its rounds.

    scores[i, task] is (N,) after round i, absent where not examined. stale[task] is (N,) at the
    end: 1 where the answer was an overridden one, NaN where the row knows none.
    """

    tasks: tuple[str, ...]
    scores: Mapping[tuple[int, str], Floats]
    stale: Mapping[str, Floats] = field(default_factory=dict)
    general: General | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Bootstrap weights, each row summing to one: of runs (B, C), of rows by suite (B, N)."""

    runs_BC: Floats
    rows_BN: Mapping[str, Floats]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its 95% bootstrap percentile interval."""

    value: float
    low: float
    high: float


def draw_weights(
    num_runs: int, num_rows: Mapping[str, int], random: np.random.Generator, num_draws: int = 2000
) -> Weights:
    """Weights that resample runs, and rows inside each suite, with replacement."""

    def draw(num: int) -> Floats:
        counts = random.multinomial(num, np.full(num, 1 / num), size=num_draws)
        return np.vstack([np.full(num, 1 / num), counts / num])

    rows = {name: draw(num) for name, num in sorted(num_rows.items())}
    return Weights(runs_BC=draw(num_runs), rows_BN=rows)


def r_matrix(run: Run, weights: Weights) -> Floats:
    """R in [0, 1], (B, T, T); NaN where a task was not examined."""
    size = len(run.tasks)
    r_BTT = np.full((len(weights.runs_BC), size, size), np.nan)
    for (index, task), scores_N in run.scores.items():
        r_BTT[:, index, run.tasks.index(task)] = weights.rows_BN[task] @ scores_N
    return r_BTT


def average_performance(r_BTT: Floats) -> Floats:
    """AP: mean over tasks of the score after the last round."""
    final: Floats = r_BTT[:, -1, :].mean(axis=-1)
    return final


def learning_accuracy(r_BTT: Floats) -> Floats:
    """LA: mean over tasks of the score right after the task was learned."""
    learned: Floats = np.diagonal(r_BTT, axis1=1, axis2=2).mean(axis=-1)
    return learned


def backward_transfer(r_BTT: Floats) -> Floats:
    """BWT: mean gain, or loss, since a task was learned; NaN for one task."""
    learned = np.diagonal(r_BTT, axis1=1, axis2=2)
    return _mean_of_past(r_BTT[:, -1, :] - learned)


def forgetting(r_BTT: Floats) -> Floats:
    """Mean drop from the best earlier score, learned tasks only; NaN for one task."""
    size = r_BTT.shape[1]
    drops = [r_BTT[:, j:-1, j].max(axis=1) - r_BTT[:, -1, j] for j in range(size - 1)]
    return np.mean(drops, axis=0) if drops else np.full(len(r_BTT), np.nan)


def forward_transfer(r_BTT: Floats, base_BT: Floats) -> Floats:
    """FWT: mean gain over the base on a task just before it is learned; NaN for one task."""
    size = r_BTT.shape[1]
    gains = [r_BTT[:, j - 1, j] - base_BT[:, j] for j in range(1, size)]
    return np.mean(gains, axis=0) if gains else np.full(len(r_BTT), np.nan)


def measure(runs: Sequence[Run], base: Run, weights: Weights) -> dict[Metric, Floats]:
    """Every metric of one arm, (B,): scores in points, likelihoods in nats a token.

    Raises:
        InputError: there are more or fewer runs than weights.
    """
    if len(runs) != weights.runs_BC.shape[1]:
        raise InputError(f"{len(runs)} runs do not fit weights of {weights.runs_BC.shape[1]}")
    found = [_measure(run, base, weights) for run in runs]
    return {
        name: (np.stack([one[name] for one in found], axis=1) * weights.runs_BC).sum(axis=1)
        for name in found[0]
    }


def interval(values_B: Floats) -> Interval | None:
    """Estimate and interval of the draws; None where nothing was measured."""
    known = values_B[1:][~np.isnan(values_B[1:])]
    if np.isnan(values_B[0]) or not len(known):
        return None
    tail = (1 - _COVERAGE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Interval(value=float(values_B[0]), low=float(low), high=float(high))


def _measure(run: Run, base: Run, weights: Weights) -> dict[Metric, Floats]:
    r_BTT = r_matrix(run, weights)
    last = len(base.tasks) - 1
    base_BT = np.stack([weights.rows_BN[t] @ base.scores[last, t] for t in run.tasks], axis=1)
    general = _general(run, base, weights)
    return {
        "ap": 100 * average_performance(r_BTT),
        "bwt": 100 * backward_transfer(r_BTT),
        "la": 100 * learning_accuracy(r_BTT),
        "forgetting": 100 * forgetting(r_BTT),
        "fwt": 100 * forward_transfer(r_BTT, base_BT),
        **general,
        "stale_rate": 100 * _stale_rate(run, weights),
    }


def _general(run: Run, base: Run, weights: Weights) -> dict[Metric, Floats]:
    names: tuple[Metric, ...] = ("general_points_delta", "general_nll_delta", "kl_to_base")
    if run.general is None or base.general is None:
        return dict.fromkeys(names, np.full(len(weights.runs_BC), np.nan))
    ours, theirs, rows_BN = run.general, base.general, weights.rows_BN[GENERAL]
    points_B = 100 * rows_BN @ (ours.score_N - theirs.score_N)
    tokens_BN = rows_BN * ours.num_tokens_N
    tokens_BN = tokens_BN / tokens_BN.sum(axis=1, keepdims=True)
    values = (points_B, tokens_BN @ (ours.nll_N - theirs.nll_N), tokens_BN @ ours.kl_N)
    return dict(zip(names, values, strict=True))


def _stale_rate(run: Run, weights: Weights) -> Floats:
    """Share of stale answers among the rows that know an overridden one; NaN without such rows."""
    asked, told = np.zeros(len(weights.runs_BC)), np.zeros(len(weights.runs_BC))
    for task, stale_N in run.stale.items():
        knows = ~np.isnan(stale_N)
        asked += weights.rows_BN[task] @ knows
        told += weights.rows_BN[task] @ np.where(knows, stale_N, 0.0)
    return np.divide(told, asked, out=np.full_like(told, np.nan), where=asked > 0)


def _mean_of_past(values_BT: Floats) -> Floats:
    past = values_BT[:, :-1]
    return past.mean(axis=1) if past.shape[1] else np.full(len(values_BT), np.nan)
