"""A search for learning rate and epochs on the rows of a round, trained as the round is.

Part of the new rows, and of the general ones, is kept apart to measure on; what the gate judges by
is never read. Each trial trains and is examined in processes of their own; its figures are a folder
in `trials/`, complete or absent, under a digest of what they depend on: a killed search goes on
where it stopped. What to try and which to take is decided in `training.search`.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from perennial.flows.bench import Execute, computed_by
from perennial.flows.bench_board import StepBoard
from perennial.flows.curate import data_folder, suite_row, write_suite
from perennial.flows.evidence import champion_of
from perennial.flows.processes import Json
from perennial.flows.retrain import training_job
from perennial.flows.steps import digest
from perennial.flows.wiring import Deps
from perennial.infra.artifacts import publish, sha256_file, verify, write_atomic
from perennial.infra.errors import (
    ConfigError,
    DivergedError,
    InputError,
    NotFoundError,
    OutOfMemoryError,
)
from perennial.registry.rounds import Round
from perennial.training import config as configs
from perennial.training.examples import (
    Example,
    Judgement,
    Pair,
    read_examples,
    read_judgements,
    read_pairs,
    write_examples,
)
from perennial.training.holdout import not_judged, split_holdout
from perennial.training.job import read_train_job
from perennial.training.machine import choose_threads_once
from perennial.training.modelfiles import ensure_base_model
from perennial.training.progress import read_progress
from perennial.training.search import (
    Figures,
    Setting,
    Trial,
    around,
    candidates,
    fits,
)

_DEV, _GENERAL, _MODEL = "dev", "general", "model"
_MODEL_FIELDS = ("base_model", "cache_dir", "num_threads", "device", "dtype")
_DEV_SHARE, _PROBE_SHARE, _MAX_PROBE, _MIN_ROWS = 0.2, 0.25, 64, 3
_TRIAL = "trial.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a person asked for; empty `lrs` or `epochs`: around the current setting."""

    round_id: str | None
    lrs: tuple[float, ...]
    epochs: tuple[int, ...]
    budget_s: float
    max_drift: float
    out: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A setting, the folder of its job and what comes of it, and the folder of its figures."""

    setting: Setting
    work: Path
    folder: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A request with everything read and checked; `job` is that of the round on these rows.

    `parent_folder` has the figures of the parent, or of the base where there is none.
    """

    request: Request
    round_id: str
    parent: str | None
    parent_folder: Path
    job: Json
    plans: tuple[Plan, ...]
    num_rows: Mapping[str, int]
    out: Path


def prepare(deps: Deps, request: Request) -> Search:
    """The search, with its rows apart, before the first training.

    Raises:
        NotFoundError: there is no such round with rows.
        ConfigError: a setting is out of range, or the budget does not hold one training.
        InputError: the round has too few rows to keep some apart.
        ModelMissingError: the base model is not on this machine.
    """
    round_ = _round(deps, request.round_id)
    data, settings = data_folder(deps, round_.id), deps.settings
    verify(data)
    overrides = settings.training.overrides
    config = configs.from_json(overrides)
    current = Setting(lr=config.lr, epochs=config.epochs)
    _check_budget(data.parent / "train" / "summary.json", current, request.budget_s)
    lrs, epochs = around(current)
    champion = champion_of(deps, round_)
    parent = deps.versions.get(champion) if champion else None
    out = (request.out or data.parent / "tune").resolve()
    by = computed_by(settings, ensure_base_model(settings.model.name, settings.model.cache_dir))
    num_rows = _write_rows(data, out / "work")
    job = training_job(settings, out / "work/rows", parent.adapter_path if parent else None)
    job |= {"num_threads": settings.model.threads or choose_threads_once(out / "num_threads", None)}
    tried = candidates(current, request.lrs or lrs, request.epochs or epochs)
    return Search(
        request=request,
        round_id=round_.id,
        parent=parent.name if parent else None,
        parent_folder=_folder(out, by, parent.name if parent else None),
        job=job,
        plans=tuple(_plan(job, setting, out, by) for setting in tried),
        num_rows=num_rows,
        out=out,
    )


def run_trials(
    search: Search,
    execute: Execute,
    console: Console,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Trial, ...]:
    """Every setting that the budget holds, tried now or by an earlier run."""
    num_done = sum(plan.folder.exists() for plan in search.plans)
    with StepBoard(console, num_steps=len(search.plans), num_done=num_done) as board:
        worker = _Worker(search=search, execute=execute, on_line=board.line, clock=clock)
        trials: list[Trial] = []
        for plan in search.plans:
            if not fits(plan.setting, trials, search.request.budget_s):
                continue
            if is_new := not plan.folder.exists():
                board.begin(plan.setting.name)
            trials.append(worker.trial(plan))
            if is_new:
                board.end()
    shutil.rmtree(search.out / "work")
    return tuple(trials)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Worker:
    """Trains and examines one setting at a time."""

    search: Search
    execute: Execute
    on_line: Callable[[str], None]
    clock: Callable[[], float]

    def trial(self, plan: Plan) -> Trial:
        """What a setting gave, against the parent on the same rows.

        That it diverged is kept; that memory was refused is not: the next run tries it again.
        """
        publish(self.search.parent_folder, self._examine_parent)
        started = self.clock()
        try:
            publish(plan.folder, partial(self._try, plan))
        except OutOfMemoryError as error:
            found = _body(plan, self.clock() - started, None, error.message)
        else:
            found = json.loads((plan.folder / _TRIAL).read_bytes())
        shutil.rmtree(plan.work)
        before = json.loads((self.search.parent_folder / _TRIAL).read_bytes())
        after = found.pop("scores")
        figures = None
        if after is not None:
            figures = Figures(
                gain=before[_DEV]["nll"] - after[_DEV]["nll"],
                drift=after[_GENERAL]["nll"] - before[_GENERAL]["nll"],
                right=after[_DEV]["accuracy"],
            )
        return Trial(setting=plan.setting, figures=figures, **found)

    def _examine_parent(self, folder: Path) -> None:
        scores = self._scores(self.search.job["parent_adapter"], self.search.out / "work/parent")
        (folder / _TRIAL).write_text(json.dumps(scores))

    def _try(self, plan: Plan, folder: Path) -> None:
        trained = plan.work / "train"
        is_whole, started = not trained.exists(), self.clock()
        failure, scores = "", None
        try:
            self.execute("train", plan.work / "train.json", trained, on_line=self.on_line)
            scores = self._scores(str(trained / "adapter"), plan.work)
        except DivergedError as error:
            failure = error.message
        wall_s = self.clock() - started if is_whole else None
        (folder / _TRIAL).write_text(json.dumps(_body(plan, wall_s, scores, failure)))

    def _scores(self, adapter: str | None, work: Path) -> Json:
        job = {name: self.search.job[name] for name in _MODEL_FIELDS}
        job |= {"adapters": {_MODEL: adapter}}
        job |= {"suites": {name: str(path) for name, path in _suites(self.search.out).items()}}
        _write_json(work / "scores.json", job)
        self.execute("evaluate", work / "scores.json", work / "scores", on_line=self.on_line)
        found: Json = json.loads((work / "scores/summary.json").read_bytes())["results"][_MODEL]
        for name, suite in found.items():
            if not suite["num_rows"]:
                raise InputError(f"every row of {name} is too long to be measured on")
        return found


def _round(deps: Deps, asked: str | None) -> Round:
    """The round that was asked for, or the newest, of those that have rows."""
    task = deps.settings.task
    rounds = [r for r in deps.ledger.list_rounds(task) if data_folder(deps, r.id).exists()]
    if not rounds:
        raise NotFoundError(
            f"no round of task {task} has rows under {deps.settings.home}; "
            "`perennial check --force` begins one",
            task=task,
        )
    for found in rounds:
        if asked in (None, found.id):
            return found
    known = ", ".join(found.id for found in rounds)
    raise NotFoundError(f"no round {asked} of task {task} has rows; there are: {known}", task=task)


def _check_budget(summary: Path, current: Setting, budget_s: float) -> None:
    """Refuse a budget under what the round's own training took, where that is known."""
    if not summary.exists():
        return
    took = json.loads(summary.read_bytes())
    wanted_s = took["wall_s"] / took["config"]["epochs"] * current.epochs
    if took["resumed_from"] == 0 and wanted_s > budget_s:
        raise ConfigError(
            f"--budget of {budget_s:.0f} s does not hold one training: the round's own took "
            f"{took['wall_s']:.0f} s; give at least {wanted_s / 60 + 1:.0f}m"
        )


def _write_rows(data: Path, work: Path) -> dict[str, int]:
    """The rows of a round in `work`, some apart in suites; how many. The same each time."""
    new = split_holdout(read_examples(data / "train.jsonl"), _DEV_SHARE)
    texts = read_examples(data / "general.jsonl")
    share = min(_PROBE_SHARE, _MAX_PROBE / max(1, len(texts)))
    general = split_holdout(texts, share)
    for name, part, remedy in (
        ("train", new, "choose a larger round with --round"),
        ("general", general, "choose a round that had a larger training.general_file"),
    ):
        if len(part.judge) < _MIN_ROWS:
            raise InputError(
                f"{data / name}.jsonl gives {len(part.judge)} rows to measure on, "
                f"at least {_MIN_ROWS} are needed; {remedy}"
            )
    files: dict[str, Sequence[Example | Pair | Judgement]] = {
        "train": not_judged(new.train, new.judge),
        "replay": not_judged(read_examples(data / "replay.jsonl"), new.judge),
        "general": not_judged(general.train, general.judge),
        "pairs": not_judged(read_pairs(data / "pairs.jsonl"), new.judge),
        "judgements": not_judged(read_judgements(data / "judgements.jsonl"), new.judge),
        "dev": not_judged(read_examples(data / "dev.jsonl"), new.judge),
    }
    for name, rows in files.items():
        write_examples(work / "rows" / f"{name}.jsonl", rows)
    suites = {_DEV: (new.judge, "contains"), _GENERAL: (general.judge, "none")}
    for name, (apart, rule) in suites.items():
        write_suite(work / "suites" / f"{name}.jsonl", [suite_row(row, rule) for row in apart])
    return {"trained": len(files["train"]), "dev": len(new.judge), "probe": len(general.judge)}


def _plan(job: Json, setting: Setting, out: Path, by: Json) -> Plan:
    """What is to be done with a setting, its job written."""
    config = configs.from_json({**job["config"], **asdict(setting)})
    path = out / "work" / config.fingerprint / "train.json"
    _write_json(path, job | {"config": config.to_json()})
    folder = _folder(out, by, read_train_job(path).digest)
    return Plan(setting=setting, work=path.parent, folder=folder)


def _body(plan: Plan, wall_s: float | None, scores: Json | None, failure: str) -> Json:
    """What is known of a setting that was trained, whole or not."""
    progress = plan.work / "train/progress.jsonl"
    steps = read_progress(progress) if progress.exists() else []
    return {
        "num_tokens": sum(step.num_tokens for step in steps),
        "wall_s": wall_s,
        "scores": scores,
        "failure": failure,
    }


def _suites(out: Path) -> Mapping[str, Path]:
    """What is measured on, by name."""
    return {name: out / "work/suites" / f"{name}.jsonl" for name in (_DEV, _GENERAL)}


def _folder(out: Path, by: Json, trained: str | None) -> Path:
    """Named by what computes, by what was trained, and by the rows that it is measured on."""
    rows = [sha256_file(path) for path in _suites(out).values()]
    return out / "trials" / digest({"by": by, "trained": trained, "rows": rows})[:16]


def _write_json(path: Path, body: Json) -> None:
    write_atomic(path, json.dumps(body, indent=1).encode())
