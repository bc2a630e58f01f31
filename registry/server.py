"""How an MLflow server is started on this machine, as a command line and an environment.

`mlflow server` starts a parent that imports everything, migrates, and spawns uvicorn, which imports
everything again: nine seconds until the first answer, and a child that outlives a killed parent.
The same ASGI app under uvicorn itself is one process and answers in four. Starting and watching it
is left to flows.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerCommand:
    """A command line and the variables that it needs besides the inherited ones."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def mlflow_command(folder: Path, port: int) -> ServerCommand:
    """Tracking, registry and artefacts under `folder`, on loopback, one process, jobs off.

    Creates the folder: SQLite does not create the one its file lies in.
    """
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    argv = (
        sys.executable, "-m", "uvicorn", "mlflow.server.fastapi_app:app",
        "--host", HOST, "--port", str(port), "--workers", "1",
        "--log-level", "warning", "--no-access-log", "--timeout-graceful-shutdown", "3",
    )  # fmt: skip
    return ServerCommand(argv=argv, env=_environment(folder.resolve(), port))


def client_environment() -> dict[str, str]:
    """Variables for every process that uses `MlflowStore`: give up soon, the caller tries again.

    MLflow's own defaults retry for minutes while a round's lease runs out.
    """
    return {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "DO_NOT_TRACK": "true",
    }


def _environment(folder: Path, port: int) -> dict[str, str]:
    store = f"sqlite:///{folder / 'mlflow.db'}"
    return {
        # What `mlflow server` hands to the process it spawns (mlflow/server/constants.py).
        "_MLFLOW_SERVER_FILE_STORE": store,
        "_MLFLOW_SERVER_REGISTRY_STORE": store,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SGI_NAME": "uvicorn",
        "_MLFLOW_IN_JOB_EXECUTOR": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:{port},localhost:{port}",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
        "MLFLOW_SERVER_X_FRAME_OPTIONS": "DENY",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
