"""The audit is worth something: it passes the real server and catches those that lie."""

import random
import signal

import pytest

from tests.faults.harness import Site
from tests.faults.ledger import Ledger, audit, load, replay, wait_for_promises

pytestmark = pytest.mark.slow


def test_real_server_passes(here: Site) -> None:
    assert _faults_of_a_killed(here, "none") == []


@pytest.mark.parametrize(
    ("mutant", "symptom"), [("ack-first", "promised and lost"), ("forget-key", "stored 2 times")]
)
def test_mutant_is_caught(here: Site, mutant: str, symptom: str) -> None:
    found = _faults_of_a_killed(here, mutant)

    assert any(symptom in fault for fault in found), found


def _faults_of_a_killed(here: Site, mutant: str) -> list[str]:
    """What the audit finds after one death between commit and answer and one under load."""
    ledger = Ledger()
    # The fourth event of a client is feedback, which has no id of its own to be known by.
    here.launch("--mutant", mutant, "--die", "ack:4")
    with load(here.port, ledger, "lone", num_clients=1):
        assert here.wait() == -signal.SIGKILL
        here.start("--mutant", mutant)
    with load(here.port, ledger, "crowd", num_clients=8):
        wait_for_promises(ledger, 100)
        here.kill()
        here.start("--mutant", mutant)
    return audit(ledger, here.url) + replay(ledger, here.port, random.Random(3))
