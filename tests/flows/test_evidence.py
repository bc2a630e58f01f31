"""What is stored of a candidate and shown to who decides, over real stores and a real MLflow."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from perennial.feedback.records import Correction, Feedback, Message, Target
from perennial.flows import evidence
from perennial.flows.curate import data_folder, suite_row, write_suite
from perennial.flows.detect import measure
from perennial.flows.release import ask_approval, judged_version
from perennial.flows.retrain import (
    close_if_empty,
    curate_rows,
    name_version,
    register_version,
    retrain_round,
)
from perennial.flows.steps import leased
from perennial.flows.wiring import Deps, make_deps
from perennial.infra.artifacts import publish
from perennial.infra.clock import utc_now
from perennial.infra.db import Database, create_all
from perennial.infra.settings import Settings, load_settings
from perennial.registry.gate import Reject
from perennial.registry.rounds import Round, RoundState
from perennial.registry.versions import ModelVersion, NewVersion
from perennial.training import run
from perennial.training.examples import Example, write_examples
from perennial.training.replay import ReplayStore
from tests.feedback.writing import put
from tests.registry.builders import MlflowServer, write_adapter
from tests.training.builders import example, save_tiny

name_it: Any = name_version.fn  # type: ignore[attr-defined]  # without Prefect around it
curate_it: Any = curate_rows.fn  # type: ignore[attr-defined]  # as above
close_it: Any = close_if_empty.fn  # type: ignore[attr-defined]  # as above
register: Any = register_version.fn  # type: ignore[attr-defined]  # as above
ask: Any = ask_approval.fn  # type: ignore[attr-defined]  # as above
ROWS = ("train", "replay", "dev", "general", "pairs", "judgements")


@pytest.fixture
def deps(tmp_path: Path) -> Iterator[Deps]:
    (tmp_path / "perennial.toml").touch()
    model = tmp_path / "model"
    model.mkdir()
    settings = load_settings(
        {
            "PERENNIAL_HOME": str(tmp_path),
            "PERENNIAL_MODEL__NAME": str(model),
            "PERENNIAL_APPROVAL__MODE": "auto",
        },
        tmp_path / "perennial.toml",
    )
    database = Database(f"sqlite:///{tmp_path}/p.db")
    create_all(database)
    yield make_deps(settings, database, utc_now)
    database.dispose()


def begun(deps: Deps, number: int, champion: str | None, rows: Sequence[Example]) -> Round:
    """A round whose adapter is trained, on `rows`."""
    round_ = deps.ledger.open_round("support", "drift", str(number))
    lease = deps.ledger.claim(round_.id, "test", ttl_s=60)
    deps.ledger.finish_step(lease, "begin", "0", {"champion": champion})
    deps.ledger.release(lease)
    data = data_folder(deps, round_.id)
    for name in ROWS:
        write_examples(data / f"{name}.jsonl", rows if name == "train" else ())
    return round_


def candidate(deps: Deps, round_: Round, start: str, champion: ModelVersion | None) -> ModelVersion:
    """The version of the round, whose training says that it began from `start`."""
    folder = data_folder(deps, round_.id).parent / "train" / "adapter"
    manifest = publish(folder, lambda inner: write_adapter(inner, round_.number))
    trained = {"adapter_digest": manifest.digest, "start": {"start": start, "reason": None}}
    found: ModelVersion = name_it(deps, round_, {"digest": "d" * 64}, trained, champion)
    return found


@pytest.mark.parametrize(("start", "is_clean"), [("base", True), ("parent", False)])
def test_only_a_rebuilt_version_has_not_learned_from_what_was_erased(
    deps: Deps, start: str, is_clean: bool
) -> None:
    champion = candidate(deps, begun(deps, 1, None, [example(1)]), "base", None)
    later = begun(deps, 2, champion.name, [example(2)])

    version = candidate(deps, later, start, champion)

    tainted = deps.versions.versions_trained_on(event_id="fb_1")
    assert tainted == ((champion.name,) if is_clean else (champion.name, version.name))
    members = {member.event_id for member in deps.versions.members(version.name)}
    assert members == ({"fb_2"} if is_clean else {"fb_1", "fb_2"})
    assert version.parent == (None if is_clean else champion.name)


def evaluated(deps: Deps, round_: Round, names: dict[str, str]) -> None:
    """The base model in the place of each model; what was asked for retention is too long."""
    folder = data_folder(deps, round_.id)
    long = replace(example(9), messages=(("user", "x" * 600),))
    suites = {"target": [example(n) for n in range(12)], "retained": [long]}
    for name, rows in suites.items():
        write_suite(folder / "suites" / f"{name}.jsonl", [suite_row(row) for row in rows])
    job = {
        "base_model": str(save_tiny(folder / "tiny")),
        "adapters": dict.fromkeys(names),
        "suites": {name: f"suites/{name}.jsonl" for name in suites},
        "num_threads": 1,
        "device": "cpu",
    }
    (folder / "eval.json").write_text(json.dumps(job))
    assert run.main(["evaluate", str(folder / "eval.json"), str(folder / "scores")]) == 0
    rows = evidence.read_rows(folder / "scores", folder / "suites", round_.id, names)
    deps.evaluations.add(rows)


def test_a_suite_of_which_no_row_could_be_scored_keeps_the_candidate_out(deps: Deps) -> None:
    round_ = begun(deps, 1, None, [example(1)])
    version = candidate(deps, round_, "base", None)
    evaluated(deps, round_, {"champion": "base", "candidate": version.name})

    found = evidence.verdict(deps, round_, version, scored_against=None)

    assert isinstance(found, Reject)
    unmet = [reason.sentence for reason in found.reasons if not reason.is_met]
    assert "retained: 0 rows are insufficient, 6 are needed." in unmet


def test_an_answer_of_several_lines_is_one_result(tmp_path: Path) -> None:
    answer = "one\u2028two\u2029three\x85four"
    write_suite(tmp_path / "suites" / "target.jsonl", [suite_row(example(1))])
    (tmp_path / "scores").mkdir()
    result = {"id": example(1).id, "cluster": "c", "answer": answer, "nll": 1.0}
    write_suite(tmp_path / "scores" / "candidate" / "target.jsonl", [result])

    (found,) = evidence.read_rows(
        tmp_path / "scores", tmp_path / "suites", "rnd_1", {"candidate": "v1"}
    )

    assert found.answer == answer


def corrected(deps: Deps, asked: Example) -> None:
    """A user says again what the row says."""
    messages = tuple(Message(role="user", content=text) for _, text in asked.messages)
    feedback = Feedback(
        id=f"fb-{asked.id}",
        tenant="default",
        task="support",
        target=Target(messages=messages, completion="?"),
        signal=Correction(text=asked.completion),
        source_kind="end_user",
        received_at=utc_now(),
    )
    put(deps.feedback, feedback)


def curated(deps: Deps, champion: ModelVersion, key: str) -> tuple[Round, bool]:
    """A new round with its rows, and whether it had none to train on."""
    round_ = deps.ledger.open_round("support", "forced", key)
    with leased(deps.ledger, round_.id, deps.settings.home) as steps:
        curate_it(deps, steps, round_, champion)
        return round_, close_it(deps, steps, round_)


def test_a_round_of_which_all_is_judged_by_makes_way_for_the_next(deps: Deps) -> None:
    champion = candidate(deps, begun(deps, 1, None, [example(1)]), "base", None)
    data = data_folder(deps, champion.round_id)
    write_examples(data / "next_judged.jsonl", [example(2)])
    ReplayStore(capacity=9).save(data / "next_replay.jsonl")
    corrected(deps, example(2))

    first, is_empty = curated(deps, champion, "2")

    assert is_empty
    closed = deps.ledger.get(first.id)
    assert closed.state is RoundState.REJECTED
    assert closed.reasons[0].startswith("No new row is left to train on")
    corrected(deps, example(3))
    second, is_empty = curated(deps, champion, "3")
    assert not is_empty
    assert deps.ledger.get(second.id).state is RoundState.OPEN


@pytest.mark.parametrize(("has_candidate", "attempt"), [(True, 2), (False, 1)])
def test_only_a_rejected_candidate_is_an_attempt(
    deps: Deps, has_candidate: bool, attempt: int
) -> None:
    earlier = begun(deps, 1, None, [example(1)])
    lease = deps.ledger.claim(earlier.id, "test", ttl_s=60)
    if has_candidate:
        deps.ledger.finish_step(lease, "register", "0", {"verdict": "reject"})
    deps.ledger.close_round(lease, RoundState.REJECTED, ["no"])
    round_ = begun(deps, 2, None, [example(2)])
    version = candidate(deps, round_, "base", None)
    evaluated(deps, round_, {"champion": "base", "candidate": version.name})

    found = evidence.verdict(deps, round_, version, scored_against=None)

    (numbers,) = (reason.numbers for reason in found.reasons if "attempt" in reason.numbers)
    assert numbers["attempt"] == attempt


def test_only_what_no_candidate_has_learned_calls_for_a_round(deps: Deps) -> None:
    corrected(deps, example(1))
    corrected(deps, example(2))
    rejected = deps.ledger.open_round("support", "enough", "1")
    lease = deps.ledger.claim(rejected.id, "test", ttl_s=60)
    deps.ledger.finish_step(lease, "register", "0", {"verdict": "reject"})
    deps.ledger.close_round(lease, RoundState.REJECTED, ["no"])
    empty = deps.ledger.open_round("support", "forced", "2")
    corrected(deps, example(3))
    deps.ledger.close_round(
        deps.ledger.claim(empty.id, "test", ttl_s=60), RoundState.REJECTED, ["no row"]
    )

    found = measure(deps, "support", is_forced=False)
    forced = measure(deps, "support", is_forced=True)

    assert found.evidence.num_new_examples == 1
    assert forced.evidence.num_new_examples == 3


@pytest.mark.slow
def test_a_reviewer_sees_what_was_too_long_and_what_it_was_compared_with(
    deps: Deps, tmp_path: Path
) -> None:
    champion = candidate(deps, begun(deps, 1, None, [example(1)]), "base", None)
    round_ = begun(deps, 2, champion.name, [example(2), example(3)])
    version = candidate(deps, round_, "base", champion)
    evaluated(deps, round_, {"champion": champion.name, "candidate": version.name})
    lease = deps.ledger.claim(round_.id, "test", ttl_s=60)
    deps.ledger.finish_step(lease, "evaluate", "0", {"left_out": {"retained": 1}})
    folder = data_folder(deps, round_.id).parent
    (folder / "data" / "diff.md").write_text("# Training rows of round 2\n")
    long = [{"id": "correction-3", "num_tokens": 700}]
    trained = {"config": {"rank": 4}, "num_rows": {"new": 1}, "left_out": long}
    (folder / "train" / "summary.json").write_text(json.dumps(trained))
    (folder / "train" / "progress.jsonl").write_text("")
    server = MlflowServer(tmp_path / "mlflow")
    server.folder.mkdir()
    server.start()
    try:
        given = deps.settings.model_dump() | {"mlflow": {"uri": server.uri}}
        logged = replace(deps, settings=Settings.model_validate(given))
        shown = evidence.publish(logged, round_, version, folder)
        files = {"run_id": shown["run"].rpartition("/")[2]}
        card, diff = (
            httpx.get(f"{server.uri}/get-artifact", params={**files, "path": path}).text
            for path in ("model_card.md", "training_rows/diff.md")
        )
    finally:
        server.kill()

    assert f"Compared with `{champion.name}`" in card
    assert "| Trained from | base |" in card
    assert "Rows too long to be scored, left out for both: retained 1." in card
    assert "Rows too long to be trained on: 1;" in card
    assert diff.startswith("# Training rows of round 2")
    assert "## Left out of training, too long\n\n- 700 tokens: what is item 21?" in diff


def test_a_rebuilt_version_replaces_the_champion_that_it_was_compared_with(deps: Deps) -> None:
    champion = candidate(deps, begun(deps, 1, None, [example(1)]), "base", None)
    later = begun(deps, 2, champion.name, [example(2)])
    version = candidate(deps, later, "base", champion)

    answer = ask(deps, later, version, {"verdict": "promote"}, deps.settings.approval)

    assert answer.expected == champion.name


class DeafMlflow:
    """Keeps nothing of what it is told."""

    def ensure_run(self, *_: object) -> Any:
        return SimpleNamespace(url="http://run")

    def register(self, *_: object) -> Any:
        return SimpleNamespace(url="http://version")

    def log(self, *_: object, **__: object) -> None:
        """Nothing."""

    log_params = log_curve = log_bytes = log_file = finish_run = log


class DeafDeps(Deps):
    """The stores, with an MLflow that needs no server."""

    def mlflow(self) -> Any:
        return DeafMlflow()


def registered(deps: Deps, round_: Round, version: ModelVersion) -> Any:
    """What the round notes of its candidate, trained and scored on no row."""
    folder = data_folder(deps, round_.id).parent
    (folder / "data" / "diff.md").write_text("# Training rows\n")
    write_suite(folder / "data" / "suites" / "target.jsonl", [])
    trained = {"config": {"rank": 4}, "num_rows": {"new": 1}, "left_out": []}
    (folder / "train" / "summary.json").write_text(json.dumps(trained))
    (folder / "train" / "progress.jsonl").write_text("")
    deaf = DeafDeps(**{field.name: getattr(deps, field.name) for field in fields(deps)})
    with leased(deps.ledger, round_.id, deps.settings.home) as steps:
        return register(deaf, steps, round_, {"verdict": "reject"}, version)


def test_a_verdict_is_about_the_version_that_was_judged(deps: Deps) -> None:
    round_ = begun(deps, 1, None, [example(1)])
    judged = candidate(deps, round_, "base", None)
    verdict = registered(deps, round_, judged)
    later = deps.versions.register(
        NewVersion(
            task="support",
            adapter_digest="e" * 64,
            adapter_path=judged.adapter_path,
            base_digest=judged.base_digest,
            round_id=round_.id,
            parent=None,
            dataset_digest=judged.dataset_digest,
        ),
        (),
    )

    assert judged_version(deps, round_, verdict) == judged
    del verdict["name"]  # as older releases noted it
    assert judged_version(deps, round_, verdict) == later


def test_a_candidate_under_review_is_not_trained_again_under_changed_settings(deps: Deps) -> None:
    round_ = begun(deps, 1, None, [example(1)])
    registered(deps, round_, candidate(deps, round_, "base", None))
    steps = deps.ledger.steps(round_.id)
    given = deps.settings.model_dump() | {"training": {"overrides": {"rank": 2}}}

    retrain_round(replace(deps, settings=Settings.model_validate(given)), round_)

    assert deps.ledger.steps(round_.id) == steps
