"""Pictures of a round: its loss, what each round does to each task, gain and retention.

Drawn by matplotlib's Agg backend into PNG bytes, without global state, so that threads and
headless machines can draw. Values are handed in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perennial.registry.gate import Comparison, SuiteKind
from perennial.registry.stats import Floats

_INK, _GRID, _BLUE, _GREEN, _RED, _GREY = (
    "#1f2933", "#d9dee3", "#1f6fb4", "#2a8c5a", "#c0392b", "#8a949e",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LossPoint:
    """Loss at an optimiser step; `held_out` where it was measured. Nats per token."""

    step: int
    train: float
    held_out: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontPoint:
    """What something learned, and how far general text drifted, in nats a token."""

    name: str
    gain: float
    drift: float
    is_on_front: bool
    gain_interval: tuple[float, float] | None = None
    drift_interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The most drift that was asked for, and which point was chosen under it."""

    max_drift: float
    chosen: str


def plot_loss(points: Sequence[LossPoint], title: str) -> bytes:
    """Training loss with its running mean, and the held-out loss where there is one."""
    figure, axes = _figure(8, 4.5, title)
    steps = [point.step for point in points]
    train = np.asarray([point.train for point in points])
    axes.plot(steps, train, color=_BLUE, alpha=0.3, linewidth=1)
    axes.plot(steps, _smooth(train), color=_BLUE, linewidth=2.2, label="training, running mean")
    held_out = [(p.step, p.held_out) for p in points if p.held_out is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=_RED, linewidth=1.8, label="held out")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(color=_GRID)
    if points:
        axes.legend(frameon=False)
    return _png(figure)


def plot_r_matrix(
    scores: Sequence[Sequence[float | None]],
    stages: Sequence[str],
    tasks: Sequence[str],
    title: str = "What each round did to each suite",
) -> bytes:
    """Heat map of R[i, j], the mean score on task j after stage i; None where not measured."""
    values = np.array([[np.nan if v is None else v for v in row] for row in scores], dtype=float)
    width, height = 3.6 + 1.5 * len(tasks), 2.4 + 0.75 * len(stages)
    figure, axes = _figure(width, height, title)
    image = axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(stages)), stages)
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        text = "not measured" if np.isnan(value) else f"{value:.0%}"
        colour = _GREY if np.isnan(value) else "white" if value > 0.55 else _INK
        size = 9 if np.isnan(value) else 13
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label="mean score")
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _png(figure)


def plot_gain(comparisons: Sequence[Comparison], title: str) -> bytes:
    """Before and after on every scored suite, and the differences with the gate's bounds."""
    scored = [c for c in comparisons if c.kind is not SuiteKind.NLL]
    figure = Figure(figsize=(10.5, 2.2 + 0.75 * max(1, len(scored))), layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold", color=_INK)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
        _dress(axes)
    labels = [f"{c.suite}\n({c.kind}, n = {c.num_rows})" for c in scored]
    left.set_yticks(range(len(scored)), labels)
    left.set_ylim(max(1, len(scored)) - 0.5, -0.5)
    for place, item in enumerate(scored):
        _draw_means(left, place, item)
        _draw_difference(right, place, item)
    left.set_xlim(-0.03, 1.03)
    right.set_xlim(-1.05, 1.05)
    right.set_xticks((-1, -0.5, 0, 0.5, 1))
    left.set_xlabel("mean score, 95% interval")
    right.axvline(0, color=_INK, linewidth=1)
    right.set_xlabel("candidate minus champion, bounds used by the gate")
    for axes in (left, right):
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}".replace("-", "−"))
        axes.grid(axis="x", color=_GRID)
    if scored:
        left.legend(*_unique_legend(left), frameon=False, loc="upper center",
                    bbox_to_anchor=(0.5, 1.16), ncols=2)  # fmt: skip
    return _png(figure)


def plot_front(
    points: Sequence[FrontPoint], *, gain: str, drift: str, limit: Limit | None = None
) -> bytes:
    """Gain against drift with the front as a line: up and to the left is better.

    `gain` and `drift` name the axes; intervals are drawn where there are some.
    """
    figure, axes = _figure(9, 6, "What is learned against what general text loses")
    front = sorted((point.drift, point.gain) for point in points if point.is_on_front)
    if front:
        axes.plot(*zip(*front, strict=True), color=_BLUE, linewidth=1.2, alpha=0.5,
                  drawstyle="steps-post")  # fmt: skip
    for point in points:
        _draw_point(axes, point)
    if limit is not None:
        _draw_limit(axes, limit, points)
    axes.axvline(0, color=_INK, linewidth=1)
    axes.set_xlabel(drift)
    axes.set_ylabel(gain)
    axes.grid(color=_GRID)
    return _png(figure)


def _draw_point(axes: Axes, point: FrontPoint) -> None:
    colour = _BLUE if point.is_on_front else _GREY
    if point.drift_interval:
        axes.plot(point.drift_interval, [point.gain] * 2, color=colour, linewidth=1.5, alpha=0.6)
    if point.gain_interval:
        axes.plot([point.drift] * 2, point.gain_interval, color=colour, linewidth=1.5, alpha=0.6)
    axes.plot(point.drift, point.gain, "o", color=colour, markersize=8)
    axes.annotate(point.name, (point.drift, point.gain), xytext=(7, 6),
                  textcoords="offset points", color=_INK)  # fmt: skip


def _draw_limit(axes: Axes, limit: Limit, points: Sequence[FrontPoint]) -> None:
    axes.axvline(limit.max_drift, color=_RED, linewidth=1.2, linestyle="--",
                 label=f"most drift, {limit.max_drift:g}")  # fmt: skip
    chosen = next(point for point in points if point.name == limit.chosen)
    axes.plot(chosen.drift, chosen.gain, "o", color=_GREEN, markersize=17, fillstyle="none",
              markeredgewidth=2.2, linestyle="none", label=f"chosen, {chosen.name}")  # fmt: skip
    axes.legend(frameon=False, loc="best")


def _draw_means(axes: Axes, place: int, item: Comparison) -> None:
    for name, interval, shift, colour in (
        ("before", item.before, -0.13, _GREY),
        ("after", item.after, 0.13, _BLUE),
    ):
        y = place + shift
        axes.plot([interval.low, interval.high], [y, y], color=colour, linewidth=2.2)
        axes.plot(interval.estimate, y, "o", color=colour, markersize=8, label=name)


def _draw_difference(axes: Axes, place: int, item: Comparison) -> None:
    colour = _GREEN if item.is_met else _RED
    low, high = item.difference.low, item.difference.high
    axes.plot([low, high], [place, place], color=colour, linewidth=2.2)
    axes.plot(item.difference.estimate, place, "D", color=colour, markersize=8)
    verdict = "demand met" if item.is_met else "demand not met"
    axes.annotate(
        f"{item.difference.estimate:+.0%}  {verdict}".replace("-", "−"),
        (item.difference.estimate, place),
        xytext=(0, 10),
        textcoords="offset points",
        # Towards the middle, so that a large difference keeps its label inside.
        ha="right" if item.difference.estimate > 0 else "left",
        color=colour,
        fontsize=10,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def _unique_legend(axes: Axes) -> tuple[list[object], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    return list(unique.values()), list(unique)


def _smooth(values: Floats) -> Floats:
    if values.size < 3:
        return values
    width = max(1, values.size // 20)
    padded = np.pad(values, width, mode="edge")
    kernel = np.ones(2 * width + 1) / (2 * width + 1)
    return np.convolve(padded, kernel, mode="valid")


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=14, fontweight="bold", color=_INK, pad=12)
    _dress(axes)
    return figure, axes


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_INK, labelsize=11)
    axes.xaxis.label.set_fontsize(11)
    axes.yaxis.label.set_fontsize(11)


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
