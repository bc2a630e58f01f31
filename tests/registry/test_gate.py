from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.infra.errors import InputError
from perennial.registry.gate import (
    GateRules,
    Promote,
    Reject,
    SuiteKind,
    Verdict,
    judge,
    level_at,
)
from tests.registry.builders import evidence, suite

RULES = GateRules(num_resamples=999)
BETTER = suite([0.0] * 40, [1.0] * 30 + [0.0] * 10)


def unmet(verdict: Verdict) -> set[str]:
    return {reason.code for reason in verdict.reasons if not reason.is_met}


def nll(champion: list[float | None], candidate: list[float | None]) -> Verdict:
    return judge(
        evidence(BETTER, suite(champion, candidate, name="general", kind=SuiteKind.NLL)), RULES
    )


def retention(champion: list[float | None], candidate: list[float | None]) -> Verdict:
    kept = suite(champion, candidate, name="kept", kind=SuiteKind.RETENTION)
    return judge(evidence(BETTER, kept), RULES)


def test_a_clear_gain_is_promoted_with_its_numbers() -> None:
    verdict = judge(evidence(BETTER), RULES)
    assert isinstance(verdict, Promote)
    (comparison,) = verdict.comparisons
    assert (comparison.before.estimate, comparison.after.estimate) == (0.0, 0.75)
    assert verdict.reasons[1].numbers["gain"] == 0.75
    assert "+75.0%" in verdict.reasons[1].sentence


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_a_tie_loses(score: float) -> None:
    verdict = judge(evidence(suite([score] * 50, [score] * 50)), replace(RULES, min_gain=0))
    assert unmet(verdict) == {"not_superior"}


def test_a_sure_but_useless_gain_is_rejected() -> None:
    verdict = judge(evidence(suite([0.5] * 50, [0.52] * 50)), RULES)
    assert unmet(verdict) == {"gain_too_small"}


def test_later_attempts_need_more() -> None:
    # Seven wins and one loss: p = 9/256 = 0.035 … eight wins: 1/256 = 0.004.
    eight = suite([0.0] * 12, [1.0] * 8 + [0.0] * 4)
    assert isinstance(judge(evidence(eight, attempt=1), RULES), Promote)
    assert unmet(judge(evidence(eight, attempt=4), RULES)) == {"not_superior"}


def test_levels_of_all_attempts_add_up_to_the_level() -> None:
    assert level_at(1) == 0.025
    assert sum(level_at(k) for k in range(1, 5000)) < 0.05


def test_without_a_target_suite_nothing_is_promoted() -> None:
    kept = suite([1.0] * 60, [1.0] * 60, name="kept", kind=SuiteKind.RETENTION)
    assert unmet(judge(evidence(kept), RULES)) == {"no_target"}


def test_a_moved_champion_asks_for_a_new_evaluation() -> None:
    verdict = judge(evidence(BETTER, champion_now="support-v9-0a1b2c3d"), RULES)
    assert unmet(verdict) == {"champion_moved"}
    assert "support-v9-0a1b2c3d is live now" in verdict.reasons[0].sentence


def test_other_rows_on_one_side_are_refused() -> None:
    odd = replace(BETTER, champion=BETTER.champion[1:])
    assert unmet(judge(evidence(odd), RULES)) == {"rows_differ"}


def test_repeated_rows_are_refused() -> None:
    twice = replace(
        BETTER, candidate=(*BETTER.candidate, BETTER.candidate[0]),
        champion=(*BETTER.champion, BETTER.champion[0]),
    )  # fmt: skip
    assert unmet(judge(evidence(twice), RULES)) == {"rows_differ"}


def test_few_rows_are_insufficient_never_a_pass() -> None:
    assert unmet(judge(evidence(suite([0.0] * 9, [1.0] * 9)), RULES)) == {"insufficient"}
    assert unmet(judge(evidence(suite([], [])), RULES)) == {"insufficient"}


def test_few_clusters_are_insufficient() -> None:
    crowd = suite([0.0] * 60, [1.0] * 60, clusters=["ada", "bob", "eve"])
    assert unmet(judge(evidence(crowd), RULES)) == {"insufficient"}


def test_an_errored_row_of_the_candidate_is_a_failure() -> None:
    verdict = judge(evidence(suite([0.5] * 20, [1.0] * 10 + [None] * 10)), RULES)
    assert isinstance(verdict, Reject)
    assert verdict.comparisons[0].after.estimate == 0.5
    assert verdict.comparisons[0].num_errors == 10


def test_an_errored_row_of_the_champion_gives_the_candidate_nothing() -> None:
    verdict = judge(evidence(suite([None] * 40, [1.0] * 40)), RULES)
    assert unmet(verdict) == {"not_superior"}


def test_retention_within_the_margin_is_kept() -> None:
    assert isinstance(retention([1.0] * 60, [1.0] * 60), Promote)


def test_a_lost_skill_is_rejected() -> None:
    assert unmet(retention([1.0] * 60, [1.0] * 50 + [0.0] * 10)) == {"not_retained"}


def test_too_small_a_retention_suite_cannot_show_a_margin() -> None:
    assert unmet(retention([1.0] * 20, [1.0] * 20)) == {"not_retained"}


def test_errors_on_a_retention_suite_count_as_lost() -> None:
    assert unmet(retention([1.0] * 60, [None] * 10 + [1.0] * 50)) == {"not_retained"}


def test_fewer_forbidden_answers_pass_and_more_do_not() -> None:
    fewer = suite([1.0] * 40, [0.0] * 40, name="stale", kind=SuiteKind.FORBID)
    more = suite([0.0] * 40, [1.0] * 8 + [0.0] * 32, name="stale", kind=SuiteKind.FORBID)
    assert isinstance(judge(evidence(BETTER, fewer), RULES), Promote)
    assert unmet(judge(evidence(BETTER, more), RULES)) == {"forbidden_rises"}


def test_general_nll_may_rise_less_than_its_margin() -> None:
    before = [2.0 + i / 20 for i in range(24)]
    assert isinstance(nll(before, [v + 0.03 for v in before]), Promote)
    assert unmet(nll(before, [v + 0.2 for v in before])) == {"nll_rises"}


def test_a_missing_nll_is_incomplete() -> None:
    assert unmet(nll([2.0] * 20, [2.0] * 19 + [None])) == {"incomplete"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_an_impossible_score_is_refused(bad: float) -> None:
    assert unmet(nll([2.0] * 20, [2.0] * 19 + [bad])) == {"score_invalid"}
    assert unmet(judge(evidence(suite([0.0] * 20, [1.0] * 19 + [bad])), RULES)) == {"score_invalid"}


def test_a_verdict_can_be_computed_again() -> None:
    noisy = np.random.default_rng(5).random((2, 60))
    facts = evidence(suite(list(noisy[0]), list(noisy[1])))
    assert judge(facts, RULES) == judge(facts, RULES)


def test_bad_evidence_and_rules_are_refused() -> None:
    with pytest.raises(InputError, match="attempt"):
        evidence(BETTER, attempt=0)
    with pytest.raises(InputError, match="different names"):
        evidence(BETTER, BETTER)
    with pytest.raises(InputError, match="level"):
        GateRules(level=0.7)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=10, max_size=40))
@settings(max_examples=50, deadline=None)
def test_a_candidate_that_is_not_better_is_never_promoted(pairs: list[tuple[bool, bool]]) -> None:
    champion = [float(max(a, b)) for a, b in pairs]
    candidate = [float(min(a, b)) for a, b in pairs]
    assert isinstance(judge(evidence(suite(champion, candidate)), RULES), Reject)


def _equal_models(rng: np.random.Generator, num_clusters: int) -> tuple[list[float], list[float]]:
    """Two equal models, discordant on a fifth of clusters of five rows that go together."""
    shared = rng.random(num_clusters)
    scores = []
    for _ in range(2):
        flips = rng.random(num_clusters) < 0.11
        right_C = (shared < 0.6) ^ flips
        scores.append([float(right) for right in np.repeat(right_C, 5)])
    return scores[0], scores[1]


def test_equal_models_are_promoted_rarely_even_over_ten_attempts() -> None:
    rng = np.random.default_rng(20260501)
    rules = GateRules(min_gain=0, num_resamples=99)
    clusters = [f"s{i // 5}" for i in range(200)]
    num_first = num_any = 0
    for _ in range(150):
        verdicts = [
            judge(evidence(suite(*_equal_models(rng, 40), clusters=clusters), attempt=k), rules)
            for k in range(1, 6)
        ]
        num_first += isinstance(verdicts[0], Promote)
        num_any += any(isinstance(verdict, Promote) for verdict in verdicts)
    # One attempt may err in 2.5% of cases, all together in 5%; two standard errors are allowed.
    assert num_first / 150 <= 0.025 + 2 * (0.025 * 0.975 / 150) ** 0.5
    assert num_any / 150 <= 0.05 + 2 * (0.05 * 0.95 / 150) ** 0.5


@pytest.mark.parametrize("num_rows", [30, 60, 200])
def test_a_model_worse_by_the_margin_is_kept_out_of_retention(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    rules = GateRules(retention_margin=0.10, num_resamples=99)
    num_passed = 0
    for _ in range(300):
        candidate = [float(v) for v in rng.random(num_rows) >= 0.10]
        kept = suite([1.0] * num_rows, candidate, name="kept", kind=SuiteKind.RETENTION)
        num_passed += not ({"not_retained"} & unmet(judge(evidence(BETTER, kept), rules)))
    assert num_passed / 300 <= 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5
