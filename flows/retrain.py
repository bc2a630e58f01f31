"""A round up to its verdict: curate → train → evaluate → gate → register. The flow `retrain`.

Each step is done once for its inputs; the result of each is a small JSON document in the ledger.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from perennial.flows import evidence
from perennial.flows.curate import curate, data_folder, general_file, read_training_rows
from perennial.flows.processes import Json, model_fields, run_training_process
from perennial.flows.steps import Steps, digest, leased, transient_task
from perennial.flows.wiring import Deps, connect
from perennial.infra.artifacts import read_manifest, sha256_file, write_atomic
from perennial.infra.errors import NotFoundError
from perennial.infra.settings import Settings
from perennial.monitoring.check_store import StoredCheck
from perennial.registry.rounds import Round, RoundState
from perennial.registry.version_store import Member
from perennial.registry.versions import ModelVersion, NewVersion
from perennial.training.job import left_by

_NEW = ("train", "pairs", "judgements")


@flow(name="retrain")
def retrain(task_name: str) -> str:
    """Take the open round of a task up to its verdict."""
    with connect() as deps:
        current = deps.ledger.current(task_name)
        if current is None:
            raise NotFoundError(f"task {task_name} has no open round; `perennial check` opens one")
        retrain_round(deps, current)
        return current.id


def open_round(deps: Deps, check: StoredCheck) -> Round:
    """The round that a check calls for; the same check opens it once."""
    reason = "; ".join(reason.text for reason in check.reasons)
    return deps.ledger.open_round(check.task, reason, digest({"check": check.id}))


def retrain_round(deps: Deps, round_: Round) -> None:
    """Do what is left of a round up to its verdict; one that is closed or judged is left alone."""
    if deps.ledger.get(round_.id).state is not RoundState.OPEN:
        return
    with leased(deps.ledger, round_.id, deps.settings.home) as steps:
        # Under settings that changed, the steps would train in place of what a reviewer looks at.
        if "register" in deps.ledger.steps(round_.id):
            return
        champion = note_champion(deps, steps, round_)
        data = curate_rows(deps, steps, round_, champion)
        if close_if_empty(deps, steps, round_):
            return
        trained = train_adapter(deps, steps, round_, data, champion)
        version = name_version(deps, round_, data, trained, champion)
        scored = evaluate_models(deps, steps, round_, data, version, champion)
        verdict = judge_candidate(deps, steps, round_, scored, version)
        register_version(deps, steps, round_, verdict, version)


def round_summary(deps: Deps, round_id: str) -> str:
    """A round in Markdown, for the Prefect page."""
    round_ = deps.ledger.get(round_id)
    reasons = "\n".join(f"- {reason}" for reason in round_.reasons)
    steps = ", ".join(deps.ledger.steps(round_id))
    return (
        f"## Round {round_.number}: {round_.state.value}\n\nBegun because: {round_.reason}\n\n"
        f"{reasons}\n\nSteps done: {steps}\n\n[MLflow]({deps.settings.mlflow_url})\n"
    )


@transient_task("begin")
def note_champion(deps: Deps, steps: Steps, round_: Round) -> ModelVersion | None:
    """The version that the round starts from and competes with; None is the base model.

    Noted once: a run that finishes the round after the promotion must not take the candidate itself
    for the champion.
    """

    def work() -> Json:
        live = deps.champions.current(round_.task)
        return {"champion": live.version if live else None}

    name = steps.once("begin", {"round": round_.id}, work)["champion"]
    return deps.versions.get(name) if name else None


@transient_task("curate")
def curate_rows(deps: Deps, steps: Steps, round_: Round, champion: ModelVersion | None) -> Json:
    """The digest of the round's rows."""

    def work() -> Json:
        def draft(job: Json, out: Path) -> None:
            _run(deps, "draft", {**model_fields(deps.settings), **job}, out)

        folder = data_folder(deps, round_.id)
        general = general_file(deps.settings, draft)
        manifest = curate(deps, round_, champion, general, folder)
        counts = json.loads((folder / "counts.json").read_bytes())
        return {"digest": manifest.digest, **counts}

    return steps.once("curate", {"round": round_.id}, work)


@transient_task("close")
def close_if_empty(deps: Deps, steps: Steps, round_: Round) -> bool:
    """Whether the round has nothing to train on, and so is rejected.

    Its rows stay as they are: every later run would fail, and the task would have no other round.
    """
    new = [data_folder(deps, round_.id) / f"{name}.jsonl" for name in _NEW]
    if "train" in deps.ledger.steps(round_.id) or any(path.stat().st_size for path in new):
        return False
    page = new[0].with_name("diff.md")
    reason = f"No new row is left to train on: each is judged by, dropped or erased; see {page}."
    deps.ledger.close_round(steps.lease, RoundState.REJECTED, [reason])
    return True


@transient_task("train")
def train_adapter(
    deps: Deps, steps: Steps, round_: Round, data: Json, champion: ModelVersion | None
) -> Json:
    """The digest of the adapter that was trained on the rows."""
    inputs = {
        "data": data["digest"],
        "parent": champion.name if champion else None,
        "overrides": deps.settings.training.overrides,
        "base_model": deps.settings.model.name,
    }

    def work() -> Json:
        folder = _folder(deps, round_) / "train"
        parent = champion.adapter_path if champion else None
        job = training_job(deps.settings, data_folder(deps, round_.id), parent)
        _run(deps, "train", job, folder)
        summary: Json = json.loads((folder / "summary.json").read_bytes())
        return summary

    return steps.once("train", inputs, work)


def training_job(settings: Settings, rows: Path, parent: Path | None) -> Json:
    """What a round trains, from a folder of its rows and the adapter that it starts from."""
    files = {
        "train_rows": "train",
        "replay_rows": "replay",
        "general_rows": "general",
        "pair_rows": "pairs",
        "judgement_rows": "judgements",
        "dev_rows": "dev",
    }
    return {
        **model_fields(settings),
        "parent_adapter": str(parent) if parent else None,
        **{field: str(rows / f"{name}.jsonl") for field, name in files.items()},
        **(left_by(parent) if parent else {}),
        "config": settings.training.overrides,
    }


@transient_task("name")
def name_version(
    deps: Deps, round_: Round, data: Json, trained: Json, champion: ModelVersion | None
) -> ModelVersion:
    """The candidate's version: its name is fixed from here on.

    One that training began from the base has no parent: it knows only the rows of its own round.
    """
    is_from_base = trained["start"]["start"] == "base"
    new = NewVersion(
        task=round_.task,
        adapter_digest=trained["adapter_digest"],
        adapter_path=_folder(deps, round_) / "train" / "adapter",
        base_digest=_base_digest(deps),
        round_id=round_.id,
        parent=None if champion is None or is_from_base else champion.name,
        dataset_digest=data["digest"],
    )
    members = {
        origin.event_id: Member(event_id=origin.event_id, subject=origin.subject)
        for row in read_training_rows(data_folder(deps, round_.id))
        for origin in row.origins
    }
    return deps.versions.register(new, members.values())


@transient_task("evaluate")
def evaluate_models(
    deps: Deps,
    steps: Steps,
    round_: Round,
    data: Json,
    version: ModelVersion,
    champion: ModelVersion | None,
) -> Json:
    """What candidate and champion scored on the same rows in the same run."""
    live = champion.name if champion else None
    inputs = {"data": data["digest"], "candidate": version.name, "champion": live}

    def work() -> Json:
        out = _folder(deps, round_) / f"evaluation-{digest(inputs)[:12]}"
        suites = data_folder(deps, round_.id) / "suites"
        job = {
            **model_fields(deps.settings),
            "adapters": {
                evidence.CHAMPION: str(champion.adapter_path) if champion else None,
                evidence.CANDIDATE: str(version.adapter_path),
            },
            "suites": {path.stem: str(path) for path in sorted(suites.glob("*.jsonl"))},
        }
        if not (out / "summary.json").exists():
            _run(deps, "evaluate", job, out)
        names = {evidence.CHAMPION: live or "base", evidence.CANDIDATE: version.name}
        deps.evaluations.add(evidence.read_rows(out, suites, round_.id, names))
        summary = out / "summary.json"
        left_out = Counter(row["suite"] for row in json.loads(summary.read_bytes())["left_out"])
        return {"champion": live, "digest": sha256_file(summary), "left_out": left_out}

    return steps.once("evaluate", inputs, work)


@transient_task("gate")
def judge_candidate(
    deps: Deps, steps: Steps, round_: Round, scored: Json, version: ModelVersion
) -> Json:
    """The verdict over the stored scores; promotion looks at the champion again."""
    return steps.once(
        "gate",
        {**scored, "candidate": version.name},
        lambda: evidence.to_json(
            evidence.verdict(deps, round_, version, scored_against=scored["champion"])
        ),
    )


@transient_task("register")
def register_version(
    deps: Deps, steps: Steps, round_: Round, verdict: Json, version: ModelVersion
) -> Json:
    """The version in MLflow with its evidence, for a reviewer to decide from.

    The result is the verdict, with the `name` of the version that it is about.
    """
    inputs = {"version": version.name, "verdict": digest(verdict)}

    def work() -> Json:
        shown = evidence.publish(deps, round_, version, _folder(deps, round_))
        return {**shown, "name": version.name}

    return steps.once("register", inputs, work)


def _folder(deps: Deps, round_: Round) -> Path:
    return deps.settings.home / "rounds" / round_.id


def _run(deps: Deps, command: Any, job: Json, out: Path) -> None:  # Any: a Literal
    path = out.parent / f"{out.name}.json"
    write_atomic(path, json.dumps(job, indent=1).encode())
    say: Callable[[str], None] = get_run_logger().info
    run_training_process(command, path, out, deps.settings, on_line=say)


def _base_digest(deps: Deps) -> str:
    """Of the folder with the weights: its manifest's, or that of its files."""
    settings = deps.settings.model
    folder = Path(settings.name) if Path(settings.name).is_dir() else (
        settings.cache_dir / settings.name
    )  # fmt: skip
    if (folder / "manifest.json").exists():
        return read_manifest(folder).digest
    files = sorted(p for p in folder.glob("*") if p.suffix in (".json", ".safetensors"))
    return digest({"name": settings.name, "files": [sha256_file(p) for p in files]})
