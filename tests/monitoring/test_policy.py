from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import ConfigError, InputError
from perennial.monitoring.policy import Hold, Policy, ReasonCode, Retrain, codes, decide
from tests.monitoring.builders import END, drifted, evidence, rates, rise

POLICY = Policy()
LONG_AGO = END - timedelta(days=10)
UNHAPPY = rates(down=200, unhappy=200)
FRESH = END - timedelta(hours=1)
FIRST_ROUND: dict[str, Any] = {
    "num_reference": 0,
    "drift": None,
    "thumbs_down_rise": None,
    "correction_rise": None,
}


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ({"drift": drifted(0.001), "current": UNHAPPY}, ["drift"]),
        ({"drift": drifted(0.01), "current": UNHAPPY}, ["drift"]),
        ({"thumbs_down_rise": rise(20, 100)}, ["feedback_drop"]),
        ({"correction_rise": rise(20, 100)}, ["feedback_drop"]),
        (
            {"drift": drifted(0.001), "thumbs_down_rise": rise(0, 60)},
            ["drift", "feedback_drop"],
        ),
        ({"num_new_examples": 100}, ["enough_feedback"]),
        ({"num_new_examples": 100, **FIRST_ROUND}, ["enough_feedback"]),
        ({"num_new_examples": 100, "num_current": 3, **FIRST_ROUND}, ["enough_feedback"]),
    ],
)
def test_what_starts_a_round(seen: dict[str, Any], expected: list[str]) -> None:
    decision = decide(evidence(**seen), POLICY, now=END, last_trained_at=LONG_AGO)
    assert isinstance(decision, Retrain)
    assert list(codes(decision.reasons)) == expected


@pytest.mark.parametrize(
    ("seen", "last", "reasons", "suppressed"),
    [
        ({}, LONG_AGO, ["quiet"], []),
        ({"drift": drifted(0.0101), "current": UNHAPPY}, LONG_AGO, ["quiet"], []),
        ({"drift": drifted(0.001)}, LONG_AGO, ["drift_without_risk"], []),
        ({"num_new_examples": 99, **FIRST_ROUND}, None, ["no_reference"], []),
        ({"num_current": 49, "drift": None}, LONG_AGO, ["window_too_small"], []),
        ({"num_reference": 49, "drift": None}, LONG_AGO, ["window_too_small"], []),
        ({"num_new_examples": 100}, FRESH, ["cool_down"], ["enough_feedback"]),
        ({"num_new_examples": 19}, LONG_AGO, ["nothing_new"], []),
        (
            {"drift": drifted(0.001), "current": UNHAPPY, "num_new_examples": 0},
            LONG_AGO,
            ["nothing_new"],
            ["drift"],
        ),
    ],
)
def test_what_holds_and_why(
    seen: dict[str, Any], last: datetime | None, reasons: list[str], suppressed: list[str]
) -> None:
    decision = decide(evidence(**seen), POLICY, now=END, last_trained_at=last)
    assert isinstance(decision, Hold)
    assert list(codes(decision.reasons)) == reasons
    assert list(codes(decision.suppressed)) == suppressed


@pytest.mark.parametrize("rate", [rise(1000, 1400, of=10_000), rise(1, 4, of=20), rise(100, 20)])
def test_a_small_uncertain_or_falling_rate_is_no_drop(rate: Any) -> None:
    decision = decide(evidence(thumbs_down_rise=rate), POLICY, now=END, last_trained_at=LONG_AGO)
    assert list(codes(decision.reasons)) == ["quiet"]


def test_age_starts_a_round_at_the_limit_and_not_before() -> None:
    limit = END - timedelta(days=30)
    due = decide(evidence(), POLICY, now=END, last_trained_at=limit)
    early = decide(evidence(), POLICY, now=END, last_trained_at=limit + timedelta(seconds=1))
    never = decide(evidence(), replace(POLICY, max_age=None), now=END, last_trained_at=limit)
    assert list(codes(due.reasons)) == ["schedule"]
    assert list(codes(early.reasons)) == list(codes(never.reasons)) == ["quiet"]


def test_cool_down_ends_at_its_limit_and_holds_under_a_clock_set_back() -> None:
    rich = evidence(num_new_examples=500)
    for last, kind in (
        (END - POLICY.cool_down, Retrain),
        (END - POLICY.cool_down + timedelta(seconds=1), Hold),
        (END + timedelta(days=1), Hold),
    ):
        assert isinstance(decide(rich, POLICY, now=END, last_trained_at=last), kind)


def test_drift_among_content_users_asks_for_an_evaluation() -> None:
    decision = decide(evidence(drift=drifted(0.001)), POLICY, now=END, last_trained_at=None)
    assert isinstance(decision, Hold)
    assert decision.asks_for_evaluation
    quiet = decide(evidence(), POLICY, now=END, last_trained_at=None)
    assert isinstance(quiet, Hold)
    assert not quiet.asks_for_evaluation


def test_sentences_carry_the_numbers() -> None:
    decision = decide(
        evidence(num_current=18, drift=None, num_new_examples=7),
        POLICY,
        now=END,
        last_trained_at=FRESH,
    )
    assert [reason.text for reason in decision.reasons] == [
        "last trained 1:00:00 ago, the cool-down is 6:00:00",
        "7 new examples, a round needs 20",
        "the window has 18 of 50 rows",
    ]


@given(
    st.floats(0.001, 1),
    st.integers(0, 500),
    st.integers(0, 500),
    st.integers(0, 800),
    st.none() | st.integers(0, 60),
)
def test_every_decision_has_a_reason_and_more_examples_never_stop_a_round(
    p_value: float, before: int, now: int, num_examples: int, days: int | None
) -> None:
    seen = evidence(
        drift=drifted(p_value),
        current=rates(down=now, unhappy=now),
        thumbs_down_rise=rise(before, now),
        num_new_examples=num_examples,
    )
    last = None if days is None else END - timedelta(days=days)
    decision = decide(seen, POLICY, now=END, last_trained_at=last)
    assert decision.reasons
    assert all(reason.text for reason in decision.reasons)
    richer = decide(
        replace(seen, num_new_examples=num_examples + 100), POLICY, now=END, last_trained_at=last
    )
    assert isinstance(richer, Retrain) or isinstance(decision, Hold)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"drift_level": 1.0}, "drift_level"),
        ({"risk_rate": -0.1}, "risk_rate"),
        ({"drift_level": 0.0001}, "num_permutations"),
        ({"min_current": 0}, "min_current"),
        ({"cool_down": timedelta(seconds=-1)}, "cool_down"),
    ],
)
def test_a_senseless_policy_is_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Policy(**wrong)


def test_naive_times_are_refused() -> None:
    with pytest.raises(InputError, match="aware"):
        decide(evidence(), POLICY, now=END.replace(tzinfo=None), last_trained_at=None)


def test_every_code_is_reached_here() -> None:
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    assert all(f'"{code.value}"' in text for code in ReasonCode)
