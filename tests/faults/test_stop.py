"""SIGTERM under load, and a second server on the file of the first."""

import time
from pathlib import Path

import pytest

from perennial.infra.db import Database
from tests.faults.harness import Site, free_port, until
from tests.faults.ledger import Ledger, audit, load, stored, wait_for_promises

pytestmark = pytest.mark.slow

NUM_CLIENTS = 8
DRAIN_S = 10


def test_stopped_server_drains_and_answers_all_it_has_stored(here: Site) -> None:
    ledger = Ledger()
    here.start()
    with load(here.port, ledger, "stop", NUM_CLIENTS):
        wait_for_promises(ledger, 100)
        started = time.monotonic()
        status = here.stop()
        seconds = time.monotonic() - started
        # A connection that is closed while its client writes to it costs that request, not more.
        assert ledger.num_broken <= NUM_CLIENTS
        database = Database(here.url)
        until(lambda: {key for key, _ in stored(database)} <= ledger.promised.keys(), 5)
        database.dispose()
        here.start()

    assert status == 0
    assert seconds <= DRAIN_S
    assert audit(ledger, here.url) == []


def test_second_ingest_process_on_the_same_file_is_refused(here: Site, tmp_path: Path) -> None:
    ledger = Ledger()
    here.start()
    second = Site(url=here.url, log=tmp_path / "second.log", port=free_port())
    with load(here.port, ledger, "first"):
        second.launch()
        try:
            until(second.has_ended, 20)
        finally:
            second.kill()
        wait_for_promises(ledger, 20)

    assert second.wait() == 1
    assert f"{tmp_path}/p.db" in second.log_text().splitlines()[-1]
    assert audit(ledger, here.url) == []


def test_killed_server_leaves_no_lock_behind(here: Site) -> None:
    here.start()
    here.kill()
    here.start()
