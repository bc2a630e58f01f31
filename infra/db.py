"""The database: one engine, two kinds of session, and the only commit in the codebase.

`read()` gives a session that cannot write, `write()` one that commits when its block ends, and
`write_cursor()` the driver's own cursor for groups of rows. SQLite runs in WAL mode with
`synchronous=FULL`, so a commit that returned is on disk; a writer takes the lock at BEGIN, because
a read that is upgraded to a write fails at once under load. Writers of all processes take turns on
a lock file: SQLite before 3.51.3 can lose pages when a write races another connection's checkpoint,
and its own waiting sleeps for up to 100 ms at a time.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import DateTime, Dialect, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import InterfaceError, InternalError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.types import TypeDecorator

from perennial.infra.errors import ConfigError, UnavailableError
from perennial.infra.locks import hold

_BUSY_TIMEOUT_S = 30
_CONNECT_S = 5
_RESTED_S = 1.0
_HANDOVER_S = 2.0  # for a predecessor that is just ending


class Base(DeclarativeBase):
    """The declarative base of every table."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime on every dialect; a naive one is refused."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The value in UTC; raises ValueError when it is naive."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a naive datetime cannot be stored: {value!r}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The value as an aware UTC datetime, also where the dialect forgets the zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Database:
    """Connections to one database; cheap to make, safe to share between threads."""

    def __init__(self, url: str) -> None:
        """Nothing is opened before the first session.

        Args:
            url: `sqlite:///path/to/file.db` or `postgresql+psycopg://user@host/name`.
        """
        parsed = make_url(url)
        self.dialect = parsed.get_backend_name()
        if self.dialect not in ("sqlite", "postgresql"):
            raise ConfigError(f"database must be sqlite or postgresql, got {self.dialect}")
        self.file = _file_of(parsed)
        self.engine = _make_engine(parsed)
        # A connection of its own kind: one that a pool hands on must never have lost its writing.
        self._readers = self.engine if self.dialect != "sqlite" else _make_engine(parsed)
        if self._readers is not self.engine:
            event.listen(self._readers, "connect", _refuse_writes)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session whose writes are refused by the database."""
        with self._as_unavailable(), Session(self._readers) as session:
            if self.dialect == "postgresql":
                session.execute(text("SET TRANSACTION READ ONLY"))
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits when the block ends and rolls back when it raises."""
        with (
            self._as_unavailable(),
            self._turn(),
            Session(self.engine, expire_on_commit=False) as session,
        ):
            if self.dialect == "sqlite":
                session.execute(text("BEGIN IMMEDIATE"))
            yield session
            session.commit()

    @contextmanager
    def write_cursor(self) -> Iterator[DBAPICursor]:
        """The driver's cursor in a transaction that commits when the block ends.

        For groups of rows, where an ORM costs more than the disk. After an error the connection is
        closed: what a failed commit left behind is not known.
        """
        with self._as_unavailable(), self._turn(), self.engine.connect() as connection:
            driver = connection.connection
            try:
                with self._pipeline(driver):
                    cursor = driver.cursor()
                    if self.dialect == "sqlite":
                        cursor.execute("BEGIN IMMEDIATE")
                    yield cursor
                    driver.commit()
            except BaseException:
                connection.invalidate()
                raise

    @contextmanager
    def as_only_ingest(self) -> Iterator[None]:
        """Be the one service that takes writes from apps on this SQLite file.

        Several would be safe, for writers take turns, but each would pay an fsync for its share of
        the rows. PostgreSQL may have several.

        Raises:
            UnavailableError: another service has the file.
        """
        with ExitStack() as stack:
            if self.file is not None:
                lock = self.file.with_name(f"{self.file.name}-ingest")
                try:
                    stack.enter_context(hold(lock, timeout_s=_HANDOVER_S))
                except UnavailableError as error:
                    raise UnavailableError(
                        f"another service takes writes on {self.file}: stop it, or use PostgreSQL"
                    ) from error
            yield

    @property
    def wal_bytes(self) -> int:
        """The size of SQLite's log; it grows while a reader that never ends stops checkpoints."""
        wal = self.file and self.file.with_name(f"{self.file.name}-wal")
        return wal.stat().st_size if wal and wal.exists() else 0

    def dispose(self) -> None:
        """Close pooled connections."""
        self.engine.dispose()
        self._readers.dispose()

    def _turn(self) -> AbstractContextManager[int | None]:
        if self.file is None:
            return nullcontext()
        return hold(self.file.with_name(f"{self.file.name}-turn"), timeout_s=_BUSY_TIMEOUT_S)

    def _pipeline(self, driver: PoolProxiedConnection) -> AbstractContextManager[object]:
        """PostgreSQL answers when something is fetched and at the end: a trip for each is saved."""
        if self.dialect == "sqlite":
            return nullcontext()
        connection: Any = driver.driver_connection  # psycopg's
        pipeline: AbstractContextManager[object] = connection.pipeline()
        return pipeline

    @contextmanager
    def _as_unavailable(self) -> Iterator[None]:
        driver = self.engine.dialect.loaded_dbapi
        try:
            yield
        except PoolTimeoutError as error:
            raise UnavailableError("all connections to the database are in use") from error
        # Internal is what PostgreSQL calls it when a node takes no writes after a failover.
        except (OperationalError, InterfaceError, InternalError) as error:
            raise UnavailableError(f"the database did not answer: {error.orig}") from error
        except (driver.OperationalError, driver.InterfaceError, driver.InternalError) as error:
            raise UnavailableError(f"the database did not answer: {error}") from error


def create_all(database: Database) -> None:
    """Create the tables of all imported components. For tests: installations migrate."""
    with database.engine.begin() as connection:
        Base.metadata.create_all(connection)


def _file_of(url: URL) -> Path | None:
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return Path(url.database)


def _make_engine(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        # Never prepared: a plan made while a table was empty would read all of it ever after.
        options = {"connect_timeout": _CONNECT_S, "prepare_threshold": None}
        engine = create_engine(url, pool_size=8, connect_args=options)
        _replace_what_died(engine)
        return engine
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _replace_what_died(engine: Engine) -> None:
    """Ping a connection that rested, as `pool_pre_ping` does with every one, at a round trip."""
    dialect = engine.dialect

    def checkout(connection: DBAPIConnection, record: ConnectionPoolEntry, _: object) -> None:
        if time.monotonic() - record.info.get("used_at", -math.inf) < _RESTED_S:
            return
        try:
            dialect.do_ping(connection)
        except dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error

    def checkin(_: object, record: ConnectionPoolEntry) -> None:
        record.info["used_at"] = time.monotonic()

    event.listen(engine, "checkout", checkout)
    event.listen(engine, "checkin", checkin)


def _prepare_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # The driver's own BEGIN is deferred and would defeat BEGIN IMMEDIATE.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={_BUSY_TIMEOUT_S * 1000}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _refuse_writes(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA query_only=ON")
    cursor.close()
