"""Servers and the load generator as processes: started, watched, stopped."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from rig.load import Phase, Plan

_HERE = Path(__file__).parent
_READY_S = 120.0
_STOP_S = 15.0
_SAMPLE_S = 0.25
_MARKERS_OF_A_RUN = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A server of ours that answers."""

    pid: int
    port: int
    url: str  # of its database
    key: str


@contextmanager
def serve(url: str, *arguments: str, script: str = "server.py") -> Iterator[Served]:
    """The server under test or another over the database at `url`; SIGTERM when the block ends."""
    argv = [sys.executable, str(_HERE / script), url, *arguments]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            said = json.loads(child.stdout.readline())
            served = Served(pid=child.pid, port=said["port"], url=url, key=said["key"])
            wait_ready(f"http://127.0.0.1:{served.port}/readyz", child)
            yield served
        finally:
            stop(child)


@contextmanager
def running(
    argv: Sequence[str], env: Mapping[str, str], ready_url: str, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Another server, from when `ready_url` answers."""
    with log.open("wb") as out:
        child = subprocess.Popen(
            argv, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            wait_ready(ready_url, child)
            yield child
        finally:
            stop(child)


def wait_ready(url: str, child: subprocess.Popen[Any]) -> None:
    """Return when `url` answers 2xx; raises RuntimeError when the child ended or time is up."""

    def is_ready() -> bool:
        if child.poll() is not None:
            raise RuntimeError(f"the server at {url} ended with status {child.poll()}")
        try:
            return httpx.get(url, timeout=2, trust_env=False).is_success
        except httpx.HTTPError:
            return False  # not listening yet

    wait_until(is_ready)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Return when it is so; raises RuntimeError when time is up."""
    deadline = time.monotonic() + _READY_S
    while not is_so():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {_READY_S:.0f} s in vain")
        time.sleep(0.1)


def stop(child: subprocess.Popen[Any]) -> None:
    """SIGTERM, and SIGKILL if that is not enough, to the child and what it started."""
    try:
        tree = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    child.terminate()
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
    for process in psutil.wait_procs(tree, timeout=1)[1]:
        process.kill()


class Generator:
    """Runs the load generator; keeps where its ledgers are, its CPU time and all statuses seen."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_runs = 0
        self.ledgers: list[Path] = []
        self.cpu_us: list[float] = []
        self.statuses: Counter[str] = Counter()

    def run(
        self,
        port: int,
        templates: Sequence[str],
        phases: Sequence[Phase],
        num_connections: int,
        max_connections: int = 0,
    ) -> dict[str, Any]:
        """What load.py says of the phases."""
        self._num_runs += 1
        ledger = self._folder / f"{self._num_runs}.ledger"
        plan = Plan(
            port=port,
            templates=tuple(templates),
            phases=tuple(phases),
            num_connections=num_connections,
            max_connections=max(num_connections, max_connections),
            first=self._num_runs * _MARKERS_OF_A_RUN,
            ledger=str(ledger),
        )
        child = subprocess.run(
            [sys.executable, str(_HERE / "load.py")],
            input=json.dumps(asdict(plan)),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        self.ledgers.append(ledger)
        said: dict[str, Any] = json.loads(child.stdout)
        self.cpu_us.append(said["cpu_us"])
        self.statuses.update(said["statuses"])
        return said

    @property
    def num_acked(self) -> int:
        """Requests answered with 2xx."""
        return sum(num for code, num in self.statuses.items() if code.startswith("2"))

    def closed(
        self, port: int, templates: Sequence[str], num_clients: int, seconds: float, warmup_s: float
    ) -> dict[str, Any]:
        """The one phase of a closed loop."""
        phase = Phase(seconds=seconds + warmup_s, num_clients=num_clients, warmup_s=warmup_s)
        found: dict[str, Any] = self.run(port, templates, [phase], num_clients)["phases"][0]
        return found


class Watch:
    """Samples a process while the block runs: its largest resident set, its CPU time."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.start_rss_mib = self.max_rss_mib = self._rss_mib()
        self._start_cpu_s = self._cpu_s()
        self.cpu_s = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self.cpu_s = self._cpu_s() - self._start_cpu_s

    def _sample(self) -> None:
        while not self._stopping.wait(_SAMPLE_S):
            self.max_rss_mib = max(self.max_rss_mib, self._rss_mib())

    def _rss_mib(self) -> float:
        return float(self._process.memory_info().rss) / (1 << 20)

    def _cpu_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def temporary_folder(parent: Path) -> Path:
    """A new folder on the disk of `parent`, open to the account that PostgreSQL runs as."""
    folder = Path(tempfile.mkdtemp(prefix="perennial-ingest-", dir=parent))
    folder.chmod(0o755)
    return folder
