from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import ConfigError
from perennial.training.search import (
    Figures,
    Setting,
    Trial,
    around,
    candidates,
    choose,
    fits,
    on_front,
)

NOW = Setting(lr=1e-3, epochs=8)


def trial(
    gain: float = 1.0,
    drift: float = 0.0,
    *,
    lr: float = 1e-3,
    epochs: int = 8,
    wall_s: float | None = 80.0,
) -> Trial:
    return Trial(
        setting=Setting(lr=lr, epochs=epochs),
        num_tokens=100,
        wall_s=wall_s,
        figures=Figures(gain=gain, drift=drift, right=0.5),
    )


def failed(wall_s: float = 20.0) -> Trial:
    return Trial(setting=NOW, num_tokens=5, wall_s=wall_s, figures=None, failure="it diverged")


def test_the_current_setting_is_first_and_then_the_nearest_and_cheapest() -> None:
    found = candidates(NOW, (5e-4, 1e-3, 2e-3), (4, 8, 12))

    assert [(s.lr, s.epochs) for s in found] == [
        (1e-3, 8),
        (1e-3, 12),  # 0.58 doublings away
        (1e-3, 4), (5e-4, 8), (2e-3, 8),  # one
        (5e-4, 12), (2e-3, 12),
        (5e-4, 4), (2e-3, 4),
    ]  # fmt: skip


def test_the_current_setting_is_tried_though_no_list_names_it() -> None:
    assert candidates(NOW, (2e-3,), (4,)) == (NOW, Setting(lr=2e-3, epochs=4))


def test_without_lists_the_grid_is_around_the_current_setting() -> None:
    assert around(NOW) == ((5e-4, 1e-3, 2e-3), (4, 8, 12))
    assert around(Setting(lr=1e-3, epochs=1))[1] == (1, 2)


def test_a_setting_fits_when_the_mean_epoch_so_far_leaves_it_room() -> None:
    tried = [trial(wall_s=80.0, epochs=8), trial(wall_s=80.0, epochs=12)]  # 8 s an epoch

    assert fits(NOW, tried, 224)
    assert not fits(NOW, tried, 223)
    assert fits(Setting(lr=1e-3, epochs=4), tried, 223)


def test_an_interrupted_trial_counts_with_the_mean_of_the_others() -> None:
    tried = [trial(wall_s=80.0), trial(wall_s=None)]

    assert fits(NOW, tried, 240)
    assert not fits(NOW, tried, 239)


def test_a_failed_trial_has_spent_its_time_but_not_all_its_epochs() -> None:
    tried = [trial(wall_s=600.0), failed(wall_s=15.0)]  # 75 s an epoch

    assert fits(NOW, tried, 1215)
    assert not fits(NOW, tried, 1214)


def test_after_failures_alone_a_setting_fits_while_time_is_left() -> None:
    assert fits(NOW, [failed(wall_s=15.0)], 15)
    assert not fits(NOW, [failed(wall_s=15.0)], 14)


def test_before_the_first_trial_everything_fits() -> None:
    assert fits(NOW, [], 0)


def test_the_front_is_what_nothing_beats_on_both_axes() -> None:
    # b gains more at more drift, c is worse than a on both, d is worse than b on one.
    assert on_front([(1.0, 0.1), (2.0, 0.2), (0.9, 0.2), (2.0, 0.3)]) == (True, True, False, False)


def test_equal_points_are_both_on_the_front() -> None:
    assert on_front([(1.0, 0.1), (1.0, 0.1)]) == (True, True)


axis = st.floats(-5, 5)


@given(st.lists(st.tuples(axis, axis), min_size=1))
def test_no_point_of_the_front_is_beaten_and_every_other_is(
    points: list[tuple[float, float]],
) -> None:
    flags = on_front(points)
    front = [point for point, is_on in zip(points, flags, strict=True) if is_on]

    assert front
    for point, is_on in zip(points, flags, strict=True):
        better = [f for f in front if f != point and f[0] >= point[0] and f[1] <= point[1]]
        assert bool(better) != is_on


def test_the_highest_gain_within_the_drift_is_chosen() -> None:
    trials = [trial(1.0, 0.01), trial(2.0, 0.02, lr=2e-3), trial(3.0, 0.021, lr=4e-3), failed()]

    choice = choose(trials, max_drift=0.02)

    assert choice.setting.lr == 2e-3
    assert choice.reason == "highest gain with a drift of at most 0.02"


def test_of_equal_gains_fewer_epochs_win_then_the_lower_rate() -> None:
    trials = [trial(epochs=8), trial(epochs=4, lr=2e-3), trial(epochs=4, lr=1e-3)]

    assert choose(trials, inf).setting == Setting(lr=1e-3, epochs=4)


def test_when_all_drift_too_far_the_least_is_chosen_and_that_is_said() -> None:
    choice = choose([trial(9.0, 0.5), trial(1.0, 0.3, lr=5e-4)], max_drift=0.02)

    assert choice.setting.lr == 5e-4
    assert choice.reason == "least drift: no setting stays within 0.02"


def test_a_search_in_which_all_failed_says_why() -> None:
    with pytest.raises(ConfigError, match=r"lower learning rates \(0.001 × 8: it diverged\)"):
        choose([failed()], 0.02)
