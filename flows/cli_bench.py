"""`perennial bench continual`: options to a request, its steps, its report, MLflow."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Column, Table

from perennial.flows.bench import Bench, Request, prepare, run_steps
from perennial.flows.bench_report import write_report
from perennial.flows.processes import Json, run_training_process
from perennial.infra.errors import ConfigError
from perennial.infra.settings import Settings
from perennial.training.grading import Grader
from perennial.training.stream import Order

_EXPERIMENT = "bench-continual"
_SHOWN = {
    "ap": "AP",
    "bwt": "BWT",
    "la": "LA",
    "general_nll_delta": "general NLL",
    "stale_rate": "stale %",
}


def read_request(
    *,
    stream: Path,
    general: Path,
    general_replay: Path | None,
    arms: str,
    seeds: str,
    order: str,
    rows: int | None,
    test_rows: int | None,
    graders: Sequence[str],
    out: Path,
) -> Request:
    """The request in these options.

    Raises:
        ConfigError: a list is empty, a seed is no number, an order or a grader is unknown.
    """
    return Request(
        stream=stream,
        general=general,
        general_replay=general_replay,
        arms=_parts(arms, "--arms"),
        seeds=tuple(_seed(part) for part in _parts(seeds, "--seeds")),
        orders=tuple(_order(part) for part in _parts(order, "--order")),
        rows=rows,
        test_rows=test_rows or rows,
        graders=dict(_grader(part) for part in graders),
        out=out,
    )


def run_continual(settings: Settings, request: Request) -> None:
    """Run what is missing, write the report, show its table."""
    console = Console()
    bench = prepare(settings, request)
    for what, num in bench.left_out.items():
        if num:
            console.print(f"{num} rows of the {what} do not fit the context and are left out")
    execute = partial(run_training_process, settings=settings)
    try:
        run_steps(bench, execute, console)
    except KeyboardInterrupt:
        console.print("the same command goes on from here")
        raise
    result = write_report(bench)
    console.print(arms_table(result))
    console.print("± is half of the 95% interval; the report has its ends and more figures")
    console.print(f"report: {request.out / 'index.html'}", soft_wrap=True)
    if settings.mlflow.uri:
        console.print(f"MLflow: {log_result(settings, bench, result)}", soft_wrap=True)


def arms_table(result: Json) -> Table:
    """A line for each arm, of which 80 columns cut nothing off."""
    arm_name = Column("arm", overflow="fold")
    table = Table(arm_name, *_SHOWN.values(), "tokens", "s", box=None, padding=(0, 1, 0, 0))
    for name, arm in result["arms"].items():
        cells = [_cell(arm, metric) for metric in _SHOWN]
        wall = "–" if arm["wall_s"] is None else f"{arm['wall_s']:.0f}"
        table.add_row(name, *cells, f"{arm['tokens']:.0f}", wall)
    return table


def log_result(settings: Settings, bench: Bench, result: Json) -> str:
    """Where MLflow shows figures, page and plots; the same benchmark again is the same run."""
    from perennial.registry.mlflow_store import MlflowStore

    store, out = MlflowStore(settings.mlflow.uri), bench.request.out
    run = store.ensure_run(_EXPERIMENT, run_name(bench), {"stream": result["stream"]})
    keys = ("base_model", "stream", "seeds", "orders", "num_threads", "overrides", "computed_by")
    store.log_params(run, {key: str(result[key]) for key in keys})
    for arm, figures in result["arms"].items():
        for metric in result["units"]:
            if figures[metric] is not None:
                store.log_curve(run, f"{arm}/{metric}", [(0, figures[metric])])
    for path in (out / "result.json", out / "index.html"):
        store.log_file(run, path)
    for path in sorted((out / "plots").glob("*.png")):
        store.log_file(run, path, "plots")
    store.finish_run(run, is_success=True)
    return run.url


def run_name(bench: Bench) -> str:
    """Of all that the figures depend on: every step of every arm, and how answers are graded."""
    asked = bench.request
    keys = [
        [step.key for step in bench.steps(arm, seed, order)]
        for arm in ("base", *asked.arms)
        for seed in asked.seeds
        for order in asked.orders
    ]
    parts = json.dumps([asked.arms, keys, sorted(bench.graders.items())])
    return f"continual-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"


def _cell(arm: Json, metric: str) -> str:
    """The figure and half of its interval, so that a line of a terminal holds an arm."""
    if arm[metric] is None:
        return "–"
    low, high = arm["intervals"][metric]
    digits = 3 if metric == "general_nll_delta" else 1
    return f"{arm[metric]:.{digits}f} ±{(high - low) / 2:.{digits}f}"


def _parts(text: str, option: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ConfigError(f"{option} needs at least one value, got {text!r}")
    return found


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"--seeds must be whole numbers with commas, got {text!r}")
    return int(text)


def _order(text: str) -> Order:
    for known in get_args(Order):
        if text == known:
            return known  # type: ignore[no-any-return]  # one of the literal's own values
    raise ConfigError(f"--order must be given, reversed or given,reversed; got {text!r}")


def _grader(text: str) -> tuple[str, Grader]:
    task, _, name = text.partition("=")
    for known in get_args(Grader):
        if name == known:
            return task, known
    allowed = ", ".join(get_args(Grader))
    raise ConfigError(f"--grader must be TASK=GRADER with one of {allowed}; got {text!r}")
