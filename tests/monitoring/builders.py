"""Rows, windows and evidence with everything defaulted but what a test is about."""

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from perennial.monitoring.drift import DriftScore
from perennial.monitoring.feedback_rates import FeedbackRates, RateRise, rate_rise, wilson
from perennial.monitoring.policy import CheckEvidence
from perennial.monitoring.windows import OnePer, Split, TrafficRow, WindowRules, split

START = datetime(2026, 3, 2, tzinfo=UTC)
BORDER = START + timedelta(days=7)
END = START + timedelta(days=14)
EVERY_ROW = WindowRules(one_per=OnePer.INTERACTION)

WORDS = [f"bank{n}" for n in range(17)]
OTHER_WORDS = [f"router{n}" for n in range(10)]


def row(num: int = 0, *, at: datetime | None = None, **values: Any) -> TrafficRow:
    """Row `i<num>`, received `num` minutes after START unless said otherwise."""
    defaults: dict[str, Any] = {
        "interaction_id": f"i{num:05d}",
        "prompt": f"question {num}",
        "answer": "an answer",
        "model_version": "base",
        "received_at": at or START + timedelta(minutes=num),
    }
    return TrafficRow(**(defaults | values))


def sentences(seed: int, num: int, words: Sequence[str] = WORDS) -> list[str]:
    """`num` random sentences of five words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=5)) for _ in range(num)]


def traffic(texts: Sequence[str], since: datetime, prefix: str, **values: Any) -> list[TrafficRow]:
    """One row per text, a minute apart."""
    return [
        row(n, at=since + timedelta(minutes=n), interaction_id=f"{prefix}{n}", prompt=t, **values)
        for n, t in enumerate(texts)
    ]


def windows(reference: Sequence[TrafficRow], current: Sequence[TrafficRow]) -> Split:
    """The two weeks around BORDER."""
    return split(
        [*reference, *current], since=START, reference_until=BORDER, until=END, rules=EVERY_ROW
    )


def drifted(p_value: float) -> DriftScore:
    return DriftScore(
        distance=0.4,
        null_distance=0.1,
        p_value=p_value,
        num_reference=500,
        num_current=500,
        num_permutations=999,
    )


def rates(*, down: int = 0, corrected: int = 0, unhappy: int = 0, of: int = 500) -> FeedbackRates:
    return FeedbackRates(
        thumbs_down=wilson(down, of), correction=wilson(corrected, of), unhappy=wilson(unhappy, of)
    )


def rise(before: int, now: int, of: int = 500) -> RateRise:
    return rate_rise(wilson(before, of), wilson(now, of))


def evidence(**values: Any) -> CheckEvidence:
    """A quiet check of 500 against 500 rows with 50 new examples."""
    defaults: dict[str, Any] = {
        "num_current": 500,
        "num_reference": 500,
        "num_new_examples": 50,
        "drift": drifted(0.5),
        "current": rates(),
        "thumbs_down_rise": rise(10, 10),
        "correction_rise": rise(10, 10),
    }
    return CheckEvidence(**(defaults | values))
