"""Tests and intervals for paired scores that come in clusters (all rows of one subject, say).

Two models answer the same rows; the difference of their scores on a row is what is looked at, and
the cluster is the unit that is flipped or resampled. What a figure must be is left to `gate`.

Shapes: N rows, G clusters, B resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MAX_EXACT_CLUSTERS = 16
_TOLERANCE = 1e-9
_CHUNK_B = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate between `low` and `high`, each of which is wrong with probability (1-level)/2."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterTotals:
    """Sum of differences and number of rows of each cluster."""

    sums_G: Floats
    counts_G: Floats

    @property
    def mean(self) -> float:
        """Mean difference over rows."""
        return float(self.sums_G.sum() / self.counts_G.sum())


def cluster_totals(differences: Sequence[float], clusters: Sequence[str]) -> ClusterTotals:
    """The differences added up by cluster, clusters in sorted order."""
    if len(differences) != len(clusters) or not differences:
        raise ValueError(
            f"need as many clusters as differences, at least one: "
            f"{len(clusters)} and {len(differences)}"
        )
    _, index_N = np.unique(np.asarray(clusters), return_inverse=True)
    sums_G = np.bincount(index_N, weights=np.asarray(differences, dtype=np.float64))
    return ClusterTotals(
        sums_G=sums_G.astype(np.float64), counts_G=np.bincount(index_N).astype(np.float64)
    )


def sign_flip_p(totals: ClusterTotals, rng: np.random.Generator, num_resamples: int) -> float:
    """One-sided p-value of "the mean difference is not above zero", in (0, 1].

    Under no effect each cluster sum is as likely as its negative. Up to 16 clusters that are not
    zero every sign pattern is counted, so the value is exact (five wins and no loss: 1/32);
    beyond, patterns are drawn and p = (1 + #)/(B + 1), which is valid for any B (Phipson and
    Smyth, 2010). No difference anywhere gives 1.
    """
    sums_G = totals.sums_G[np.abs(totals.sums_G) > _TOLERANCE]
    if sums_G.size == 0:
        return 1.0
    observed = sums_G.sum() - _TOLERANCE
    if sums_G.size <= MAX_EXACT_CLUSTERS:
        return float(np.mean(_all_flips(sums_G) >= observed))
    num_extreme = 0
    for start in range(0, num_resamples, _CHUNK_B):
        size = min(_CHUNK_B, num_resamples - start)
        signs_BG = rng.integers(0, 2, size=(size, sums_G.size), dtype=np.int8) * 2 - 1
        num_extreme += int(np.count_nonzero(signs_BG @ sums_G >= observed))
    return (1 + num_extreme) / (num_resamples + 1)


def bootstrap_interval(
    totals: ClusterTotals, rng: np.random.Generator, *, level: float, num_resamples: int
) -> Interval:
    """Percentile interval of the mean difference, clusters drawn with replacement.

    Read as one-sided bounds, `low` and `high` at level 0.90 hold with 95% each. With few clusters,
    or when hardly any row differs, it is too narrow: `cautious_interval` is what the gate uses.
    """
    sums_G, counts_G = totals.sums_G, totals.counts_G
    means: list[Floats] = []
    for start in range(0, num_resamples, _CHUNK_B):
        size = min(_CHUNK_B, num_resamples - start)
        weights_BG = rng.multinomial(sums_G.size, np.full(sums_G.size, 1 / sums_G.size), size=size)
        means.append((weights_BG @ sums_G) / (weights_BG @ counts_G))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate=totals.mean, low=float(low), high=float(high))


def cautious_interval(
    totals: ClusterTotals,
    rng: np.random.Generator,
    *,
    level: float,
    num_resamples: int,
    pseudo: float,
) -> Interval:
    """The wider of the bootstrap and a normal interval that was given imaginary disagreements.

    Thirty rows without a single difference have a bootstrap interval of zero width, though a model
    that loses one row in twenty shows that picture every fifth time. So z²/2 rows won by `pseudo`
    and z²/2 rows lost by it are added, as Agresti and Coull (1998) do for a share and Agresti and
    Min (2005) for paired shares; here by clusters, with a robust variance. `pseudo` is the largest
    difference possible: 1 for scores in [0, 1], 0 for a measure without bounds.
    """
    drawn = bootstrap_interval(totals, rng, level=level, num_resamples=num_resamples)
    sums_G, counts_G = totals.sums_G, totals.counts_G
    z = NormalDist().inv_cdf((1 + level) / 2)
    num_rows = counts_G.sum() + (z**2 if pseudo else 0.0)
    centre = sums_G.sum() / num_rows
    residuals_G = sums_G - counts_G * centre
    spread = float((residuals_G**2).sum()) * _small_sample(sums_G.size) + (z * pseudo) ** 2
    half = z * np.sqrt(spread) / num_rows
    largest = pseudo or np.inf
    return Interval(
        estimate=totals.mean,
        low=max(-largest, min(drawn.low, float(centre - half))),
        high=min(largest, max(drawn.high, float(centre + half))),
    )


def wilson(successes: float, num_rows: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson, 1927); 5 of 10 at 95%: 0.237 to 0.763."""
    if num_rows < 1 or not 0 <= successes <= num_rows:
        raise ValueError(f"successes must be within 0..{num_rows}, got {successes}")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    share = successes / num_rows
    centre = (share + z2 / (2 * num_rows)) / (1 + z2 / num_rows)
    half = (z2 * (share * (1 - share) / num_rows + z2 / (4 * num_rows**2))) ** 0.5
    half /= 1 + z2 / num_rows
    # Rounding may put a bound beyond its estimate at shares of 0 and 1.
    low, high = min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
    return Interval(estimate=share, low=low, high=high)


def _all_flips(sums_G: Floats) -> Floats:
    totals = np.zeros(1)
    for value in sums_G:
        totals = np.concatenate((totals + value, totals - value))
    return totals


def _small_sample(num_clusters: int) -> float:
    return num_clusters / (num_clusters - 1) if num_clusters > 1 else 1.0
