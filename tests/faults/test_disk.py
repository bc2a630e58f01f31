"""Disks that fail, fill up or may not be written: a 503 with Retry-After, never a false 2xx."""

import random
import shutil
from pathlib import Path

import pytest

from tests.faults.harness import Site, site, strace
from tests.faults.ledger import (
    Ledger,
    audit,
    load,
    replay,
    wait_for_promises,
    wait_for_refusals,
)

pytestmark = pytest.mark.slow

FAULTS = {
    "sync EIO": "inject=fsync,fdatasync:error=EIO",
    "write EIO": "inject=pwrite64:error=EIO",
    "write ENOSPC": "inject=pwrite64:error=ENOSPC",
    "write EROFS": "inject=pwrite64:error=EROFS",
}
NOW_AND_THEN = "inject=pwrite64:error=ENOSPC:when=50+101"


def _traced_files(folder: Path) -> list[str]:
    return [part for suffix in ("", "-wal") for part in ("-P", f"{folder}/p.db{suffix}")]


@pytest.mark.usefixtures("can_trace")
def test_failing_disk_is_a_503_and_no_promise_until_it_heals(here: Site, tmp_path: Path) -> None:
    ledger = Ledger()
    here.start()

    with load(here.port, ledger, "failing"):
        for fault in FAULTS.values():
            wait_for_promises(ledger, 20)
            with strace(here, *_traced_files(tmp_path), "-e", fault):
                wait_for_refusals(ledger, 8)
                num_promised = len(ledger.promised)
                wait_for_refusals(ledger, 16)
                assert len(ledger.promised) == num_promised, fault
        wait_for_promises(ledger, 20)
        here.kill()
        here.start()

    assert audit(ledger, here.url) == []
    assert replay(ledger, here.port, random.Random(3)) == []


@pytest.mark.usefixtures("can_trace")
def test_writes_that_fail_now_and_then_cost_only_their_own_requests(
    here: Site, tmp_path: Path
) -> None:
    ledger = Ledger()
    here.start()

    with load(here.port, ledger, "flaky"):
        with strace(here, *_traced_files(tmp_path), "-e", NOW_AND_THEN):
            wait_for_promises(ledger, 20)
            wait_for_refusals(ledger, 20)
        here.kill()
        here.start()

    assert audit(ledger, here.url) == []
    assert replay(ledger, here.port, random.Random(3)) == []


@pytest.mark.usefixtures("can_mount")
def test_full_disk_refuses_until_there_is_room(tmp_path: Path) -> None:
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    copy.mkdir()
    ledger = Ledger()
    with site(tmp_path, f"sqlite:///{disk}/p.db") as there:
        there.start("--mounts", f"mount -t tmpfs -o size=8m none {disk}")
        seen = Path(f"/proc/{there.pid}/root{disk}")

        with load(there.port, ledger, "full"):
            wait_for_promises(ledger, 20)
            _fill(seen / "ballast")
            wait_for_refusals(ledger, 20)
            (seen / "ballast").unlink()
            wait_for_promises(ledger, 20)

        assert replay(ledger, there.port, random.Random(3)) == []
        for file in seen.glob("p.db*"):
            shutil.copy(file, copy)
    assert audit(ledger, f"sqlite:///{copy}/p.db") == []


@pytest.mark.usefixtures("can_mount")
def test_read_only_folder_is_refused_at_the_start(here: Site, tmp_path: Path) -> None:
    ledger = Ledger()
    here.start()
    with load(here.port, ledger, "before"):
        wait_for_promises(ledger, 20)
    assert here.stop() == 0

    bind = f"mount --bind {tmp_path} {tmp_path}; mount -o remount,ro,bind {tmp_path}"
    here.launch("--mounts", bind)

    assert here.wait(20) == 1, here.log_text()
    assert f"{tmp_path}/p.db" in here.log_text().splitlines()[-1]
    assert audit(ledger, here.url) == []


def _fill(file: Path) -> None:
    try:
        with file.open("wb", buffering=0) as ballast:
            while True:
                ballast.write(b"x" * 4096)
    except OSError:
        pass  # full: that was the aim
