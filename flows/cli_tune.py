"""`perennial tune`: options to a request, its trials, a table, the line for the settings file."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from perennial.flows.cli_keys import parse_duration
from perennial.flows.processes import Json, run_training_process
from perennial.flows.tune import Request, prepare, run_trials
from perennial.flows.tune_report import write_result
from perennial.flows.wiring import connect
from perennial.infra.errors import ConfigError
from perennial.infra.settings import Settings, inline_table
from perennial.training.search import Setting

Number = TypeVar("Number", int, float)


def read_request(
    *,
    round_id: str | None,
    lr: str | None,
    epochs: str | None,
    budget: str,
    max_drift: float,
    out: Path | None,
) -> Request:
    """The request in these options.

    Raises:
        InputError: a list or the budget is malformed, or a number is not positive.
    """
    budget_s = parse_duration("--budget", budget).total_seconds()
    if not budget_s:
        raise ConfigError(f"--budget must hold one training, got {budget}; give more, such as 60m")
    return Request(
        round_id=round_id,
        lrs=() if lr is None else _numbers("--lr", "numbers", lr, float),
        epochs=() if epochs is None else _numbers("--epochs", "whole numbers", epochs, int),
        budget_s=budget_s,
        max_drift=max_drift,
        out=out,
    )


def run_tune(settings: Settings, request: Request) -> None:
    """Try what the budget holds, write the result, show its table and what to set."""
    console = Console()
    with connect(settings) as deps:
        search = prepare(deps, request)
    try:
        trials = run_trials(search, partial(run_training_process, settings=settings), console)
    except KeyboardInterrupt:
        console.print("the same command goes on from here")
        raise
    result = write_result(search, trials)
    console.print(_table(result))
    for trial in (trial for trial in trials if trial.failure):
        console.print(f"{trial.setting.name} failed: {trial.failure}", markup=False)
    if result["not_tried"]:
        names = ", ".join(Setting(**setting).name for setting in result["not_tried"])
        console.print(f"the budget did not hold {names}; a larger --budget goes on from here")
    console.print(f"chosen: {result['reason']}\nfront: {search.out / 'front.png'}", soft_wrap=True)
    line = f"overrides = {inline_table(result['overrides'])}"
    console.print(f"under \\[training] in the settings file:\n{line}", soft_wrap=True)


def _table(result: Json) -> Table:
    table = Table("lr × epochs", "gain", "drift", "right", "tokens", "wall_s", "", box=None)
    for trial in result["trials"]:
        name = Setting(lr=trial["lr"], epochs=trial["epochs"]).name
        wall = "–" if trial["wall_s"] is None else f"{trial['wall_s']:.0f}"
        if trial["failure"]:
            table.add_row(name, "–", "–", "–", str(trial["tokens"]), wall, "failed")
            continue
        marks = {"front": trial["is_on_front"], "chosen": trial["is_chosen"]}
        figures = f"{trial['gain']:+.3f}", f"{trial['drift']:+.3f}", f"{trial['right']:.0%}"
        said = ", ".join(mark for mark, is_set in marks.items() if is_set)
        table.add_row(name, *figures, str(trial["tokens"]), wall, said)
    return table


def _numbers(
    option: str, kind: str, text: str, read: Callable[[str], Number]
) -> tuple[Number, ...]:
    try:
        found = tuple(read(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(math.isfinite(value) and value > 0 for value in found):
        raise ConfigError(f"{option} must be positive {kind} with commas, got {text!r}")
    return found
