"""`perennial up`: everything on this machine, until Ctrl-C."""

import threading

import click
from rich.console import Console
from rich.table import Table

from perennial.flows.services import services
from perennial.flows.supervisor import Supervisor
from perennial.infra.locks import hold
from perennial.infra.migrate import upgrade
from perennial.infra.settings import Settings


def run_up(settings: Settings) -> None:
    """Start the services of `settings`, show where they answer, and wait.

    Raises:
        UnavailableError: `perennial up` is running for the same home already, or a service did not
            become ready.
    """
    with hold(settings.home / "run" / "up.lock", timeout_s=0):
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
    for name, url, _ in addresses(settings):
        table.add_row(name, url)
    return table


def addresses(settings: Settings) -> tuple[tuple[str, str, str], ...]:
    """What answers where, and the URL that tells whether it is up."""
    api, mlflow, prefect = settings.api_url, settings.mlflow_url, settings.prefect_url
    return (
        ("chat (OpenAI-compatible)", f"{api}/v1", f"{api}/readyz"),
        ("feedback API", f"{api}/v1/feedback", f"{api}/readyz"),
        ("MLflow", mlflow, f"{mlflow}/health"),
        ("Prefect", prefect.removesuffix("/api"), f"{prefect}/health"),
    )
