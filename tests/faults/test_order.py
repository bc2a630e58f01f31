"""The order of system calls: a 201 is sent after the sync of what it promises.

A killed process keeps its page cache, so no SIGKILL can tell a synced row from one that is not.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.faults.harness import Site, strace
from tests.faults.ledger import event, send
from tests.faults.wire import Wire

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("can_trace")]

CALLS = "trace=pwrite64,fsync,fdatasync,write,writev,sendto,sendmsg"
NUM_POSTS = 8


def test_every_ack_follows_the_sync_of_its_row(here: Site, tmp_path: Path) -> None:
    assert _soundness_of_acks(here, tmp_path, "none") == [True] * NUM_POSTS


@pytest.mark.parametrize("mutant", ["ack-first", "sync-off"])
def test_mutant_acks_before_the_sync(here: Site, tmp_path: Path, mutant: str) -> None:
    sound = _soundness_of_acks(here, tmp_path, mutant)

    assert len(sound) == NUM_POSTS
    assert not all(sound)


def test_sync_that_began_before_the_last_write_proves_nothing() -> None:
    write = "7 0.0 pwrite64(5</p.db-wal>, ..., 24, 0) = 24"
    begun = "7 0.0 fdatasync(5</p.db-wal> <unfinished ...>"
    ended = "7 0.0 <... fdatasync resumed>) = 0"
    failed = "7 0.0 fdatasync(5</p.db-wal>) = -1 EIO (Input/output error)"
    ack = '8 0.0 sendto(9<TCP:[1]>, "HTTP/1.1 201 Created\\r\\n"..., 80, 0, NULL, 0) = 80'

    assert sound_acks([write, begun, ended, ack], "/p.db-wal") == [True]
    assert sound_acks([write, begun, write, ended, ack], "/p.db-wal") == [False]
    assert sound_acks([write, begun, ack, ended], "/p.db-wal") == [False]
    assert sound_acks([write, failed, ack], "/p.db-wal") == [False]
    assert sound_acks([write, begun, ended, ack, ack], "/p.db-wal") == [True, False]


def _soundness_of_acks(here: Site, folder: Path, mutant: str) -> list[bool]:
    here.start("--mutant", mutant)
    with strace(here, "-e", CALLS) as seen, Wire(here.port) as wire:
        for n in range(NUM_POSTS):
            assert send(wire, event(f"order-{n}")).status == 201
    return sound_acks(seen.read_text().splitlines(), f"{folder}/p.db-wal")


def sound_acks(lines: Iterable[str], wal: str) -> list[bool]:
    """Of each 201: whether something was written since the last one, and all of it is synced."""
    num_written = num_synced = num_acked = 0
    begun: dict[str, int] = {}
    sound = []
    for line in lines:
        pid, _, call = line.split(maxsplit=2)
        if call.startswith("pwrite64(") and wal in call:
            num_written += 1
        elif re.match("f(data)?sync", call) and wal in call:
            begun[pid] = num_written
        if re.search(r"f(data)?sync.*= 0$", call) and pid in begun:
            num_synced = begun.pop(pid)
        if '"HTTP/1.1 201' in call:
            sound.append(num_acked < num_written == num_synced)
            num_acked = num_written
    return sound
