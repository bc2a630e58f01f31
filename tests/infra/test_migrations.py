"""Upgrades from every revision, empty and with rows, end at the tables of the code."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

import perennial.feedback.tables
import perennial.monitoring.tables
import perennial.registry.tables  # noqa: F401
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.infra.clock import utc_now
from perennial.infra.db import Base, Database
from perennial.infra.migrate import FOLDER, is_current, upgrade

REVISIONS = [revision.revision for revision in ScriptDirectory(str(FOLDER)).walk_revisions()]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'x.db'}"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    yield database
    database.dispose()


def test_newest_schema_equals_the_tables_of_the_code(url: str, database: Database) -> None:
    upgrade(url)

    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Base.metadata) == []


@pytest.mark.parametrize("revision", REVISIONS)
def test_upgrade_from_every_revision_keeps_a_row(
    url: str, database: Database, revision: str
) -> None:
    upgrade(url, revision)
    with database.write() as session:
        session.execute(
            text(
                "INSERT INTO champions (task, version, row_version, since)"
                " VALUES ('support', NULL, 0, '2026-01-01 00:00:00')"
            )
        )

    upgrade(url)

    assert is_current(database)
    with database.read() as session:
        assert session.execute(text("SELECT task FROM champions")).scalar_one() == "support"


def test_upgrading_twice_changes_nothing(url: str, database: Database) -> None:
    upgrade(url)
    before = inspect(database.engine).get_table_names()

    upgrade(url)

    assert inspect(database.engine).get_table_names() == before


def test_feedback_joined_with_an_erased_answer_is_pending_again(
    url: str, database: Database
) -> None:
    upgrade(url, "0002")
    with database.write() as session:
        session.execute(
            text(
                "INSERT INTO interactions (tenant, id, task, messages, completion, model_version,"
                " route_role, received_at, tags, erased_at) VALUES ('acme', 'i', '', '[]', '',"
                " 'base', 'champion', '2026-01-01', '{}', '2026-01-02')"
            )
        )
        session.execute(
            text(
                "INSERT INTO feedback (tenant, id, task, target_interaction_id, target_messages,"
                " kind, signal, source_kind, may_train, status, interaction_id, received_at,"
                " joined_at, tags) VALUES ('acme', 'f', '', 'i', '[]', 'binary',"
                " '{\"value\": true}', 'end_user', true, 'joined', 'i', '2026-01-03',"
                " '2026-01-03', '{}')"
            )
        )

    upgrade(url)

    found = SqlFeedbackStore(database, utc_now).get_feedback("acme", "f")
    assert (found.task, found.status) == (None, "pending")
    assert (found.interaction_id, found.joined_at) == (None, None)
