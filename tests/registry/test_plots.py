from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from matplotlib.image import imread

from perennial.registry.gate import GateRules, SuiteKind, judge
from perennial.registry.plots import (
    FrontPoint,
    Limit,
    LossPoint,
    plot_front,
    plot_gain,
    plot_loss,
    plot_r_matrix,
)
from tests.registry.builders import evidence, suite


def loss() -> bytes:
    rng = np.random.default_rng(1)
    points = [
        LossPoint(
            step=step,
            train=float(2.4 * np.exp(-step / 40) + 0.15 + rng.normal(0, 0.06)),
            held_out=float(2.4 * np.exp(-step / 40) + 0.4) if step % 20 == 0 else None,
        )
        for step in range(1, 161)
    ]
    return plot_loss(points, "Round 2: loss")


def r_matrix() -> bytes:
    scores = [[0.07, 0.03], [0.93, None], [0.9, 0.83]]
    return plot_r_matrix(scores, ("base", "round 1", "round 2"), ("act 1", "act 2"))


def gain() -> bytes:
    verdict = judge(
        evidence(
            suite([0.0] * 57 + [1.0] * 3, [1.0] * 50 + [0.0] * 10, name="act 2"),
            suite([1.0] * 54 + [0.0] * 6, [1.0] * 52 + [0.0] * 8, name="act 1",
                  kind=SuiteKind.RETENTION),
            suite([1.0] * 15, [0.0] * 14 + [1.0], name="old policy", kind=SuiteKind.FORBID),
        ),
        GateRules(retention_margin=0.1, num_resamples=999),
    )  # fmt: skip
    return plot_gain(verdict.comparisons, "support-v2-0a1b2c3d against support-v1-00000000")


def front() -> bytes:
    points = [
        FrontPoint(name="0.0005 × 4", gain=0.9, drift=-0.01, is_on_front=True),
        FrontPoint(name="0.001 × 8", gain=1.6, drift=0.015, is_on_front=True,
                   gain_interval=(1.4, 1.8), drift_interval=(0.01, 0.02)),
        FrontPoint(name="0.002 × 4", gain=1.3, drift=0.03, is_on_front=False),
    ]  # fmt: skip
    limit = Limit(max_drift=0.02, chosen="0.001 × 8")
    return plot_front(points, gain="gain, nats", drift="drift, nats", limit=limit)


def empty_front() -> bytes:
    return plot_front([], gain="gain", drift="drift")


def empty_loss() -> bytes:
    return plot_loss([], "nothing yet")


def empty_gain() -> bytes:
    return plot_gain((), "nothing compared")


@pytest.mark.parametrize("draw", [loss, r_matrix, gain, front, empty_loss, empty_gain, empty_front])
def test_a_picture_is_a_readable_png_with_ink(draw: Callable[[], bytes]) -> None:
    pixels = imread(BytesIO(draw()), format="png")
    height, width = pixels.shape[:2]
    assert width >= 500
    assert height >= 250
    assert pixels[..., :3].min() < 0.3
