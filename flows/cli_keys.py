"""`perennial keys`: create, list, rotate and revoke the API keys of apps.

A new key goes to standard output, alone, so that a shell can catch it; what a person should know
goes to standard error. With `--json` everything is one JSON value on standard output.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

import click
from rich.console import Console
from rich.table import Table

from perennial.feedback.keys import ApiKey, IssuedKey, KeyStore, Scope
from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.errors import InputError
from perennial.infra.migrate import upgrade
from perennial.infra.settings import Settings

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_SEEN_AFTER = "running services follow within a minute"


def create_key(
    settings: Settings,
    tenant: str,
    scopes: tuple[str, ...],
    expires_in: str | None,
    as_json: bool,
) -> None:
    """Print a new key; it is shown this once."""
    lifetime = _lifetime(expires_in)
    with _keys(settings) as keys:
        issued = keys.issue(tenant, frozenset(map(Scope, scopes)), lifetime)
    if as_json:
        click.echo(json.dumps(_issued_values(issued)))
        return
    click.echo(issued.text)
    click.echo(f"{_described(issued.key)}\nkeep the key: it cannot be shown again", err=True)


def list_keys(settings: Settings, as_json: bool) -> None:
    """Print every key without its secret."""
    with _keys(settings) as keys:
        listed = keys.list_keys()
    if as_json:
        click.echo(json.dumps([_values(key) for key in listed]))
        return
    table = Table("id", "tenant", "scopes", "state", "created", "ends", box=None)
    table.columns[0].no_wrap = True
    for key in listed:
        scopes, ends = " ".join(sorted(key.scopes)), key.revoked_at or key.expires_at
        state = key.state_at(utc_now())
        table.add_row(key.id, key.tenant, scopes, state, _shown(key.created_at), _shown(ends))
    Console().print(table)


def rotate_key(
    settings: Settings, key_id: str, overlap: str, expires_in: str | None, as_json: bool
) -> None:
    """Print a key that replaces another, which goes on working for `overlap`."""
    wait, lifetime = parse_duration("--overlap", overlap), _lifetime(expires_in)
    with _keys(settings) as keys:
        rotation = keys.rotate(key_id, wait, lifetime)
    issued, old = rotation.issued, rotation.old
    if as_json:
        click.echo(json.dumps({**_issued_values(issued), "replaces": _values(old)}))
        return
    click.echo(issued.text)
    click.echo(f"{_described(issued.key)}\nkeep the key: it cannot be shown again", err=True)
    click.echo(f"{old.id} works until {_shown(old.expires_at)}; {_SEEN_AFTER}", err=True)


def revoke_key(settings: Settings, key_id: str, as_json: bool) -> None:
    """Revoke a key; requests with it are refused within a minute."""
    with _keys(settings) as keys:
        key = keys.revoke(key_id)
    text = f"{key.id} of {key.tenant} is revoked; {_SEEN_AFTER}"
    click.echo(json.dumps(_values(key)) if as_json else text)


def parse_duration(name: str, text: str) -> timedelta:
    """`text` such as 90s, 30m, 24h or 7d; `name` is what an InputError calls it."""
    found = re.fullmatch(r"([0-9]{1,5})([smhd])", text)
    if found is None:
        raise InputError(f"{name} must be a number and one of s m h d, such as 24h; got {text!r}")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _lifetime(expires_in: str | None) -> timedelta | None:
    return None if expires_in is None else parse_duration("--expires-in", expires_in)


@contextmanager
def _keys(settings: Settings) -> Iterator[KeyStore]:
    upgrade(settings.resolved_database_url)
    database = Database(settings.resolved_database_url)
    try:
        yield KeyStore(database, utc_now)
    finally:
        database.dispose()


def _described(key: ApiKey) -> str:
    ends = f"expires {_shown(key.expires_at)}" if key.expires_at else "never expires"
    return f"id {key.id}, tenant {key.tenant}, scopes {' '.join(sorted(key.scopes))}, {ends}"


def _shown(at: datetime | None) -> str:
    return at.astimezone().strftime("%Y-%m-%d %H:%M") if at else ""


def _issued_values(issued: IssuedKey) -> dict[str, object]:
    return {"key": issued.text, **_values(issued.key)}


def _values(key: ApiKey) -> dict[str, object]:
    times = ("created_at", "expires_at", "revoked_at")
    return {
        "id": key.id,
        "tenant": key.tenant,
        "scopes": sorted(key.scopes),
        "state": key.state_at(utc_now()),
        **{name: at.isoformat() if (at := getattr(key, name)) else None for name in times},
    }
