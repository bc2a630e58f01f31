"""`perennial up`: everything on this machine, until Ctrl-C."""

import threading

import click
from rich.console import Console
from rich.table import Table

from perennial.flows.services import services
from perennial.flows.supervisor import Supervisor, exclusive
from perennial.infra.migrate import upgrade
from perennial.infra.settings import Settings


def run_up(settings: Settings) -> None:
    """Start the services of `settings`, show where they answer, and wait.

    Raises:
        ConflictError: `perennial up` is running for the same home already.
        UnavailableError: a service did not become ready.
    """
    with exclusive(settings.home / "run" / "up.lock"):
        upgrade(settings.resolved_database_url)
        supervisor = Supervisor(settings.home, services(settings))
        try:
            supervisor.start(lambda name: click.echo(f"{name} is ready"))
            Console().print(urls(settings))
            click.echo(f"logs are in {settings.home / 'logs'}; Ctrl-C stops everything")
            threading.Event().wait()
        finally:
            click.echo("stopping")
            supervisor.stop()


def urls(settings: Settings) -> Table:
    """Where everything answers."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, url in (
        ("chat (OpenAI-compatible)", f"{settings.api_url}/v1"),
        ("feedback API", f"{settings.api_url}/v1/feedback"),
        ("MLflow", settings.mlflow_url),
        ("Prefect", settings.prefect_url.removesuffix("/api")),
    ):
        table.add_row(name, url)
    return table
