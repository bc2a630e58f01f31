"""The registry's columns hold the longest ids and subjects that the API accepts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

import perennial.feedback.tables
import perennial.monitoring.tables  # noqa: F401
from perennial.infra.db import Base, Database
from perennial.infra.migrate import upgrade
from perennial.registry.evaluations import Evaluation, EvaluationStore
from perennial.registry.version_store import Member
from tests.registry.builders import Clock, World

LONG_ID, LONG_SUBJECT = "f" * 128, "s" * 256


@pytest.fixture
def older(database: Database, clock: Clock, tmp_path: Path) -> Iterator[World]:
    """A registry with narrower columns and a row in each table."""
    Base.metadata.drop_all(database.engine)
    upgrade(_url(database), "0003")
    older = World(database, clock, tmp_path)
    _keep(older, 1, "fb_1", "ada")
    yield older
    Base.metadata.drop_all(database.engine)


def test_the_longest_ids_and_subjects_are_kept(world: World) -> None:
    _keep(world, 1, LONG_ID, LONG_SUBJECT)

    assert _kept(world) == [(LONG_ID, LONG_SUBJECT)]


def test_an_upgraded_registry_keeps_its_rows_and_takes_longer_ones(older: World) -> None:
    upgrade(_url(older.database))
    _keep(older, 2, LONG_ID, LONG_SUBJECT)

    assert _kept(older) == [("fb_1", "ada"), (LONG_ID, LONG_SUBJECT)]
    with older.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def _keep(world: World, seed: int, id: str, subject: str) -> None:
    version = world.version(seed, members=[Member(event_id=id, subject=subject)])
    row = Evaluation(
        round_id=version.round_id,
        suite="retained",
        version=version.name,
        row_id=f"trained-in-round-1000/{id}-stale",
        cluster=subject,
        score=1.0,
    )
    EvaluationStore(world.database, world.clock).add([row])


def _kept(world: World) -> list[tuple[str, str]]:
    """Ids and subjects in both tables, by version."""
    kept = []
    for version in reversed(world.versions.list_versions("support")):
        (member,) = world.versions.members(version.name)
        (row,) = EvaluationStore(world.database, world.clock).rows(version.round_id)
        assert row.row_id == f"trained-in-round-1000/{member.event_id}-stale"
        assert row.cluster == member.subject
        kept.append((member.event_id, row.cluster))
    return kept


def _url(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)
