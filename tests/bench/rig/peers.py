"""Other systems' ways to log feedback: their own servers, over SQLite on the same disk."""

import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from rig.processes import running, wait_until

from perennial.registry.server import mlflow_command

NUM_TARGETS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A server with things to give feedback on, and where its rows are."""

    port: int
    targets: tuple[str, ...]
    database: Path
    count: str  # the query that counts stored feedback

    def num_stored(self) -> int:
        """Rows of feedback."""
        return self.num(self.count)

    def num(self, query: str) -> int:
        """A number read from its file."""
        connection = sqlite3.connect(self.database)
        try:
            return int(connection.execute(query).fetchone()[0])
        finally:
            connection.close()


@contextmanager
def mlflow(folder: Path) -> Iterator[Peer]:
    """MLflow's tracking server with a few traces."""
    port = free_port()
    command = mlflow_command(folder, port)
    base = f"http://127.0.0.1:{port}"
    with running(command.argv, command.env, f"{base}/health", folder / "server.log"):
        traces = tuple(f"tr-{n:032x}" for n in range(NUM_TARGETS))
        for trace in traces:
            answer = httpx.post(f"{base}/api/3.0/mlflow/traces", json=_trace(trace), timeout=30)
            answer.raise_for_status()
        yield Peer(
            port=port,
            targets=traces,
            database=folder / "mlflow.db",
            count="SELECT count(*) FROM assessments",
        )


@contextmanager
def phoenix(folder: Path, python: Path) -> Iterator[Peer]:
    """Phoenix, from an environment of its own, with a few spans."""
    folder.mkdir(parents=True, exist_ok=True)
    port, grpc_port = free_port(), free_port()
    env = {
        "PHOENIX_WORKING_DIR": str(folder),
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(port),
        "PHOENIX_GRPC_PORT": str(grpc_port),
        "PHOENIX_TELEMETRY_ENABLED": "false",
    }
    base = f"http://127.0.0.1:{port}"
    argv = (str(python), "-m", "phoenix.server.main", "serve")
    with running(argv, env, f"{base}/healthz", folder / "server.log"):
        spans = tuple(f"{n:016x}" for n in range(1, NUM_TARGETS + 1))
        body = {"data": [_span(span) for span in spans]}
        httpx.post(f"{base}/v1/projects/default/spans", json=body, timeout=30).raise_for_status()
        peer = Peer(
            port=port,
            targets=spans,
            database=folder / "phoenix.db",
            count="SELECT count(*) FROM span_annotations",
        )
        wait_until(lambda: peer.num("SELECT count(*) FROM spans") == NUM_TARGETS)
        yield peer


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _trace(trace: str) -> dict[str, object]:
    location = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": "0"}}
    info = {
        "trace_id": trace,
        "trace_location": location,
        "request_time": "2026-05-01T12:00:00.000Z",
        "state": "OK",
    }
    return {"trace": {"trace_info": info}}


def _span(span: str) -> dict[str, object]:
    return {
        "name": "chat",
        "context": {"trace_id": f"{span}{span}", "span_id": span},
        "span_kind": "LLM",
        "start_time": "2026-05-01T12:00:00Z",
        "end_time": "2026-05-01T12:00:01Z",
        "status_code": "OK",
    }
