"""From the results of a benchmark to its figures: `result.json`, plots, one page, MLflow.

Running it is left to `bench`, every definition and interval to `training.continual`, the page to
`bench_page`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perennial.flows.bench import TRAINED, Bench
from perennial.flows.bench_page import page
from perennial.flows.processes import Json
from perennial.infra.artifacts import write_atomic
from perennial.registry.plots import FrontPoint, plot_front, plot_r_matrix
from perennial.training.arms import ARMS, Step
from perennial.training.continual import (
    GENERAL,
    Floats,
    General,
    Interval,
    Metric,
    Run,
    Weights,
    draw_weights,
    interval,
    measure,
    r_matrix,
)
from perennial.training.examples import read_jsonl
from perennial.training.grading import grade, has_stale, rouge_l
from perennial.training.search import on_front
from perennial.training.stream import Order, Task

_UNITS: Mapping[str, str] = {
    "ap": "points",
    "bwt": "points",
    "la": "points",
    "forgetting": "points",
    "fwt": "points",
    "general_points_delta": "points of ROUGE-L, arm minus base",
    "general_nll_delta": "nats a token, arm minus base",
    "kl_to_base": "nats a token",
    "stale_rate": "percent",
    "tokens": "trained in one run through the stream",
    "wall_s": "seconds of training in one run through the stream",
    "peak_rss_mb": "MB, the largest training",
}
_MAX_LABEL = 18  # characters, so that neighbours do not overlap


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One arm: a run for each seed and order, bootstrap draws of every metric, what it cost."""

    runs: Mapping[tuple[int, Order], Run]
    draws: Mapping[Metric, Floats]
    tokens: float
    walls: tuple[float | None, ...]
    peak_rss_mb: float | None


def write_report(bench: Bench) -> Json:
    """The figures, after `result.json`, `index.html` and the plots were written."""
    arms, weights = _measure_all(bench)
    result = _result(bench, arms, weights)
    out = bench.request.out
    write_atomic(out / "result.json", json.dumps(result, indent=1).encode())
    plots = _plots(result)
    for name, png in plots.items():
        write_atomic(out / "plots" / f"{name}.png", png)
    write_atomic(out / "index.html", page(result, plots).encode())
    return result


def _measure_all(bench: Bench) -> tuple[dict[str, Measured], Weights]:
    asked = bench.request
    names = dict.fromkeys(("base", *asked.arms))
    runs = {
        name: {(seed, order): _run(bench, name, seed, order)
               for seed in asked.seeds for order in asked.orders}
        for name in names
    }  # fmt: skip
    sizes = {task.name: len(task.test) for task in bench.tasks} | {GENERAL: len(bench.probe)}
    num_runs = len(asked.seeds) * len(asked.orders)
    weights = draw_weights(num_runs, sizes, np.random.default_rng(0))
    base = next(iter(runs["base"].values()))
    return {
        name: Measured(
            runs=found,
            draws=measure(tuple(found.values()), base, weights),
            **_costs(bench, name),
        )
        for name, found in runs.items()
    }, weights


def _run(bench: Bench, name: str, seed: int, order: Order) -> Run:
    """The row scores of one arm with one seed in one order, from its results."""
    steps, tasks = bench.steps(name, seed, order), bench.courses[order].tasks
    scores, stale = {}, {}
    for step in steps:
        rounds = range(len(tasks)) if step.config is None else (step.index,)
        for task in (task for task in tasks if task.name in step.examined):
            answers = _answers(bench.result(step) / f"{task.name}.jsonl")
            graded = _grades(bench, task, answers)
            scores.update({(index, task.name): graded for index in rounds})
            stale[task.name] = _stale(task, answers)
    last = steps[-1]
    general = _general(bench, last) if GENERAL in last.examined else None
    return Run(
        tasks=tuple(task.name for task in tasks), scores=scores, stale=stale, general=general
    )


def _grades(bench: Bench, task: Task, answers: Sequence[str]) -> Floats:
    """Scores in [0, 1]; an answer that holds a stale one is wrong."""
    grader = bench.graders[task.name]
    return np.array([
        0.0 if has_stale(answer, row.forbid) else grade(grader, answer, row.outputs)
        for row, answer in zip(task.test, answers, strict=True)
    ])  # fmt: skip


def _stale(task: Task, answers: Sequence[str]) -> Floats:
    return np.array([
        float(has_stale(answer, row.forbid)) if row.forbid else math.nan
        for row, answer in zip(task.test, answers, strict=True)
    ])  # fmt: skip


def _general(bench: Bench, step: Step) -> General:
    rows = read_jsonl(bench.result(step) / f"{GENERAL}.jsonl")
    answers = zip(rows, bench.probe, strict=True)
    return General(
        nll_N=np.array([row["nll"] for row in rows]),
        num_tokens_N=np.array([float(row["num_reference_tokens"]) for row in rows]),
        score_N=np.array([rouge_l(row["answer"], asked.completion) for row, asked in answers]),
        kl_N=np.array([row["kl"] or 0.0 for row in rows]),  # the base has none to itself
    )


def _answers(path: Path) -> list[str]:
    return [row["answer"] for row in read_jsonl(path)]


def _costs(bench: Bench, name: str) -> dict[str, Any]:  # Any: fields of Measured
    """Of each run the time, None where it is not known or nothing was trained; tokens: the mean."""
    asked = bench.request
    runs = [
        [
            json.loads((bench.result(step) / TRAINED).read_bytes())
            for step in bench.steps(name, seed, order)
            if step.config is not None
        ]
        for seed in asked.seeds
        for order in asked.orders
    ]
    walls = [[step["wall_s"] for step in run] for run in runs]
    peaks = [step["peak_rss_mb"] for run in runs for step in run]
    tokens = [sum(step["num_tokens"] for step in run) for run in runs]
    return {
        "tokens": sum(tokens) / len(tokens),
        "walls": tuple(sum(run) if run and None not in run else None for run in walls),
        "peak_rss_mb": max(peaks, default=None),
    }


def _result(bench: Bench, arms: Mapping[str, Measured], weights: Weights) -> Json:
    asked = bench.request
    return {
        "base_model": Path(str(bench.model["base_model"])).name,
        "num_threads": bench.model["num_threads"],
        "stream": str(asked.stream),
        "tasks": {t.name: {"grader": bench.graders[t.name], "num_train": len(t.train),
                           "num_test": len(t.test)} for t in bench.tasks},
        "seeds": list(asked.seeds),
        "orders": list(asked.orders),
        "num_probe": len(bench.probe),
        "max_new_tokens": bench.max_new_tokens,
        "computed_by": dict(bench.computed_by),
        "num_general": len(bench.shared.general),
        "left_out_as_too_long": dict(bench.left_out),
        "overrides": dict(bench.shared.overrides),
        "units": dict(_UNITS),
        "arms": {name: _arm(name, arms, weights) for name in arms},
        "paired": {f"full-minus-{name}": _paired(arms["full"], other)
                   for name, other in arms.items() if "full" in arms and name != "full"},
    }  # fmt: skip


def _arm(name: str, arms: Mapping[str, Measured], weights: Weights) -> Json:
    arm = arms[name]
    every: dict[str, Interval | None] = {
        "ap_over_joint": _ratio(arm, arms.get("joint"), "ap"),
        "la_over_single": _ratio(arm, arms.get("single"), "la"),
    }
    every.update((metric, interval(draws)) for metric, draws in arm.draws.items())
    return {
        "says": ARMS[name].says,
        **{metric: _value(item) for metric, item in every.items()},
        "tokens": arm.tokens,
        "wall_s": _mean([wall for wall in arm.walls if wall is not None]),
        "wall_over_naive": _wall_over(arm, arms.get("naive")),
        "peak_rss_mb": arm.peak_rss_mb,
        "intervals": {m: [item.low, item.high] for m, item in every.items() if item},
        "r_matrices": [
            {"seed": seed, "order": order, "tasks": list(run.tasks), "r": _matrix(run, weights)}
            for (seed, order), run in arm.runs.items()
        ],
    }


def _wall_over(arm: Measured, naive: Measured | None) -> float | None:
    """The mean ratio over the runs that were timed in both."""
    pairs = zip(arm.walls, naive.walls, strict=True) if naive else ()
    return _mean([ours / theirs for ours, theirs in pairs if ours and theirs])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _ratio(arm: Measured, bound: Measured | None, metric: Metric) -> Interval | None:
    if bound is None:
        return None
    above, below = arm.draws[metric], bound.draws[metric]
    return interval(np.divide(above, below, out=np.full_like(above, math.nan), where=below > 0))


def _paired(full: Measured, other: Measured) -> Json:
    """Differences on the same rows, seeds and orders; null where one was not measured."""
    differences = {m: interval(full.draws[m] - other.draws[m]) for m in full.draws}
    return {m: dataclasses.asdict(item) if item else None for m, item in differences.items()}


def _value(item: Interval | None) -> float | None:
    return item.value if item else None


def _matrix(run: Run, weights: Weights) -> list[list[float | None]]:
    """R in [0, 1] over all rows, null where a task was not examined."""
    return [[None if math.isnan(v) else float(v) for v in row] for row in r_matrix(run, weights)[0]]


def _plots(result: Json) -> dict[str, bytes]:
    """A heat map for each arm and order, and gain against drift."""
    plots = {
        "front": plot_front(
            _front(result),
            gain="average performance after the last round, points",
            drift="general NLL, arm minus base, nats a token",
        )
    }
    for name, arm in result["arms"].items():
        for order in result["orders"]:
            found = [m for m in arm["r_matrices"] if m["order"] == order]
            mean = _mean_matrix([m["r"] for m in found])
            tasks = [_label(task) for task in found[0]["tasks"]]
            stages = [f"after {number}" for number in range(1, len(tasks) + 1)]
            title = f"{name}, {order} order"
            plots[f"r-{name}-{order}"] = plot_r_matrix(mean, stages, tasks, title)
    return plots


def _label(task: str) -> str:
    return task if len(task) <= _MAX_LABEL else task[: _MAX_LABEL - 1] + "…"


def _front(result: Json) -> list[FrontPoint]:
    arms = {
        name: arm
        for name, arm in result["arms"].items()
        if arm["ap"] is not None and arm["general_nll_delta"] is not None
    }
    flags = on_front([(arm["ap"], arm["general_nll_delta"]) for arm in arms.values()])
    return [
        FrontPoint(
            name=name,
            gain=arm["ap"],
            gain_interval=tuple(arm["intervals"]["ap"]),
            drift=arm["general_nll_delta"],
            drift_interval=tuple(arm["intervals"]["general_nll_delta"]),
            is_on_front=is_on_front,
        )
        for (name, arm), is_on_front in zip(arms.items(), flags, strict=True)
    ]


def _mean_matrix(matrices: Sequence[Sequence[Sequence[float | None]]]) -> list[list[float | None]]:
    values = np.array(matrices, dtype=float).mean(axis=0)
    return [[None if math.isnan(v) else float(v) for v in row] for row in values]
