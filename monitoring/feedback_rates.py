"""How often users are unhappy, with intervals, and whether that has become worse.

Rows are those of a window, one per session, so that a furious user counts once. Deciding is left to
`policy`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma, sqrt
from statistics import NormalDist

from perennial.infra.errors import InputError
from perennial.monitoring.windows import TrafficRow

_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """`num_events` of `num_rows`, with a two-sided 95% Wilson interval [low, high].

    Of nothing, `value` is None and the interval is [0, 1].
    """

    num_events: int
    num_rows: int
    value: float | None
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackRates:
    """The feedback of one window.

    Attributes:
        thumbs_down: thumbs down among the rows that were voted on.
        correction: corrected rows among all.
        unhappy: thumbs down or corrected, among all.
    """

    thumbs_down: Rate
    correction: Rate
    unhappy: Rate


@dataclass(frozen=True, kw_only=True, slots=True)
class RateRise:
    """A rate before and now, and the one-sided p-value of "it has not risen"."""

    reference: Rate
    current: Rate
    p_value: float

    @property
    def increase(self) -> float:
        """Current minus reference, 0 while either is unknown; 0.1 is ten points."""
        if self.reference.value is None or self.current.value is None:
            return 0.0
        return self.current.value - self.reference.value


def feedback_rates(rows: Sequence[TrafficRow]) -> FeedbackRates:
    """The rates of one window."""
    votes = [row.thumbs for row in rows if row.thumbs is not None]
    corrected = sum(row.has_correction for row in rows)
    unhappy = sum(row.has_correction or row.thumbs == -1 for row in rows)
    return FeedbackRates(
        thumbs_down=wilson(votes.count(-1), len(votes)),
        correction=wilson(corrected, len(rows)),
        unhappy=wilson(unhappy, len(rows)),
    )


def rate_rise(reference: Rate, current: Rate) -> RateRise:
    """Whether a rate has risen, by Fisher's exact test, which is valid at any counts."""
    return RateRise(
        reference=reference,
        current=current,
        p_value=fisher_greater(
            current.num_events, current.num_rows, reference.num_events, reference.num_rows
        ),
    )


def wilson(num_events: int, num_rows: int) -> Rate:
    """The rate with its Wilson score interval (Wilson 1927); 1 of 10 → [0.018, 0.404]."""
    if not 0 <= num_events <= num_rows:
        raise InputError(f"a rate needs 0 <= events <= rows, got {num_events} of {num_rows}")
    if num_rows == 0:
        return Rate(num_events=0, num_rows=0, value=None, low=0.0, high=1.0)
    z = NormalDist().inv_cdf(0.5 + _CONFIDENCE / 2)
    share = num_events / num_rows
    centre = share + z * z / (2 * num_rows)
    spread = z * sqrt(share * (1 - share) / num_rows + z * z / (4 * num_rows * num_rows))
    shrink = 1 + z * z / num_rows
    return Rate(
        num_events=num_events,
        num_rows=num_rows,
        value=share,
        low=0.0 if num_events == 0 else max(0.0, (centre - spread) / shrink),
        high=1.0 if num_events == num_rows else min(1.0, (centre + spread) / shrink),
    )


def fisher_greater(events: int, rows: int, other_events: int, other_rows: int) -> float:
    """The chance of `events` or more of `rows` when both sides share one rate, margins fixed."""
    total_events, total_rows = events + other_events, rows + other_rows
    denominator = _log_choose(total_rows, total_events)
    tail = sum(
        exp(_log_choose(rows, k) + _log_choose(other_rows, total_events - k) - denominator)
        for k in range(events, min(rows, total_events) + 1)
    )
    return min(1.0, max(tail, 1e-300))


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
