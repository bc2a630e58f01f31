import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.training.continual import (
    GENERAL,
    Floats,
    General,
    Run,
    average_performance,
    backward_transfer,
    draw_weights,
    forgetting,
    forward_transfer,
    interval,
    learning_accuracy,
    measure,
    r_matrix,
)

# After three rounds: the first task was learned to .9 and fell to .4, the second rose a little.
HAND = np.array([[[0.9, 0.2, 0.0], [0.5, 0.6, 0.1], [0.4, 0.7, 0.8]]])


def run(r_TT: Floats, num_rows: int = 4, **fields: object) -> Run:
    """A run whose rows all score what the matrix says."""
    size = len(r_TT)
    tasks = tuple(f"t{j}" for j in range(size))
    scores = {
        (i, tasks[j]): np.full(num_rows, r_TT[i, j])
        for i in range(size)
        for j in range(size)
        if not math.isnan(r_TT[i, j])
    }
    return Run(tasks=tasks, scores=scores, **fields)  # type: ignore[arg-type]  # fields of Run


def general(*nlls: float, kl: float = 0.0) -> General:
    num = len(nlls)
    return General(
        nll_N=np.array(nlls),
        num_tokens_N=np.arange(1.0, num + 1),
        score_N=np.full(num, 0.5),
        kl_N=np.full(num, kl),
    )


def weights(num_runs: int, num_rows: int = 4, num_tasks: int = 3) -> object:
    sizes = {f"t{j}": num_rows for j in range(num_tasks)} | {GENERAL: 2}
    return draw_weights(num_runs, sizes, np.random.default_rng(0), num_draws=200)


def test_summaries_of_a_small_matrix_are_those_of_the_hand() -> None:
    assert average_performance(HAND)[0] == pytest.approx((0.4 + 0.7 + 0.8) / 3)
    assert learning_accuracy(HAND)[0] == pytest.approx((0.9 + 0.6 + 0.8) / 3)
    assert backward_transfer(HAND)[0] == pytest.approx(((0.4 - 0.9) + (0.7 - 0.6)) / 2)
    assert forgetting(HAND)[0] == pytest.approx(((0.9 - 0.4) + (0.6 - 0.7)) / 2)
    base = np.array([[0.0, 0.1, 0.1]])
    assert forward_transfer(HAND, base)[0] == pytest.approx(((0.2 - 0.1) + (0.1 - 0.1)) / 2)


def test_one_task_has_nothing_to_forget() -> None:
    r = np.array([[[0.7]]])

    assert average_performance(r)[0] == learning_accuracy(r)[0] == 0.7
    found = [backward_transfer(r), forgetting(r), forward_transfer(r, np.array([[0.1]]))]
    assert [interval(np.repeat(values, 3)) for values in found] == [None, None, None]


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=3, max_size=3))
def test_summaries_agree_with_each_other_on_any_matrix(rows: list[list[float]]) -> None:
    r = np.array([rows])

    learned, kept = np.diagonal(r[0])[:2].mean(), r[0, -1, :2].mean()
    assert backward_transfer(r)[0] == pytest.approx(kept - learned)
    assert forgetting(r)[0] >= -backward_transfer(r)[0] - 1e-12
    assert -1 <= backward_transfer(r)[0] <= 1
    assert 0 <= average_performance(r)[0] <= 1


def test_an_arm_is_measured_in_points_and_nats_against_the_base() -> None:
    base = run(np.full((3, 3), 0.1), general=general(2.0, 3.0))
    ours = run(HAND[0], general=general(2.5, 3.0, kl=0.2))

    found = measure((ours, ours), base, weights(2))  # type: ignore[arg-type]  # Weights

    assert found["ap"][0] == pytest.approx(100 * 1.9 / 3)
    assert found["fwt"][0] == pytest.approx(100 * (0.1 + 0.0) / 2)
    # Rows of one and of two tokens: (0.5 · 1 + 0 · 2) / 3.
    assert found["general_nll_delta"][0] == pytest.approx(0.5 / 3)
    assert found["kl_to_base"][0] == pytest.approx(0.2)
    assert found["general_points_delta"][0] == pytest.approx(0)
    assert interval(found["stale_rate"]) is None


def test_stale_answers_are_counted_among_the_rows_that_know_an_old_one() -> None:
    base = run(np.full((3, 3), 0.1))
    stale = {"t0": np.full(4, math.nan), "t1": np.array([1.0, 0.0, 0.0, math.nan])}
    found = measure((run(HAND[0], stale=stale),), base, weights(1))  # type: ignore[arg-type]

    assert found["stale_rate"][0] == pytest.approx(100 / 3)
    shown = interval(found["stale_rate"])
    assert shown is not None
    assert 0 <= shown.low < 100 / 3 < shown.high <= 100


def test_what_was_not_examined_has_no_figure() -> None:
    last_only = np.full((3, 3), math.nan)
    last_only[-1] = HAND[0, -1]
    base = run(np.full((3, 3), 0.1))
    found = measure((run(last_only),), base, weights(1))  # type: ignore[arg-type]  # Weights

    assert interval(found["ap"]) is not None
    assert interval(found["la"]) is None
    assert np.isnan(r_matrix(run(last_only), weights(1))[0, 0, 0])  # type: ignore[arg-type]


def test_the_difference_of_equal_arms_is_exactly_zero_in_every_draw() -> None:
    random = np.random.default_rng(1)
    noisy = Run(
        tasks=("t0", "t1"),
        scores={(i, f"t{j}"): random.random(8) for i in range(2) for j in range(2)},
    )
    drawn = weights(2, num_rows=8, num_tasks=2)
    ours = measure((noisy, noisy), noisy, drawn)  # type: ignore[arg-type]  # Weights
    theirs = measure((noisy, noisy), noisy, drawn)  # type: ignore[arg-type]  # Weights

    assert (ours["ap"] - theirs["ap"] == 0).all()


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        scores = (random.random(60) < 0.7).astype(float)
        drawn = draw_weights(1, {"t0": 60}, random, num_draws=400)
        shown = interval(r_matrix(Run(tasks=("t0",), scores={(0, "t0"): scores}), drawn)[:, 0, 0])
        assert shown is not None
        covered += shown.low <= 0.7 <= shown.high
    assert 180 <= covered <= 199
