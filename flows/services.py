"""The processes of `perennial up`: gateway + feedback API, MLflow, Prefect and a worker."""

import sys
from collections.abc import Callable

from perennial.flows.supervisor import Service
from perennial.infra.settings import Settings, child_environment


def services(settings: Settings) -> tuple[Service, ...]:
    """What runs on this machine; a server that is set by URL runs elsewhere and is left out."""
    makers: list[Callable[[Settings], Service]] = []
    if not settings.prefect.api_url:
        makers.append(_prefect)
    if not settings.mlflow.uri:
        makers.append(_mlflow)
    return tuple(make(settings) for make in (*makers, _api, _worker))


def _api(settings: Settings) -> Service:
    return Service(
        name="api",
        argv=(sys.executable, "-m", "perennial.flows.cli", "serve"),
        env=child_environment(settings, {}),
        ready_url=f"{settings.api_url}/readyz",
    )


def _worker(settings: Settings) -> Service:
    return Service(
        name="worker",
        argv=(sys.executable, "-m", "perennial.flows.cli", "worker"),
        env=child_environment(settings, {"PREFECT_HOME": str(settings.home / "prefect")}),
    )


def _prefect(settings: Settings) -> Service:
    home = settings.home / "prefect"
    extra = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    return Service(
        name="prefect",
        argv=(sys.executable, "-m", "prefect", "server", "start",
              "--host", "127.0.0.1", "--port", str(settings.prefect.port)),
        env=child_environment(settings, extra),
        ready_url=f"{settings.prefect_url}/health",
    )  # fmt: skip


def _mlflow(settings: Settings) -> Service:
    # Imported here so that listing services does not need the registry's server options.
    from perennial.registry.server import mlflow_command

    command = mlflow_command(settings.home / "mlflow", settings.mlflow.port)
    return Service(
        name="mlflow",
        argv=command.argv,
        env=child_environment(settings, command.env),
        ready_url=f"{settings.mlflow_url}/health",
    )
