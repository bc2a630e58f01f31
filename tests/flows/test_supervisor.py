import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from socket import socket

import psutil
import pytest

from perennial.flows.supervisor import Service, Supervisor
from perennial.infra.errors import UnavailableError

SERVER = (
    "import http.server, sys; http.server.test(http.server.SimpleHTTPRequestHandler, "
    "port=int(sys.argv[1]), bind='127.0.0.1')"
)


def _wait(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        pause.wait(0.05)


@pytest.fixture
def port() -> int:
    with contextlib.closing(socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _web(port: int) -> Service:
    return Service(
        name="web",
        argv=(sys.executable, "-c", SERVER, str(port)),
        env=os.environ,
        ready_url=f"http://127.0.0.1:{port}/",
        ready_s=20,
    )


@pytest.fixture
def supervisor(tmp_path: Path, port: int) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path, [_web(port)])
    yield supervisor
    supervisor.stop()


def _answers(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_killed_child_is_restarted(supervisor: Supervisor, port: int) -> None:
    supervisor.start()
    first = supervisor.pid("web")

    os.kill(first, signal.SIGKILL)

    _wait(lambda: supervisor.pid("web") != first and _answers(port))


@pytest.mark.parametrize("folder", ["logs", "run"])
def test_child_is_restarted_once_the_disk_takes_files_again(
    supervisor: Supervisor, port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, folder: str
) -> None:
    supervisor.start()
    taken = (tmp_path / folder).rename(tmp_path / "away")
    (tmp_path / folder).touch()  # a file in its place: nothing can be written there
    os.kill(supervisor.pid("web"), signal.SIGKILL)
    _wait(lambda: "service not started name=web" in caplog.text)

    (tmp_path / folder).unlink()
    taken.rename(tmp_path / folder)
    last = supervisor.pid("web")
    with contextlib.suppress(ProcessLookupError):  # it runs where only its pid was not written
        os.kill(last, signal.SIGKILL)

    _wait(lambda: supervisor.pid("web") != last and _answers(port))


def test_stop_leaves_no_process(supervisor: Supervisor) -> None:
    supervisor.start()
    pid = supervisor.pid("web")

    supervisor.stop()

    assert not psutil.pid_exists(pid)


def test_child_of_a_killed_supervisor_is_stopped_by_the_next(tmp_path: Path, port: int) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from perennial.flows.supervisor import Service, Supervisor\n"
        f"service = Service(name='web', argv=(sys.executable, '-c', {SERVER!r}, '{port}'),"
        f" env=os.environ, ready_url='http://127.0.0.1:{port}/')\n"
        "Supervisor(Path(sys.argv[1]), [service]).start()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert _answers(port)

    second = Supervisor(tmp_path, [_web(port)])
    second.start()
    try:
        assert _answers(port)
    finally:
        second.stop()
    assert not _answers(port)


def test_service_that_never_gets_ready_quotes_its_log(tmp_path: Path, port: int) -> None:
    service = Service(
        name="broken",
        argv=(sys.executable, "-c", "raise SystemExit('no such model')"),
        env=os.environ,
        ready_url=f"http://127.0.0.1:{port}/",
        ready_s=2,
    )
    supervisor = Supervisor(tmp_path, [service])
    try:
        with pytest.raises(UnavailableError, match="no such model"):
            supervisor.start()
    finally:
        supervisor.stop()
