"""PostgreSQL that ends our backends, crashes, or stands still inside a COMMIT."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.harness import Site, site, until
from tests.faults.ledger import Ledger, audit, load, replay, wait_for_promises
from tests.faults.postgres import Postgres

pytestmark = pytest.mark.slow

BACKENDS = "FROM pg_stat_activity WHERE datname = '{}' AND pid <> pg_backend_pid()"
# At COMMIT, before the transaction is durable.
SLOW_COMMIT = """
CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON feedback
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION linger();
"""


@pytest.fixture
def there(tmp_path: Path, postgres: Postgres) -> Iterator[Site]:
    """A site on PostgreSQL with a server that answers."""
    with site(tmp_path, postgres.url) as there:
        there.start()
        yield there


@contextmanager
def _audited(there: Site) -> Iterator[Ledger]:
    """Load while the block runs; then nothing is lost or repeated."""
    ledger = Ledger()
    with load(there.port, ledger, "pg"):
        wait_for_promises(ledger, 20)
        yield ledger
        wait_for_promises(ledger, 20)
    assert audit(ledger, there.url) == []
    assert replay(ledger, there.port, random.Random(3)) == []


def test_backends_ended_at_random_moments_lose_and_repeat_nothing(
    there: Site, postgres: Postgres
) -> None:
    rng = random.Random(3)
    num_ended = 0
    with _audited(there) as ledger:
        for _ in range(10):
            wait_for_promises(ledger, rng.randint(1, 20))
            num_ended += _end(postgres, "true")

    assert num_ended >= 10


def test_backends_ended_inside_a_commit_lose_and_repeat_nothing(
    there: Site, postgres: Postgres
) -> None:
    with _audited(there):
        postgres.run_here(SLOW_COMMIT)
        for _ in range(3):
            until(lambda: _end(postgres, "state = 'active' AND wait_event = 'PgSleep'"))
        postgres.run_here("DROP FUNCTION linger() CASCADE")


def test_backends_ended_after_a_commit_that_was_not_confirmed_lose_and_repeat_nothing(
    there: Site, postgres: Postgres
) -> None:
    with _audited(there), _standby_that_never_comes(postgres):
        for _ in range(3):
            until(lambda: _end(postgres, "wait_event = 'SyncRep'"))


def test_crashed_database_loses_and_repeats_nothing(there: Site, postgres: Postgres) -> None:
    with _audited(there):
        postgres.crash()


def test_killed_server_loses_and_repeats_nothing(there: Site) -> None:
    with _audited(there) as ledger:
        for _ in range(2):
            there.kill()
            there.start("--die", "ack:20")
            assert there.wait() != 0
            there.start()
            wait_for_promises(ledger, 20)


def _end(postgres: Postgres, which: str) -> int:
    """How many backends of the server under test were ended."""
    backends = BACKENDS.format(postgres.name)
    return len(postgres.run(f"SELECT pg_terminate_backend(pid) {backends} AND {which}"))


@contextmanager
def _standby_that_never_comes(postgres: Postgres) -> Iterator[None]:
    """While the block runs, a row is durable and its COMMIT does not return."""
    postgres.run("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    postgres.run("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        postgres.run("ALTER SYSTEM RESET synchronous_standby_names")
        postgres.run("SELECT pg_reload_conf()")
