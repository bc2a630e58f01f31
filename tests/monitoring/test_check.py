import json
from dataclasses import replace
from datetime import timedelta

from perennial.monitoring.check import CheckResult, check, scores
from perennial.monitoring.policy import Hold, Policy, Retrain, codes
from perennial.monitoring.windows import Split
from tests.monitoring.builders import (
    BORDER,
    END,
    OTHER_WORDS,
    START,
    row,
    sentences,
    traffic,
    windows,
)


def run(cut: Split, *, num_new_examples: int = 50, policy: Policy | None = None) -> CheckResult:
    return check(
        cut,
        policy or Policy(),
        num_new_examples=num_new_examples,
        now=END,
        last_trained_at=START - timedelta(days=1),
    )


def old_and(current_words: list[str] | None, *, thumbs: int | None = None) -> Split:
    old = traffic(sentences(1, 120), START, "old")
    texts = sentences(2, 120) if current_words is None else sentences(2, 120, current_words)
    return windows(old, traffic(texts, BORDER, "new", thumbs=thumbs))


def test_a_new_topic_that_is_answered_badly_starts_a_round() -> None:
    result = run(old_and(OTHER_WORDS, thumbs=-1))
    assert isinstance(result.decision, Retrain)
    assert "drift" in codes(result.decision.reasons)
    assert {shift.word for shift in result.shifts} & set(OTHER_WORDS)


def test_a_new_topic_that_is_answered_well_asks_for_an_evaluation() -> None:
    result = run(old_and(OTHER_WORDS, thumbs=1))
    assert isinstance(result.decision, Hold)
    assert result.decision.asks_for_evaluation


def test_the_same_traffic_is_quiet() -> None:
    assert list(codes(run(old_and(None)).decision.reasons)) == ["quiet"]


def test_a_small_window_is_not_tested() -> None:
    result = run(windows(traffic(sentences(1, 120), START, "old"), [row(at=BORDER)]))
    assert result.evidence.drift is None
    assert result.evidence.thumbs_down_rise is None
    assert "window_too_small" in codes(result.decision.reasons)


def test_the_first_round_needs_no_reference() -> None:
    result = run(windows([], traffic(sentences(1, 60), BORDER, "new")), num_new_examples=100)
    assert list(codes(result.decision.reasons)) == ["enough_feedback"]


def test_an_empty_window_holds() -> None:
    result = run(windows([], []))
    assert isinstance(result.decision, Hold)
    assert json.dumps(scores(result))


def test_the_same_rows_give_the_same_check() -> None:
    assert run(old_and(None)) == run(old_and(None))


def test_scores_are_plain_json_with_what_was_decided_and_why() -> None:
    result = run(old_and(OTHER_WORDS, thumbs=-1), num_new_examples=0)
    document = json.loads(json.dumps(scores(result), allow_nan=False))
    assert document["decision"] == "hold"
    assert document["reasons"] == [
        {"code": "nothing_new", "text": "0 new examples, a round needs 20"}
    ]
    assert document["suppressed"][0]["code"] == "drift"
    assert document["drift"]["p_value"] == 0.001
    assert document["current"]["feedback"]["thumbs_down"]["value"] == 1.0
    assert document["reference"]["num_rows"] == document["current"]["num_rows"] == 120
    assert document["inputs_digest"] == result.inputs_digest


def test_a_stricter_policy_changes_the_verdict_and_not_the_evidence() -> None:
    cut = old_and(OTHER_WORDS, thumbs=-1)
    strict = run(cut, policy=replace(Policy(), min_trainable=1000))
    assert isinstance(strict.decision, Hold)
    assert strict.evidence == run(cut).evidence
