"""Processes that are killed, exit, fork or meet a full disk with items in their spool."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from perennial_client import BackgroundSender

from tests.client.site import Site

pytestmark = pytest.mark.slow

MakeSender = Callable[..., BackgroundSender]
PRELUDE = """
import os, resource, signal, sys
from pathlib import Path
from perennial_client import *

url, spool = sys.argv[1], Path(sys.argv[2])

def sender(**spooling):
    how = Spooling(max_batch_wait_s=60, **spooling)
    return BackgroundSender(url, spool_dir=spool, spooling=how)

def said(text):
    return feedback("int_1", comment(text))
"""
KILLED = """
keeper = sender(durability=sys.argv[3], max_batch_items=7)
for index in range(1_000_000):
    keeper.enqueue(said(f"{index:06d}"))
    print(f"{index:06d}", flush=True)
"""
EXITS = """
sender().enqueue(said("last words"))
"""
FORKS = """
parent = sender()
parent.enqueue(said("before"))
child = os.fork()
parent.enqueue(said("child" if child == 0 else "parent"))
assert parent.flush()
if child == 0:
    assert parent.counts().num_delivered == 1
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert parent.counts().num_delivered == 2
"""
DIES_BEFORE_ITS_CHILD = """
keeper = sender()
keeper.enqueue(said("orphan"))
if os.fork() > 0:
    os.kill(os.getpid(), signal.SIGKILL)
print("on my own", flush=True)
sys.stdin.read()
os._exit(0)
"""
FULL_DISK = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.RLIM_INFINITY))
keeper = sender()
index = 0
while True:
    try:
        keeper.enqueue(said(f"{index:06d}"))
    except OSError:
        break
    print(f"{index:06d}", flush=True)
    index += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
keeper.enqueue(said("room again"))
print("room again", flush=True)
"""


@pytest.fixture
def start(environment: dict[str, str], spool_dir: Path) -> Callable[..., "subprocess.Popen[str]"]:
    def start(site: Site, script: str, *args: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", PRELUDE + script, site.url, str(spool_dir), *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    return start


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.mark.parametrize("durability", ["process", "disk"])
def test_killed_process_has_kept_every_enqueued_item(
    down: Site, make_sender: MakeSender, start: Start, durability: str
) -> None:
    with start(down, KILLED, durability) as process:
        assert process.stdout is not None
        promised = [process.stdout.readline().strip() for _ in range(200)]
        process.kill()
        promised += process.stdout.read().split("\n")[:-1]

    down.start()
    try:
        assert make_sender(down).flush()
    finally:
        down.stop()

    stored = down.comments()
    assert len(promised) >= 200
    assert stored[: len(promised)] == promised
    assert len(stored) <= len(promised) + 1  # one may have been kept but not promised


def test_process_killed_while_it_delivers_leaves_nothing_out_and_nothing_twice(
    site: Site, make_sender: MakeSender, start: Start
) -> None:
    with start(site, KILLED, "process") as process:
        assert process.stdout is not None
        promised = [process.stdout.readline().strip() for _ in range(300)]
        process.kill()
        promised += process.stdout.read().split("\n")[:-1]

    assert make_sender(site).flush()

    stored = site.comments()
    assert stored[: len(promised)] == promised
    assert len(stored) <= len(promised) + 1


def test_process_that_just_ends_has_delivered(site: Site, start: Start) -> None:
    with start(site, EXITS) as process:
        assert process.wait(30) == 0

    assert site.comments() == ["last words"]


def test_process_that_just_ends_does_not_hang_on_a_server_that_is_down(
    down: Site, start: Start, spool_dir: Path
) -> None:
    with start(down, EXITS) as process:
        assert process.wait(30) == 0

    assert [path.read_text().count("last words") for path in spool_dir.iterdir()] == [1]


def test_forked_child_sends_its_own_items_and_the_parent_its_own(site: Site, start: Start) -> None:
    with start(site, FORKS) as process:
        assert process.wait(30) == 0

    assert site.comments() == ["before", "child", "parent"]


def test_living_child_does_not_hold_what_its_dead_parent_left(
    down: Site, make_sender: MakeSender, start: Start
) -> None:
    with start(down, DIES_BEFORE_ITS_CHILD) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on my own\n"
        process.wait(30)
        down.start()
        try:
            assert make_sender(down).flush()
        finally:
            down.stop()

    assert down.comments() == ["orphan"]


def test_full_disk_is_the_callers_to_know_and_costs_nobody_else(site: Site, start: Start) -> None:
    with start(site, FULL_DISK) as process:
        promised = process.communicate(timeout=30)[0].splitlines()
        assert process.returncode == 0

    assert len(promised) > 2
    assert site.comments() == promised
