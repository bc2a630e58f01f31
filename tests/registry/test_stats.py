import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.registry.stats import (
    bootstrap_interval,
    cautious_interval,
    cluster_totals,
    sign_flip_p,
    wilson,
)

SCORES = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=40)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def own(differences: list[float]) -> list[str]:
    return [f"c{i}" for i in range(len(differences))]


def test_sign_flip_of_five_wins_is_one_in_thirty_two() -> None:
    assert sign_flip_p(cluster_totals([1.0] * 5, own([1.0] * 5)), rng(), 999) == 1 / 32


def test_sign_flip_of_four_wins_and_a_loss_counts_six_of_thirty_two() -> None:
    # Sums of at least 3: all five up (1) or exactly one down (5).
    differences = [1.0, 1.0, 1.0, 1.0, -1.0]
    assert sign_flip_p(cluster_totals(differences, own(differences)), rng(), 999) == 6 / 32


def test_sign_flip_without_a_difference_is_one() -> None:
    assert sign_flip_p(cluster_totals([0.0] * 9, own([0.0] * 9)), rng(), 999) == 1.0


def test_sign_flip_flips_clusters_not_rows() -> None:
    together = cluster_totals([1.0] * 20, ["one"] * 10 + ["two"] * 10)
    assert sign_flip_p(together, rng(), 999) == 1 / 4


def test_drawn_flips_never_give_zero_and_come_near_the_exact_value() -> None:
    assert sign_flip_p(cluster_totals([1.0] * 40, own([1.0] * 40)), rng(), 999) == 1 / 1000
    mixed = [1.0] * 12 + [-1.0] * 6
    # P(at least 12 of 18 heads) = 0.1189
    assert sign_flip_p(cluster_totals(mixed, own(mixed)), rng(), 20_000) == pytest.approx(
        0.1189, abs=0.01
    )


@given(SCORES)
@settings(max_examples=60, deadline=None)
def test_sign_flip_p_is_a_probability_and_zero_rows_do_not_change_it(values: list[float]) -> None:
    p = sign_flip_p(cluster_totals(values, own(values)), rng(), 499)
    padded = [*values, 0.0, 0.0]
    assert 0 < p <= 1
    assert sign_flip_p(cluster_totals(padded, own(padded)), rng(), 499) == p


@given(SCORES, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_cautious_interval_holds_the_bootstrap_and_the_estimate(
    values: list[float], seed: int
) -> None:
    totals = cluster_totals(values, own(values))
    drawn = bootstrap_interval(totals, rng(seed), level=0.9, num_resamples=500)
    wide = cautious_interval(totals, rng(seed), level=0.9, num_resamples=500, pseudo=1.0)
    assert wide.low <= drawn.low <= drawn.high <= wide.high
    assert wide.estimate == pytest.approx(np.mean(values))


def test_thirty_equal_rows_do_not_have_an_interval_of_zero_width() -> None:
    totals = cluster_totals([0.0] * 30, own([0.0] * 30))
    wide = cautious_interval(totals, rng(), level=0.9, num_resamples=500, pseudo=1.0)
    # 1.645² / (30 + 1.645²)
    assert wide.low == pytest.approx(-0.0827, abs=1e-4)
    assert wide.high == pytest.approx(0.0827, abs=1e-4)


def test_bootstrap_interval_of_equal_clusters_matches_the_normal_one() -> None:
    values = list(np.random.default_rng(3).normal(0.2, 1.0, 400))
    found = bootstrap_interval(
        cluster_totals(values, own(values)), rng(), level=0.9, num_resamples=4000
    )
    half = 1.645 * np.std(values, ddof=1) / 20
    assert found.low == pytest.approx(np.mean(values) - half, abs=0.01)
    assert found.high == pytest.approx(np.mean(values) + half, abs=0.01)


def test_wilson_matches_the_published_values() -> None:
    half = wilson(5, 10)
    assert (half.low, half.high) == (
        pytest.approx(0.2366, abs=1e-4),
        pytest.approx(0.7634, abs=1e-4),
    )
    none = wilson(0, 30)
    assert (none.low, none.high) == (0.0, pytest.approx(0.1135, abs=1e-4))


@given(st.integers(1, 300), st.floats(0, 1))
def test_wilson_holds_the_share(num_rows: int, share: float) -> None:
    found = wilson(share * num_rows, num_rows)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_totals_refuse_rows_without_clusters() -> None:
    with pytest.raises(ValueError, match="as many clusters"):
        cluster_totals([1.0], [])
