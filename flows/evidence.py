"""What a candidate is judged on: files to rows, rows to a verdict, all of it to MLflow."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perennial.flows.curate import data_folder, read_training_rows
from perennial.flows.mapping import to_rules, token_f1
from perennial.flows.processes import Json
from perennial.flows.wiring import Deps
from perennial.registry.card import Card, render_card, render_description
from perennial.registry.evaluations import Evaluation
from perennial.registry.gate import (
    GateEvidence,
    Promote,
    RowScore,
    Suite,
    SuiteKind,
    Verdict,
    judge,
)
from perennial.registry.plots import LossPoint, plot_gain, plot_loss, plot_r_matrix
from perennial.registry.rounds import Round, RoundState
from perennial.registry.versions import ModelVersion
from perennial.training.diff import render_left_out
from perennial.training.examples import read_jsonl
from perennial.training.grading import EvalRow, read_suite
from perennial.training.progress import read_progress

CHAMPION, CANDIDATE = "champion", "candidate"
_KINDS = {
    "target": SuiteKind.TARGET,
    "retained": SuiteKind.RETENTION,
    "stale": SuiteKind.FORBID,
    "general": SuiteKind.NLL,
}
_NUM_SAMPLES = 8
_DIFF = "training_rows/diff.md"


def champion_of(deps: Deps, round_: Round) -> str | None:
    """The version that the round's candidate competes with; None is the base model.

    Not the candidate's parent: one that was rebuilt from the base has none.
    """
    begun = deps.ledger.last_result(round_.id, "begin")
    return begun["champion"] if begun else None


def read_rows(
    out: Path, suites: Path, round_id: str, names: Mapping[str, str]
) -> Iterator[Evaluation]:
    """The results of an evaluation process as rows for the store, scored in [0, 1]."""
    for model, version in names.items():
        for path in sorted((out / model).glob("*.jsonl")):
            asked = {row.id: row for row in read_suite(suites / path.name)}
            for result in read_jsonl(path):
                yield Evaluation(
                    round_id=round_id,
                    suite=path.stem,
                    version=version,
                    row_id=result["id"],
                    cluster=result["cluster"],
                    score=_score(asked[result["id"]], result["answer"]),
                    nll=result["nll"],
                    answer=result["answer"],
                )


def verdict(
    deps: Deps, round_: Round, version: ModelVersion, *, scored_against: str | None
) -> Verdict:
    """The gate's verdict over the stored scores.

    A suite none of whose rows could be scored is judged too: what nobody measured is not kept.
    """
    rows = deps.evaluations.rows(round_.id)
    champion = scored_against or "base"
    asked = {path.stem for path in (data_folder(deps, round_.id) / "suites").glob("*.jsonl")}
    suites = [
        _suite(name, [row for row in rows if row.suite == name], champion, version.name)
        for name in sorted(asked | {row.suite for row in rows})
    ]
    return judge(
        GateEvidence(
            task=round_.task,
            candidate=version.name,
            champion=scored_against,
            champion_now=scored_against,  # promotion compares and sets,
            suites=tuple(suites),
            attempt=_attempt(deps, round_),
        ),
        to_rules(deps.settings.gate),
    )


def to_json(decided: Verdict) -> Json:
    """A verdict as JSON, for the ledger."""
    return {
        "verdict": "promote" if isinstance(decided, Promote) else "reject",
        "reasons": [
            {"code": r.code, "is_met": r.is_met, "sentence": r.sentence} for r in decided.reasons
        ],
    }


def publish(deps: Deps, round_: Round, version: ModelVersion, folder: Path) -> Json:
    """Run, parameters, curves, plots, report, rows and version in MLflow; safe to run again."""
    store = deps.mlflow()
    run = store.ensure_run(round_.task, round_.id, {"version": version.name})
    trained = json.loads((folder / "train" / "summary.json").read_bytes())
    store.log_params(run, trained["config"])
    progress = read_progress(folder / "train" / "progress.jsonl")
    store.log_curve(run, "loss", [(row.step, row.loss) for row in progress])
    champion = champion_of(deps, round_)
    decided = verdict(deps, round_, version, scored_against=champion)
    rows = deps.evaluations.rows(round_.id)
    card = Card(
        version=version,
        champion=champion,
        reason=round_.reason,
        verdict=decided,
        recipe=trained["config"],
        examples=trained["num_rows"],
        notes=_notes(deps, round_, len(trained["left_out"])),
        samples=_samples(folder, rows, champion or "base", version.name),
    )
    for name, content in (
        ("model_card.md", render_card(card).encode()),
        ("plots/loss.png", _loss_plot(folder, version)),
        ("plots/gain_and_retention.png", plot_gain(decided.comparisons, version.name)),
        ("plots/r_matrix.png", _r_matrix(deps, round_)),
        ("evaluation_rows.jsonl", _lines(rows)),
        (_DIFF, _diff(folder / "data", trained["left_out"]).encode()),
    ):
        store.log_bytes(run, name, content)
    for comparison in decided.comparisons:
        store.log_curve(run, f"{comparison.suite}/after", [(0, comparison.after.estimate)])
        store.log_curve(run, f"{comparison.suite}/before", [(0, comparison.before.estimate)])
    if (report := _report(deps, round_)) is not None:
        store.log_file(run, report, "drift")
    is_promote = isinstance(decided, Promote)
    tags = {"gate": "promote" if is_promote else "reject"}
    shown = store.register(run, version, render_description(card), tags)
    store.finish_run(run, is_success=True)
    return {"run": run.url, "version": shown.url, **to_json(decided)}


def _score(asked: EvalRow, answer: str | None) -> float | None:
    """Word overlap with the wanted answer; on a contradicted row, 1 if the old answer is nearer."""
    if asked.rule == "none" or answer is None:
        return None
    wanted = token_f1(answer, asked.reference)
    if not asked.forbid:
        return wanted
    return float(max(token_f1(answer, old) for old in asked.forbid) >= max(wanted, 0.5))


def _suite(name: str, rows: Sequence[Evaluation], champion: str, candidate: str) -> Suite:
    kind = _KINDS[name]

    def scores(version: str) -> tuple[RowScore, ...]:
        return tuple(
            RowScore(
                row_id=row.row_id,
                cluster=row.cluster,
                score=row.nll if kind is SuiteKind.NLL else row.score,
            )
            for row in rows
            if row.version == version
        )

    return Suite(name=name, kind=kind, candidate=scores(candidate), champion=scores(champion))


def _attempt(deps: Deps, round_: Round) -> int:
    """Which candidate this is since the last promotion: holdouts overlap between them.

    A round that had nothing to train on had no candidate.
    """
    rounds = [r for r in deps.ledger.list_rounds(round_.task) if r.number < round_.number]
    attempt = 1
    for earlier in rounds:  # newest first
        if earlier.state is not RoundState.REJECTED:
            break
        if "register" in deps.ledger.steps(earlier.id):
            attempt += 1
    return attempt


def _notes(deps: Deps, round_: Round, num_untrained: int) -> list[str]:
    """What the figures do not show: rows that were too long."""
    scored = deps.ledger.last_result(round_.id, "evaluate") or {}
    unscored = ", ".join(f"{name} {num}" for name, num in scored.get("left_out", {}).items())
    notes = [f"Rows too long to be scored, left out for both: {unscored}."] if unscored else []
    if num_untrained:
        notes.append(f"Rows too long to be trained on: {num_untrained}; `{_DIFF}` ends with them.")
    return notes


def _diff(data: Path, left_out: Sequence[Json]) -> str:
    """What the round added, kept and dropped, with what training left out of it."""
    text = (data / "diff.md").read_text(encoding="utf-8")
    num_tokens = {row["id"]: row["num_tokens"] for row in left_out}
    return text + render_left_out(read_training_rows(data), num_tokens) if num_tokens else text


def _samples(
    folder: Path, rows: Sequence[Evaluation], champion: str, candidate: str
) -> list[tuple[str, str, str]]:
    asked = read_suite(folder / "data" / "suites" / "target.jsonl")
    said = {(row.version, row.row_id): row.answer or "" for row in rows if row.suite == "target"}
    return [
        (row.messages[-1][1], said.get((champion, row.id), ""), said.get((candidate, row.id), ""))
        for row in asked[:_NUM_SAMPLES]
    ]


def _loss_plot(folder: Path, version: ModelVersion) -> bytes:
    progress = read_progress(folder / "train" / "progress.jsonl")
    points = [LossPoint(step=row.step, train=row.loss) for row in progress]
    return plot_loss(points, f"Training loss of {version.name}")


def _r_matrix(deps: Deps, round_: Round) -> bytes:
    """Mean score on each round's rows after each round, from the stored rows."""
    rounds = sorted(
        (r for r in deps.ledger.list_rounds(round_.task) if r.number <= round_.number),
        key=lambda r: r.number,
    )
    scores = []
    for after in rounds:
        live = champion_of(deps, after) or "base"
        rows = [row for row in deps.evaluations.rows(after.id) if row.version != live]
        scores.append([_mean(_scores_on(rows, of, after)) for of in rounds])
    names = [f"round {r.number}" for r in rounds]
    return plot_r_matrix(scores, [f"after {name}" for name in names], names)


def _scores_on(rows: Sequence[Evaluation], of: Round, after: Round) -> list[float | None]:
    """Scores on what round `of` taught, measured in round `after`."""
    if of.number == after.number:
        return [row.score for row in rows if row.suite == "target"]
    prefix = f"round-{of.number}/"
    return [r.score for r in rows if r.suite == "retained" and r.row_id.startswith(prefix)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _lines(rows: Sequence[Evaluation]) -> bytes:
    def row(item: Evaluation) -> dict[str, Any]:  # Any: JSON
        return {
            "suite": item.suite,
            "version": item.version,
            "row_id": item.row_id,
            "cluster": item.cluster,
            "score": item.score,
            "nll": item.nll,
            "answer": item.answer,
        }

    return "".join(json.dumps(row(r), ensure_ascii=False) + "\n" for r in rows).encode()


def _report(deps: Deps, round_: Round) -> Path | None:
    """The Evidently report of the newest check before the round."""
    checks = deps.checks.list_checks(round_.task, limit=50)
    paths = (c.report_path for c in checks if c.created_at <= round_.opened_at)
    return next((path for path in paths if path is not None and path.exists()), None)
