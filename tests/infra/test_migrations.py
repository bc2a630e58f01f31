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
