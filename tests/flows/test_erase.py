"""What is erased in the store leaves the files of rounds, and what was computed of it."""

import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perennial.flows.curate import curate, data_folder
from perennial.flows.erase import withdraw_erased
from perennial.infra.artifacts import publish, verify
from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.locks import hold
from perennial.infra.migrate import upgrade
from perennial.registry.evaluations import Evaluation, EvaluationStore
from perennial.training.replay import load_replay
from tests.flows.test_curate import a_round, deps, first_round

ERASED_AT = datetime(2026, 5, 4, 12, tzinfo=UTC)
BEFORE, AFTER = ERASED_AT - timedelta(seconds=1), ERASED_AT + timedelta(seconds=1)

withdraw: Any = withdraw_erased.fn  # type: ignore[attr-defined]  # without Prefect around it


@dataclass(kw_only=True, slots=True)
class Erased:
    """The store after an erasure, as far as files are concerned."""

    ids: set[str] = field(default_factory=set)

    def erased_feedback(self) -> frozenset[str]:
        return frozenset(self.ids)

    def last_erased_at(self) -> datetime | None:
        return ERASED_AT


@pytest.fixture
def installation(tmp_path: Path) -> Any:
    """A curated round with everything that a round keeps of its rows."""
    some = deps(tmp_path, first_round())
    curate(some, a_round(1), None, tmp_path / "general.jsonl", data_folder(some, "rnd_1"))
    round_ = tmp_path / "rounds" / "rnd_1"
    for name in ("train/teachers", "evaluation-1", "tune/work"):
        (round_ / name).mkdir(parents=True)
    trunk = some.settings.model.cache_dir / "trunk"
    trunk.mkdir(parents=True)
    url = some.settings.resolved_database_url
    upgrade(url)
    return SimpleNamespace(
        settings=some.settings,
        feedback=Erased(),
        evaluations=EvaluationStore(Database(url), utc_now),
        round=round_,
        trunk=trunk,
    )


def texts(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def draw(at: datetime, folder: Path) -> None:
    """The report of a check that was made `at`, as far as an erasure reads it."""
    (folder / "scores.json").write_text(json.dumps({"checked_at": at.isoformat()}))


def test_every_file_of_a_round_loses_the_row_and_keeps_the_others(installation: Any) -> None:
    data = installation.round / "data"
    replay = load_replay(data / "next_replay.jsonl")
    gone = next(row for row in replay.rows if row.kind == "replay" and "works" in row.completion)
    installation.feedback.ids = set(gone.event_ids)

    assert withdraw(installation) == 1

    verify(data)
    assert gone.completion not in texts(installation.round)
    assert gone.id not in texts(installation.round)
    kept = load_replay(data / "next_replay.jsonl")
    assert kept.rows == tuple(row for row in replay.rows if row.id != gone.id)
    assert kept.capacity == replay.capacity
    assert not installation.trunk.exists()
    assert not (installation.round / "train" / "teachers").exists()
    assert not (installation.round / "evaluation-1").exists()
    assert not (installation.round / "tune").exists()
    assert withdraw(installation) == 0


def test_pairs_judgements_and_suites_are_reached_too(installation: Any) -> None:
    data = installation.round / "data"
    for name in ("pairs", "judgements", "suites/target"):
        row = json.loads((data / f"{name}.jsonl").read_text().splitlines()[0])
        installation.feedback.ids.add(row["origins"][-1][0])
    withdraw(installation)
    left = texts(data)
    assert not [event for event in installation.feedback.ids if f'"{event}"' in left]


def test_answers_to_erased_rows_are_emptied_and_scores_stay(installation: Any) -> None:
    suite = installation.round / "data" / "suites" / "target.jsonl"
    gone, kept = (json.loads(line) for line in suite.read_text().splitlines()[:2])
    installation.evaluations.add(
        Evaluation(
            round_id="rnd_1",
            suite="target",
            version="base",
            row_id=row["id"],
            cluster=row["cluster"],
            score=0.5,
            answer="as you say",
        )
        for row in (gone, kept)
    )
    installation.feedback.ids = {event for event, _ in gone["origins"]}

    withdraw(installation)

    left = {row.row_id: row for row in installation.evaluations.rows("rnd_1")}
    assert (left[gone["id"]].answer, left[gone["id"]].score) == (None, 0.5)
    assert left[kept["id"]].answer == "as you say"


def test_rows_of_a_killed_curation_go(installation: Any) -> None:
    killed = installation.round / ".partial-data-x1"
    killed.mkdir()
    withdraw(installation)
    assert not killed.exists()


def test_reports_drawn_before_an_erasure_go_and_later_ones_stay(installation: Any) -> None:
    checks = installation.settings.home / "checks"
    for name, at in (("before", BEFORE), ("after", AFTER)):
        publish(checks / name, partial(draw, at))
        (checks / f".partial-{name}").mkdir()
        os.utime(checks / f".partial-{name}", (at.timestamp(), at.timestamp()))
    (checks / "erased-half-way").mkdir()

    withdraw(installation)

    assert {path.name for path in checks.iterdir()} == {"after", ".partial-after"}


def test_without_an_erased_row_nothing_is_touched(installation: Any) -> None:
    before = texts(installation.round)
    installation.feedback.ids = {"fb_of_nobody"}
    assert withdraw(installation) == 0
    assert texts(installation.round) == before
    assert installation.trunk.exists()


def test_an_erasure_that_was_killed_is_finished_by_the_next(installation: Any) -> None:
    data = installation.round / "data"
    (data / "manifest.json").unlink()
    installation.feedback.ids = {"fb_of_nobody"}
    assert withdraw(installation) == 1
    verify(data)


def test_a_round_that_is_worked_on_is_left_until_later(installation: Any) -> None:
    installation.feedback.ids = {"fb_001"}
    with hold(installation.settings.home / "run" / "round.lock", timeout_s=0):
        assert withdraw(installation) == 0
    assert withdraw(installation) == 1
