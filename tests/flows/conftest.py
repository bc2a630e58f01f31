"""One real Prefect server and the tiny model for all tests of the loop."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket

import httpx
import pytest

from perennial.flows.services import services
from perennial.infra.settings import PREFIX, Settings, load_settings
from tests.flows import loop


def free_port() -> int:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(kw_only=True)
class Server:
    """A service of `perennial up`, alone."""

    name: str
    home: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self, settings: Settings | None = None) -> None:
        """Start it, under `settings` or alone in `home` at `port`, and wait until it answers."""
        settings = settings or load_settings(
            {
                "PERENNIAL_HOME": str(self.home),
                f"PERENNIAL_{self.name.upper()}__PORT": str(self.port),
            }
        )
        service = next(s for s in services(settings) if s.name == self.name)
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                service.argv, env=dict(service.env), stdout=log, stderr=log
            )
        deadline = time.monotonic() + 120
        while not _answers(service.ready_url):
            assert time.monotonic() < deadline, f"{self.name} did not start"
            assert self.process.poll() is None, (self.home / f"{self.name}.log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(autouse=True)
def _settings_of_one_test() -> Iterator[None]:
    """A command exports its settings: the next test starts without them."""
    before = _ours()
    yield
    for name in _ours():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(name="prefect", home=tmp_path_factory.mktemp("prefect"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[Server]:
    server = Server(name="mlflow", home=tmp_path / "mlflow-server")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loop.save_parrot(tmp_path_factory.mktemp("parrot"))


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2, trust_env=False).is_success
    return False


def _ours() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
