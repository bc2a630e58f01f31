"""From the trials of a search to `result.json` and `front.png`; running them is left to `tune`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from perennial.flows.processes import Json
from perennial.flows.tune import Search
from perennial.infra.artifacts import write_atomic
from perennial.registry.plots import FrontPoint, Limit, plot_front
from perennial.training.search import Figures, Setting, Trial, choose, on_front

_UNITS = {
    "gain": "nats a token, parent minus setting, wanted answers of the dev rows",
    "drift": "nats a token, setting minus parent, general rows",
    "right": "share of the dev rows",
    "wall_s": "seconds of training and examination; null where it was interrupted",
}


def write_result(search: Search, trials: Sequence[Trial]) -> Json:
    """The figures and the choice, after `result.json` and `front.png` were written.

    Raises:
        ConfigError: every training failed.
    """
    choice = choose(trials, search.request.max_drift)
    measured = {t.setting: t.figures for t in trials if t.figures is not None}
    flags = on_front([(found.gain, found.drift) for found in measured.values()])
    front = {setting for setting, flag in zip(measured, flags, strict=True) if flag}
    tried = {trial.setting for trial in trials}
    result = {
        "round": search.round_id,
        "parent": search.parent or "base",
        "num_rows": dict(search.num_rows),
        "num_threads": search.job["num_threads"],
        "max_drift": search.request.max_drift,
        "units": _UNITS,
        "trials": [_row(trial, front, choice.setting) for trial in trials],
        "not_tried": [asdict(p.setting) for p in search.plans if p.setting not in tried],
        "reason": choice.reason,
        "overrides": {**search.job["config"], **asdict(choice.setting)},
    }
    write_atomic(search.out / "result.json", json.dumps(result, indent=1).encode())
    points = [
        FrontPoint(name=s.name, gain=f.gain, drift=f.drift, is_on_front=s in front)
        for s, f in measured.items()
    ]
    png = plot_front(
        points,
        gain="fall of the NLL of wanted answers, nats a token",
        drift="general NLL, setting minus parent, nats a token; points are learning rate × epochs",
        limit=Limit(max_drift=search.request.max_drift, chosen=choice.setting.name),
    )
    write_atomic(search.out / "front.png", png)
    return result


def _row(trial: Trial, front: set[Setting], chosen: Setting) -> Json:
    nothing = dict.fromkeys(field.name for field in fields(Figures))
    return {
        **asdict(trial.setting),
        **(asdict(trial.figures) if trial.figures else nothing),
        "tokens": trial.num_tokens,
        "wall_s": trial.wall_s,
        "failure": trial.failure,
        "is_on_front": trial.setting in front,
        "is_chosen": trial.setting == chosen,
    }
