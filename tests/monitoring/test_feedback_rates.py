from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import InputError
from perennial.monitoring.feedback_rates import feedback_rates, fisher_greater, rate_rise, wilson
from tests.monitoring.builders import row


def test_rates_by_hand() -> None:
    rows = [
        row(1, thumbs=-1, has_correction=True),
        row(2, thumbs=1),
        row(3, has_correction=True),
        row(4),
    ]
    found = feedback_rates(rows)
    assert (found.thumbs_down.num_events, found.thumbs_down.num_rows) == (1, 2)
    assert (found.correction.num_events, found.correction.num_rows) == (2, 4)
    assert found.unhappy.value == 0.5


@pytest.mark.parametrize(
    ("events", "rows", "low", "high"),
    [
        (1, 10, 0.0179, 0.4042),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_by_hand(events: int, rows: int, low: float, high: float) -> None:
    found = wilson(events, rows)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_a_rate_of_nothing_is_unknown() -> None:
    found = wilson(0, 0)
    assert (found.value, found.low, found.high) == (None, 0.0, 1.0)
    assert rate_rise(found, wilson(5, 10)).increase == 0.0
    assert rate_rise(found, wilson(5, 10)).p_value == 1.0


def test_more_events_than_rows_are_refused() -> None:
    with pytest.raises(InputError, match="3 of 2"):
        wilson(3, 2)


def test_fisher_by_hand() -> None:
    # The lady tasting tea: 3 or more of 4 right, 17/70.
    assert fisher_greater(3, 4, 1, 4) == pytest.approx(17 / 70)
    assert fisher_greater(4, 4, 0, 4) == pytest.approx(1 / 70)


@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_fisher_is_a_p_value_and_falls_with_events(m: int, n: int, data: st.DataObject) -> None:
    k, other = data.draw(st.integers(1, m)), data.draw(st.integers(0, n))
    p = fisher_greater(k, m, other, n)
    assert 0 < p <= 1
    # Margins differ, so the comparison allows for rounding only.
    assert p <= fisher_greater(k - 1, m, other, n) * (1 + 1e-9)


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_holds_the_rate(events: int, rows: int) -> None:
    found = wilson(min(events, rows), rows)
    assert found.value is not None
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_no_rise_alarms_no_oftener_than_the_level() -> None:
    rng = np.random.default_rng(5)
    runs, level = 2000, 0.05
    draws = rng.binomial(200, 0.2, size=(runs, 2))
    alarms = sum(fisher_greater(int(a), 200, int(b), 200) <= level for a, b in draws)
    assert alarms / runs <= level + 2 * sqrt(level * (1 - level) / runs)


def test_a_rise_from_a_tenth_to_a_quarter_is_seen() -> None:
    assert rate_rise(wilson(20, 200), wilson(50, 200)).p_value < 0.001
