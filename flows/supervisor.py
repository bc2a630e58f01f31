"""Child processes of `perennial up`: started, waited for, restarted, stopped.

Knows nothing of what the children are; `services.py` lists them.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from perennial.infra.artifacts import write_atomic
from perennial.infra.errors import UnavailableError

log = logging.getLogger(__name__)

_POLL_S = 0.25
_STOP_S = 10.0
_MAX_BACKOFF_S = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One child process; `ready_url` answers 2xx once it is up, empty for what is no server."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(repr=False)
    ready_url: str = ""
    ready_s: float = 180.0


class Supervisor:
    """Keeps services running until `stop`; logs of each go to `<home>/logs/<name>.log`."""

    def __init__(self, home: Path, services: Sequence[Service]) -> None:
        self._home = home
        self._services = services
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._failures: dict[str, int] = {}
        self._restart_at: dict[str, float] = {}
        self._stopping = threading.Event()
        self._guard = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self, on_ready: Callable[[str], None] = lambda _: None) -> None:
        """Start the servers together, the other services when they are ready, and return.

        Raises:
            UnavailableError: a service did not become ready; the end of its log is quoted.
        """
        self._stop_leftovers()
        servers = [service for service in self._services if service.ready_url]
        for service in servers:
            self._launch(service)
        self._watcher.start()
        for service in servers:
            self._wait_ready(service)
            on_ready(service.name)
        for service in self._services:
            if service not in servers:
                self._launch(service)

    def stop(self) -> None:
        """Stop the services in reverse order: SIGTERM, and SIGKILL after ten seconds."""
        self._stopping.set()
        with self._guard:
            children = [self._children[s.name] for s in reversed(self._services)
                        if s.name in self._children]  # fmt: skip
        for child in children:
            _stop_tree(child.pid)
            child.wait()
        self._pid_file.unlink(missing_ok=True)

    def pid(self, name: str) -> int:
        """The process id of a service now."""
        with self._guard:
            return self._children[name].pid

    @property
    def _pid_file(self) -> Path:
        return self._home / "run" / "children.json"

    def _launch(self, service: Service) -> None:
        folder = self._home / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{service.name}.log").open("ab") as out, self._guard:
            if self._stopping.is_set():
                return
            self._children[service.name] = subprocess.Popen(
                service.argv,
                env=dict(service.env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone; we stop children in order
            )
            self._remember()

    def _remember(self) -> None:
        rows = [
            {"pid": child.pid, "created": _created(child.pid)} for child in self._children.values()
        ]
        write_atomic(self._pid_file, json.dumps(rows).encode())

    def _stop_leftovers(self) -> None:
        """Stop children of a supervisor that was killed: they would hold our ports."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            for row in json.loads(self._pid_file.read_bytes()):
                if row["created"] is not None and _created(row["pid"]) == row["created"]:
                    log.warning("stopping leftover process pid=%d", row["pid"])
                    _stop_tree(row["pid"])

    def _wait_ready(self, service: Service) -> None:
        deadline = time.monotonic() + service.ready_s
        while service.ready_url and not _answers(service.ready_url):
            if time.monotonic() > deadline or self._failures.get(service.name, 0) > 3:
                raise UnavailableError(
                    f"{service.name} did not become ready at {service.ready_url}; its log ends:\n"
                    + _tail(self._home / "logs" / f"{service.name}.log")
                )
            time.sleep(_POLL_S)

    def _watch(self) -> None:
        while not self._stopping.wait(_POLL_S):
            for service in self._services:
                self._revive(service)

    def _revive(self, service: Service) -> None:
        child = self._children.get(service.name)
        code = None if child is None else child.poll()
        if code is None:
            return
        due = self._restart_at.get(service.name)
        if due is None:
            log.warning("service died name=%s code=%d", service.name, code)
            self._put_off(service)
        elif time.monotonic() >= due:
            self._restart(service)

    def _restart(self, service: Service) -> None:
        try:
            self._launch(service)
        except OSError as error:  # on a full disk neither logs nor pids can be written
            log.warning("service not started name=%s error=%s", service.name, error)
            self._put_off(service)
        else:
            del self._restart_at[service.name]

    def _put_off(self, service: Service) -> None:
        failures = self._failures[service.name] = self._failures.get(service.name, 0) + 1
        pause = min(0.5 * 2 ** min(failures - 1, 10), _MAX_BACKOFF_S)  # a float holds no 2 ** 1024
        self._restart_at[service.name] = time.monotonic() + pause
        log.warning("service waits name=%s restart_s=%.1f", service.name, pause)


def _stop_tree(pid: int) -> None:
    """SIGTERM to a process, SIGKILL to whatever of its tree is left after ten seconds."""
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
        parent.send_signal(signal.SIGTERM)
    except psutil.NoSuchProcess:
        return
    _, alive = psutil.wait_procs(tree, timeout=_STOP_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _created(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _tail(path: Path, num_bytes: int = 2000) -> str:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - num_bytes))
        return file.read().decode(errors="replace")
