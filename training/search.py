"""A small search for learning rate and epochs: what to try, what still fits, which to take.

Pure: the front is gain against drift. Training and measuring are left to `flows.tune`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perennial.infra.errors import ConfigError

_LR_FACTORS, _EPOCH_FACTORS = (0.5, 1, 2), (0.5, 1, 1.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What one training is tried with."""

    lr: float
    epochs: int

    @property
    def name(self) -> str:
        """Such as `0.001 × 8`."""
        return f"{self.lr:g} × {self.epochs}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """How far the NLL of the wanted answers fell and that of general text rose, nats a token.

    `right` is the share of dev rows that were answered right.
    """

    gain: float
    drift: float
    right: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A setting that was tried; `wall_s` is None when it was interrupted on the way."""

    setting: Setting
    num_tokens: int
    wall_s: float | None
    figures: Figures | None  # None: the training failed
    failure: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The setting to take, and why."""

    setting: Setting
    reason: str


def around(current: Setting) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Learning rates and epochs to try when none are asked for."""
    epochs = {max(1, round(current.epochs * factor)) for factor in _EPOCH_FACTORS}
    return tuple(current.lr * factor for factor in _LR_FACTORS), tuple(sorted(epochs))


def candidates(
    current: Setting, lrs: Sequence[float], epochs: Sequence[int]
) -> tuple[Setting, ...]:
    """The current setting, then the grid from it outwards, in doublings; cheaper ones first."""
    grid = {Setting(lr=lr, epochs=num) for lr in lrs for num in epochs}

    def order(setting: Setting) -> tuple[float, int, float]:
        far = abs(math.log2(setting.lr / current.lr))
        far += abs(math.log2(setting.epochs / current.epochs))
        return round(far, 6), setting.epochs, setting.lr

    return (current, *sorted(grid - {current}, key=order))


def fits(setting: Setting, trials: Sequence[Trial], budget_s: float) -> bool:
    """Whether the setting, at the mean time of an epoch so far, ends within the budget.

    A failed trial has spent its time and says nothing of an epoch's: it may have stopped early. One
    that was interrupted counts as that mean. Before the first trial everything fits.
    """
    timed = [(t.wall_s, t.setting.epochs) for t in trials if t.figures and t.wall_s is not None]
    epoch_s = sum(wall_s for wall_s, _ in timed) / max(1, sum(num for _, num in timed))
    spent_s = sum(
        epoch_s * trial.setting.epochs if trial.wall_s is None else trial.wall_s for trial in trials
    )
    return spent_s + epoch_s * setting.epochs <= budget_s


def on_front(points: Sequence[tuple[float, float]]) -> tuple[bool, ...]:
    """For each (gain, drift): no other is as good on both and better on one."""
    return tuple(
        not any(
            other != point and other[0] >= point[0] and other[1] <= point[1] for other in points
        )
        for point in points
    )


def choose(trials: Sequence[Trial], max_drift: float) -> Choice:
    """The highest gain whose drift is at most `max_drift`, else the least drift.

    Of equals the one with fewer epochs, then with the lower learning rate.

    Raises:
        ConfigError: every training failed.
    """
    found = [(trial.setting, trial.figures) for trial in trials if trial.figures is not None]
    if not found:
        failures = "; ".join(f"{trial.setting.name}: {trial.failure}" for trial in trials)
        raise ConfigError(f"no setting could be trained; try lower learning rates ({failures})")
    within = [item for item in found if item[1].drift <= max_drift]

    def order(item: tuple[Setting, Figures]) -> tuple[float, int, float]:
        worth = -item[1].gain if within else item[1].drift
        return worth, item[0].epochs, item[0].lr

    reason = f"highest gain with a drift of at most {max_drift:g}"
    if not within:
        reason = f"least drift: no setting stays within {max_drift:g}"
    return Choice(setting=min(within or found, key=order)[0], reason=reason)
