"""The rows of a round, as a folder of files that is either complete or absent.

`train`, `pairs`, `judgements`, `replay` and `general` are trained on; `dev` chooses between blends
of two adapters, where the recipe asks for it; `suites/` are judged on.
`next_replay` and `next_judged` are what the round after this one starts from, if this one's
candidate goes live. `diff.md` says what changed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perennial.flows.detect import cutoff
from perennial.flows.mapping import to_feedback_rows, to_limits
from perennial.flows.processes import Json
from perennial.flows.wiring import Deps
from perennial.infra.artifacts import Manifest, publish
from perennial.infra.settings import Settings, TrainingSettings
from perennial.registry.rounds import Round
from perennial.registry.versions import ModelVersion
from perennial.training.compile import Compiled, compile_feedback, with_enough, without_overruled
from perennial.training.contradiction import Contradicted, contradicted
from perennial.training.diff import Diff, render_diff
from perennial.training.examples import (
    Example,
    Judgement,
    Pair,
    read_examples,
    read_judgements,
    read_pairs,
    write_examples,
)
from perennial.training.general import PACKAGED_PROBE, PACKAGED_REPLAY, load_general
from perennial.training.holdout import Holdout, not_judged, split_holdout
from perennial.training.replay import ReplayStore, load_replay
from perennial.training.stream import spread

_NUM_REPLAYED_JUDGED = 45


@dataclass(frozen=True, kw_only=True, slots=True)
class Curated:
    """Everything that a round trains and is judged on.

    `judged` are rows of past rounds to judge by, `dev` rows to choose a blend by; nothing that asks
    what they ask is trained on. `compiled` is what is left without it, num_known how many rows
    were left out for it.
    """

    compiled: Compiled
    new: Holdout
    num_known: int
    replay: ReplayStore
    dev: tuple[Example, ...]
    next_replay: ReplayStore
    evicted: tuple[Example, ...]
    judged: tuple[Example, ...]
    forgotten: tuple[Contradicted, ...]


def curate(
    deps: Deps, round_: Round, champion: ModelVersion | None, general: Path, folder: Path
) -> Manifest:
    """`folder` with the rows of the round; what came after it was opened is left to the next.

    `general` is the file with the general rows to train on.
    """
    deps.feedback.horizon()
    since = cutoff(deps, champion)
    judged = deps.feedback.feedback_between(round_.task, since, round_.opened_at)
    compiled = compile_feedback(to_feedback_rows(judged), to_limits(deps.settings.training))
    curated = _against_the_past(deps, round_, champion, compiled)
    return publish(folder, lambda partial: _write(deps, round_, curated, general, partial))


def general_file(settings: Settings, draft: Callable[[Json, Path], None]) -> Path:
    """The general rows to train on: supplied, packaged, or written by the base model.

    `draft(job, out)` has the process fill `out`, or find there what an earlier one wrote.
    """
    training = settings.training
    if not training.general_drafts:
        return training.general_file or PACKAGED_REPLAY
    out = settings.home / "drafts"
    seed = training.overrides.get("seed", 0)
    draft({"num_rows": training.general_drafts, "seed": seed}, out)
    return out / str(json.loads((out / "summary.json").read_bytes())["general"])


def data_folder(deps: Deps, round_id: str) -> Path:
    """Where the rows of a round are."""
    return deps.settings.home / "rounds" / round_id / "data"


def read_training_rows(folder: Path) -> tuple[Example | Judgement | Pair, ...]:
    """Every row that a round gives to training, from its folder."""
    names = ("train", "replay", "dev", "general")
    return (
        *(row for name in names for row in read_examples(folder / f"{name}.jsonl")),
        *read_pairs(folder / "pairs.jsonl"),
        *read_judgements(folder / "judgements.jsonl"),
    )


def suite_row(example: Example, rule: str = "contains") -> Json:
    """A row as suites hold it; `contains` is how the gate grades."""
    return {
        "id": example.id,
        "messages": [list(turn) for turn in example.messages],
        "reference": example.completion,
        "rule": rule,
        "cluster": example.subject or example.id,
        "origins": example.to_json()["origins"],
    }


def write_suite(path: Path, rows: Sequence[Json]) -> None:
    """One row a line."""
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def _against_the_past(
    deps: Deps, round_: Round, champion: ModelVersion | None, compiled: Compiled
) -> Curated:
    """New rows apart from those to judge by, and the past without what they contradict."""
    settings = deps.settings.training
    past, judged = _left_by(deps, champion)
    forgotten = contradicted((*past.rows, *judged), compiled.examples)
    ids = {item.old.id for item in forgotten}
    judged = tuple(row for row in judged if row.id not in ids)
    new = split_holdout(not_judged(compiled.examples, judged), settings.holdout)
    apart = (*judged, *new.judge)
    # A question that users ask again may be among those to judge by now.
    stay = not_judged([row for row in past.rows if row.id not in ids], apart)
    past = replace(past, rows=stay)
    compiled = without_overruled(compiled, stay)
    replay = past.resized(settings.replay_rows)
    next_replay = replay.add(new.train, round_.id)
    stays = {row.id for row in next_replay.rows}
    dev = () if champion is None else _to_blend_by(settings, round_, new.train, replay.rows)
    untold = (*apart, *dev)
    told = replace(
        compiled,
        examples=not_judged(compiled.examples, untold),
        pairs=not_judged(compiled.pairs, untold),
        judgements=not_judged(compiled.judgements, untold),
    )
    own = {row.id for row in compiled.examples} & {row.id for row in untold}
    return Curated(
        compiled=with_enough(told, to_limits(settings)),
        new=replace(new, train=told.examples),
        num_known=_size(compiled) - _size(told) - len(own),
        replay=replace(replay, rows=not_judged(replay.rows, dev)),
        dev=dev,
        next_replay=next_replay,
        evicted=tuple(row for row in past.rows if row.id not in stays),
        judged=judged,
        forgotten=forgotten,
    )


def _left_by(deps: Deps, champion: ModelVersion | None) -> tuple[ReplayStore, tuple[Example, ...]]:
    """What the champion's round left to replay, and to judge by."""
    if champion is None:
        return ReplayStore(capacity=deps.settings.training.replay_rows), ()
    before = data_folder(deps, champion.round_id)
    return load_replay(before / "next_replay.jsonl"), read_examples(before / "next_judged.jsonl")


def _to_blend_by(
    settings: TrainingSettings, round_: Round, new: Sequence[Example], past: Sequence[Example]
) -> tuple[Example, ...]:
    """Rows to choose a blend of two adapters by, where the recipe asks for one.

    Each round draws others, so that a row that is not trained on now is so later.
    """
    if settings.overrides.get("start") != "blend":
        return ()
    parts = [split_holdout(rows, settings.holdout, draw=round_.id) for rows in (new, past)]
    return tuple(row for part in parts for row in part.judge)


def _size(compiled: Compiled) -> int:
    return len(compiled.examples) + len(compiled.pairs) + len(compiled.judgements)


def _write(deps: Deps, round_: Round, curated: Curated, general: Path, folder: Path) -> None:
    probe = load_general(deps.settings.training.probe_file or PACKAGED_PROBE)
    files: dict[str, Sequence[Example | Pair | Judgement]] = {
        "train": curated.new.train,
        "pairs": curated.compiled.pairs,
        "judgements": curated.compiled.judgements,
        "replay": curated.replay.rows,
        "dev": curated.dev,
        "general": [_general(i, *pair) for i, pair in enumerate(load_general(general))],
        "next_judged": (*curated.judged, *_of_round(curated.new.judge, round_.id)),
    }
    for name, rows in files.items():
        write_examples(folder / f"{name}.jsonl", rows)
    curated.next_replay.save(folder / "next_replay.jsonl")
    for name, suite in _suites(deps, round_, curated, probe).items():
        write_suite(folder / "suites" / f"{name}.jsonl", suite)
    names = {row.id: f"round {row.number}" for row in deps.ledger.list_rounds(round_.task)}
    text = render_diff(_diff(round_, curated), names)
    (folder / "diff.md").write_text(text, encoding="utf-8")
    counts = {"dropped": {k.value: n for k, n in curated.compiled.num_dropped.items()}}
    counts["rows"] = {name: len(rows) for name, rows in files.items()}
    (folder / "counts.json").write_text(json.dumps(counts, indent=1), encoding="utf-8")


def _suites(
    deps: Deps, round_: Round, curated: Curated, probe: Sequence[tuple[str, str]]
) -> Mapping[str, Sequence[Json]]:
    """Rows to judge on by suite: the target, what must be kept, the contradicted, general text.

    What must be kept is in one suite, because a suite of a few dozen rows cannot show that little
    was lost. A suite with too few rows is left out, except the target, whose lack the gate reports.
    """
    sample = spread(curated.replay.rows, _NUM_REPLAYED_JUDGED)
    suites = {
        "retained": [
            *(_past_row(deps, example, "round") for example in curated.judged),
            *(_past_row(deps, example, "trained-in-round") for example in sample),
        ],
        "stale": [_stale_row(item) for item in curated.forgotten],
        "general": [suite_row(_general(i, *pair), rule="none") for i, pair in enumerate(probe)],
    }
    enough = {n: rows for n, rows in suites.items() if len(rows) >= deps.settings.gate.min_rows}
    return {**enough, "target": [suite_row(example) for example in curated.new.judge]}


def _past_row(deps: Deps, example: Example, origin: str) -> Json:
    """A row of an earlier round; its id tells which, for the plot of what each round did."""
    number = deps.ledger.get(example.round_id).number if example.round_id else 0
    return {**suite_row(example), "id": f"{origin}-{number}/{example.id}"}


def _stale_row(item: Contradicted) -> Json:
    """The old question, to which the new answer is right and the old one must not be given."""
    return {
        **suite_row(item.old),
        "id": f"{item.old.id}-stale",
        "reference": item.by.completion,
        "forbid": [item.old.completion],
        "origins": [*item.old.to_json()["origins"], *item.by.to_json()["origins"]],
    }


def _general(index: int, prompt: str, answer: str) -> Example:
    return Example(
        id=f"general-{index}", messages=(("user", prompt),), completion=answer, kind="general"
    )


def _of_round(examples: Sequence[Example], round_id: str) -> tuple[Example, ...]:
    return tuple(replace(example, round_id=round_id) for example in examples)


def _diff(round_: Round, curated: Curated) -> Diff:
    return Diff(
        title=f"Training rows of round {round_.number}",
        compiled=curated.compiled,
        added=curated.new.train,
        pairs=curated.compiled.pairs,
        judgements=curated.compiled.judgements,
        judge=curated.new.judge,
        num_known=curated.num_known,
        kept=curated.replay.rows,
        forgotten=curated.forgotten,
        evicted=curated.evicted,
    )
