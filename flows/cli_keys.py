"""`perennial keys`: create, list and revoke the API keys of apps."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import click
from rich.console import Console
from rich.table import Table

from perennial.feedback.keys import KeyStore, Scope
from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.migrate import upgrade
from perennial.infra.settings import Settings


def create_key(settings: Settings, tenant: str, scopes: tuple[str, ...], days: int | None) -> None:
    """Print a new key; it is shown this once."""
    expires_at = utc_now() + timedelta(days=days) if days else None
    with _keys(settings) as keys:
        issued = keys.issue(tenant, frozenset(Scope(scope) for scope in scopes), expires_at)
    click.echo(issued.text)
    click.echo(f"id {issued.key.id}; keep the key, it cannot be shown again", err=True)


def list_keys(settings: Settings) -> None:
    """Print every key without its secret."""
    table = Table("id", "tenant", "scopes", "created", "expires", "revoked", box=None)
    with _keys(settings) as keys:
        for key in keys.list_keys():
            times = (key.created_at, key.expires_at, key.revoked_at)
            shown = (at.astimezone().strftime("%Y-%m-%d %H:%M") if at else "" for at in times)
            table.add_row(key.id, key.tenant, " ".join(sorted(key.scopes)), *shown)
    Console().print(table)


def revoke_key(settings: Settings, key_id: str) -> None:
    """Revoke a key; requests with it are refused from now on."""
    with _keys(settings) as keys:
        keys.revoke(key_id)
    click.echo(f"{key_id} is revoked")


@contextmanager
def _keys(settings: Settings) -> Iterator[KeyStore]:
    upgrade(settings.resolved_database_url)
    database = Database(settings.resolved_database_url)
    try:
        yield KeyStore(database, utc_now)
    finally:
        database.dispose()
