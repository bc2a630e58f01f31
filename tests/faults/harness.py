"""Starts, kills and traces the server under test."""

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from tests.faults import server
from tests.faults.wire import Wire


def until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    """Return as soon as `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(kw_only=True)
class Site:
    """One database, and one port at which a server for it comes and goes."""

    url: str
    log: Path
    port: int = field(default_factory=free_port)
    process: ForkServerProcess | None = None

    def launch(self, *options: str) -> None:
        """Start a server without waiting for it."""
        args = (self.url, self.port, self.log, options)
        self.process = _nursery().Process(target=server.main, args=args, daemon=True)
        self.process.start()

    def start(self, *options: str) -> None:
        """Start a server and wait until it answers."""
        self.launch(*options)
        until(lambda: self.answers() or self.has_ended())
        assert not self.has_ended(), self.log_text()

    @property
    def pid(self) -> int:
        assert self.process is not None
        assert self.process.pid is not None
        return self.process.pid

    def has_ended(self) -> bool:
        return self.process is None or self.process.exitcode is not None

    def answers(self) -> bool:
        with contextlib.suppress(OSError), Wire(self.port, 5) as wire:
            return wire.get("/readyz").status == 200
        return False

    def wait(self, timeout_s: float = 60) -> int | None:
        """The exit status, negative for a signal; None while it lives on."""
        assert self.process is not None
        self.process.join(timeout_s)
        return self.process.exitcode

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.wait()

    def stop(self) -> int | None:
        """Ask the server to end; its exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def log_text(self) -> str:
        return self.log.read_text()[-4000:]


@functools.cache
def _nursery() -> ForkServerContext:
    """Processes from it have their imports behind them: a start costs 0.1 s instead of 2."""
    nursery = multiprocessing.get_context("forkserver")
    nursery.set_forkserver_preload([server.__name__])
    return nursery


@contextlib.contextmanager
def site(folder: Path, url: str | None = None) -> Iterator[Site]:
    """A site in `folder`, SQLite unless `url` says otherwise; its server is killed at the end."""
    there = Site(url=url or f"sqlite:///{folder}/p.db", log=folder / "server.log")
    try:
        yield there
    finally:
        if there.process is not None:
            there.kill()


@contextlib.contextmanager
def strace(site: Site, *options: str) -> Iterator[Path]:
    """Trace the server while the block runs; the file of what was seen, complete afterwards."""
    output = site.log.with_suffix(".strace")
    command = ["strace", "-f", "-ttt", "-y", "-s", "100", "-o", str(output)]
    tracer = subprocess.Popen(
        [*command, "-p", str(site.pid), *options], stderr=subprocess.PIPE, text=True
    )
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    assert "attached" in said, said
    try:
        yield output
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate()


@functools.cache
def reason_not_to_trace() -> str | None:
    """Why faults cannot be injected here, or None when they can."""
    if shutil.which("strace") is None:
        return "NO STRACE: install it to inject faults"
    with subprocess.Popen(["sleep", "60"]) as victim:
        command = ["strace", "-p", str(victim.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            said = tracer.stderr.readline()
            victim.kill()
    return None if "attached" in said else f"NO PTRACE: {said.strip()}"


@functools.cache
def reason_not_to_mount() -> str | None:
    """Why file systems cannot be mounted here, or None when they can."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "NO MOUNTS: install unshare"
    return f"NO MOUNTS: {tried.stderr.strip()}" if tried.returncode else None
