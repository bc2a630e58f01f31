"""What is erased in the store leaves the files of rounds, and what was computed of it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perennial.flows.curate import curate, data_folder
from perennial.flows.erase import withdraw_erased
from perennial.infra.artifacts import verify
from perennial.infra.locks import hold
from perennial.training.replay import load_replay
from tests.flows.test_curate import a_round, deps, first_round

withdraw: Any = withdraw_erased.fn  # type: ignore[attr-defined]  # without Prefect around it


@dataclass(kw_only=True, slots=True)
class Erased:
    """The store after an erasure, as far as files are concerned."""

    ids: set[str] = field(default_factory=set)

    def erased_feedback(self) -> frozenset[str]:
        return frozenset(self.ids)


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
    return SimpleNamespace(settings=some.settings, feedback=Erased(), round=round_, trunk=trunk)


def texts(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


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
