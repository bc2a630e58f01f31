"""What the registry's tests arrange: a clock, registered versions, suites, an MLflow server."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
from safetensors.numpy import save_file

from perennial.infra.artifacts import publish
from perennial.infra.db import Database
from perennial.registry.approvals import Approvals
from perennial.registry.champion import ChampionStore, Change, Outbox
from perennial.registry.gate import GateEvidence, RowScore, Suite, SuiteKind
from perennial.registry.rounds import Ledger
from perennial.registry.server import mlflow_command
from perennial.registry.version_store import Member, VersionStore
from perennial.registry.versions import ModelVersion, NewVersion

START = datetime(2026, 5, 1, 12, tzinfo=UTC)
HEX = "0123456789abcdef"


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def move(self, seconds: float) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now


class World:
    """All stores over one database."""

    def __init__(self, database: Database, clock: Clock, folder: Path) -> None:
        self.database = database
        self.clock = clock
        self.folder = folder
        self.ledger = Ledger(database, clock)
        self.versions = VersionStore(database, clock)
        self.champions = ChampionStore(database, clock)
        self.approvals = Approvals(database, clock)
        self.outbox = Outbox(database, clock)

    def version(
        self,
        seed: int = 1,
        *,
        task: str = "support",
        parent: str | None = None,
        members: Sequence[Member] = (),
        is_approved: bool = True,
    ) -> ModelVersion:
        """A registered version with a small real adapter folder."""
        round_id = self.ledger.open_round(task, "test", f"{seed:064d}").id
        path = self.folder / f"adapter-{task}-{seed}"
        manifest = publish(path, lambda folder: write_adapter(folder, seed))
        new = NewVersion(
            task=task,
            adapter_digest=manifest.digest,
            adapter_path=path,
            base_digest="b" * 64,
            round_id=round_id,
            parent=parent,
            dataset_digest="d" * 64,
        )
        version = self.versions.register(new, members)
        return self.versions.approve(version.name) if is_approved else version

    def promote(
        self, version: str, expected: str | None = None, *, task: str = "support"
    ) -> Change:
        """Promote under a decision id of its own."""
        return self.champions.promote(
            task,
            version,
            decision_id=f"promote-{version}",
            expected=expected,
            decided_by="test",
            evidence_digest="e" * 64,
            reasons=("better",),
        )


class MlflowServer:
    """A real server from our own command line, on a free port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start_up_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = mlflow_command(self.folder, self.port)
        began = time.monotonic()
        with (self.folder / "server.log").open("ab") as file:
            self._process = subprocess.Popen(
                command.argv, env={**os.environ, **command.env}, stdout=file, stderr=file
            )
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() - began < 120, "MLflow did not start"
        self.start_up_s = time.monotonic() - began

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            urlopen(f"{self.uri}/health", timeout=5).close()
        except (URLError, TimeoutError, ConnectionError):
            time.sleep(0.05)
            return False
        return True


def write_adapter(folder: Path, seed: int) -> None:
    """Files of the layout that training makes."""
    weight = np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32)
    save_file({"lora_A.weight": weight}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 4}')


def suite(
    champion: Sequence[float | None],
    candidate: Sequence[float | None],
    *,
    name: str = "target",
    kind: SuiteKind = SuiteKind.TARGET,
    clusters: Sequence[str] | None = None,
) -> Suite:
    """A suite of numbered rows, each its own cluster unless told."""
    clusters = clusters or [f"c{i}" for i in range(len(candidate))]

    def rows(scores: Sequence[float | None]) -> tuple[RowScore, ...]:
        return tuple(
            RowScore(row_id=f"r{i}", cluster=clusters[i % len(clusters)], score=score)
            for i, score in enumerate(scores)
        )

    return Suite(name=name, kind=kind, candidate=rows(candidate), champion=rows(champion))


def evidence(*suites: Suite, attempt: int = 1, champion_now: str | None = None) -> GateEvidence:
    """Evidence against the base model."""
    return GateEvidence(
        task="support",
        candidate="support-v1-0a1b2c3d",
        champion=None,
        champion_now=champion_now,
        suites=suites,
        attempt=attempt,
    )
