import sqlite3
from datetime import timedelta
from pathlib import Path

import pytest

from perennial.feedback.keys import KeyStore, Scope, open_access
from perennial.infra.errors import AuthError, InputError, NotFoundError

READ = frozenset({Scope.READ})


def test_issued_key_stands_for_its_tenant_and_scopes(keys: KeyStore) -> None:
    issued = keys.issue("acme", READ)

    principal = keys.authenticate(issued.text)

    assert (principal.tenant, principal.scopes) == ("acme", READ)
    assert principal.key_id == issued.key.id
    assert issued.text.startswith(f"pnl_{issued.key.id}_")


def test_secret_is_neither_stored_nor_shown(keys: KeyStore, tmp_path: Path) -> None:
    issued = keys.issue("acme", READ)
    secret = issued.text.split("_", 2)[2]

    with sqlite3.connect(tmp_path / "p.db") as connection:
        dump = "\n".join(connection.iterdump())
    connection.close()

    assert issued.key.id in dump
    assert secret not in dump
    assert secret not in repr(issued)


def test_wrong_keys_are_all_refused_in_the_same_words(keys: KeyStore) -> None:
    text = keys.issue("acme", READ).text
    wrong = [
        None,
        "",
        "pnl",
        text[:-1],
        text + "x",
        text.upper(),
        "pnl_\0_x",
        "pnl_é_x",
        "x" * 9999,
    ]

    said = set()
    for attempt in [*wrong, "pnl_0000000000000000_" + "a" * 43, text.replace("pnl", "sk")]:
        with pytest.raises(AuthError) as caught:
            keys.authenticate(attempt)
        said.add(str(caught.value))

    assert len(said) == 1


def test_revoked_key_ends_at_once(keys: KeyStore) -> None:
    issued = keys.issue("acme", READ)
    keys.revoke(issued.key.id)
    first = keys.list_keys()[0].revoked_at

    keys.revoke(issued.key.id)

    with pytest.raises(AuthError):
        keys.authenticate(issued.text)
    assert keys.list_keys()[0].revoked_at == first


def test_key_expires(keys: KeyStore) -> None:
    issued = keys.issue("acme", READ)
    soon = issued.key.created_at + timedelta(seconds=3)
    issued = keys.issue("acme", READ, expires_at=soon)

    assert keys.authenticate(issued.text).tenant == "acme"  # the clock ticks a second per reading
    with pytest.raises(AuthError):
        keys.authenticate(issued.text)


def test_key_without_scope_or_tenant_is_refused(keys: KeyStore) -> None:
    with pytest.raises(InputError):
        keys.issue("acme", frozenset())
    with pytest.raises(InputError):
        keys.issue("", READ)
    with pytest.raises(NotFoundError):
        keys.revoke("nope")


def test_open_access_is_the_default_tenant_with_every_scope() -> None:
    principal = open_access()(None)

    assert (principal.tenant, principal.scopes) == ("default", frozenset(Scope))
