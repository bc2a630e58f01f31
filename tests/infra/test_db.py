import contextlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, select, text

from perennial.infra.db import Database, UtcDateTime
from perennial.infra.errors import ConfigError, UnavailableError

notes = Table(
    "notes", MetaData(), Column("id", Integer, primary_key=True), Column("at", UtcDateTime)
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'x.db'}")
    with database.write() as session:
        session.execute(text("CREATE TABLE notes (id INTEGER PRIMARY KEY, at TIMESTAMP)"))
    yield database
    database.dispose()


def _count(database: Database) -> int:
    with database.read() as session:
        return len(session.execute(select(notes)).all())


def test_write_session_commits_when_the_block_ends(database: Database) -> None:
    with database.write() as session:
        session.execute(notes.insert().values(id=1))

    assert _count(database) == 1


def test_write_session_keeps_nothing_when_the_block_raises(database: Database) -> None:
    with contextlib.suppress(KeyError), database.write() as session:
        session.execute(notes.insert().values(id=1))
        raise KeyError

    assert _count(database) == 0


def test_read_session_cannot_write(database: Database) -> None:
    with pytest.raises(UnavailableError, match="readonly"), database.read() as session:
        session.execute(notes.insert().values(id=1))

    with database.write() as session:  # the pooled connection is writable again
        session.execute(notes.insert().values(id=2))
    assert _count(database) == 1


def test_sqlite_is_synced_at_every_commit(database: Database) -> None:
    with database.read() as session:
        assert session.execute(text("PRAGMA synchronous")).scalar_one() == 2
        assert session.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"


def test_times_come_back_aware_and_in_utc(database: Database) -> None:
    at = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    with database.write() as session:
        session.execute(notes.insert().values(id=1, at=at))

    with database.read() as session:
        found = session.execute(select(notes.c.at)).scalar_one()

    assert found == at
    assert found.tzinfo is UTC


def test_naive_time_is_refused(database: Database) -> None:
    with pytest.raises(Exception, match="naive"), database.write() as session:
        session.execute(notes.insert().values(id=1, at=datetime(2026, 1, 1)))  # noqa: DTZ001


def test_writers_in_many_threads_all_succeed(database: Database) -> None:
    def write(start: int) -> None:
        for number in range(start, start + 10):
            with database.write() as session:
                session.execute(notes.insert().values(id=number))

    threads = [threading.Thread(target=write, args=(i * 10,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert _count(database) == 80


def test_other_databases_are_refused() -> None:
    with pytest.raises(ConfigError, match="sqlite or postgresql, got mysql"):
        Database("mysql://x/y")
