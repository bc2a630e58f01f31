"""SIGKILL at random and at chosen moments: what was promised is there once."""

import random
import signal
from pathlib import Path

import pytest

from tests.faults.harness import Site, strace
from tests.faults.ledger import Ledger, audit, load, replay, wait_for_promises

pytestmark = pytest.mark.slow

# A statement and its number; `ack` is after the commit and before the answer.
POINTS = (
    "CREATE TABLE:2",
    "CREATE INDEX:3",
    "INSERT INTO alembic_version:1",
    "BEGIN:20",
    "INSERT INTO feedback:11",
    "COMMIT:40",
    "ack:1",
    "ack:30",
)
# A file, a call on it and its number: in a group, at its end, in a checkpoint, at its end.
CALLS = (
    ("-wal", "pwrite64", 50),
    ("-wal", "fdatasync", 9),
    ("", "pwrite64", 3),
    ("", "fdatasync", 1),
)


def test_kills_at_random_moments_lose_and_repeat_nothing(here: Site) -> None:
    rng = random.Random(3)
    ledger = Ledger()
    here.start()

    with load(here.port, ledger, "random"):
        for _ in range(3):
            wait_for_promises(ledger, rng.randint(20, 120))
            here.kill()
            here.start()

    assert audit(ledger, here.url) == []
    assert replay(ledger, here.port, rng) == []


def test_kills_at_chosen_statements_lose_and_repeat_nothing(here: Site) -> None:
    ledger = Ledger()

    with load(here.port, ledger, "chosen"):
        for point in POINTS:
            here.launch("--die", point)
            assert here.wait() == -signal.SIGKILL, f"{point}: {here.log_text()}"
        here.start()

    assert audit(ledger, here.url) == []
    assert replay(ledger, here.port, random.Random(3)) == []


@pytest.mark.usefixtures("can_trace")
def test_kills_inside_writes_and_syncs_lose_and_repeat_nothing(here: Site, tmp_path: Path) -> None:
    ledger = Ledger()

    with load(here.port, ledger, "inside"):
        for suffix, call, number in CALLS:
            here.start()
            death = f"inject={call}:signal=SIGKILL:when={number}"
            with strace(here, "-P", f"{tmp_path}/p.db{suffix}", "-e", death):
                assert here.wait() == -signal.SIGKILL, f"{suffix} {call}"
        here.start()

    assert audit(ledger, here.url) == []
    assert replay(ledger, here.port, random.Random(3)) == []
