import sqlite3
from datetime import timedelta
from pathlib import Path

import pytest

from perennial.feedback.keys import (
    ApiKey,
    KeyStore,
    Principal,
    Scope,
    StoredKey,
    admit,
    split_key,
)
from perennial.infra.db import Database
from perennial.infra.errors import AuthError, ConflictError, InputError, NotFoundError
from tests.feedback.conftest import START, TickingClock

READ = frozenset({Scope.READ})
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.fixture
def keys(database: Database, clock: TickingClock) -> KeyStore:
    return KeyStore(database, clock)


def _stored(keys: KeyStore, key_id: str) -> ApiKey:
    found = keys.find(key_id)
    assert found is not None
    return found.key


def _opens(keys: KeyStore, text: str, now: object = START) -> Principal:
    parts = split_key(text)
    return admit(keys.find(parts.id), parts.secret, now)  # type: ignore[arg-type]  # a datetime


def test_issued_key_stands_for_its_tenant_and_scopes(keys: KeyStore) -> None:
    issued = keys.issue("acme", READ)

    caller = _opens(keys, issued.text)

    assert caller == Principal(tenant="acme", scopes=READ, key_id=issued.key.id)
    assert issued.text.startswith(f"pnl_{issued.key.id}_")


def test_secret_is_neither_stored_nor_shown(sqlite_database: Database, tmp_path: Path) -> None:
    keys = KeyStore(sqlite_database, TickingClock())
    issued = keys.issue("acme", READ)
    text = keys.rotate(issued.key.id, HOUR).issued.text

    with sqlite3.connect(tmp_path / "p.db") as connection:
        dump = "\n".join(connection.iterdump())
    connection.close()

    assert issued.key.id in dump
    for shown in (dump, repr(issued), repr(keys.find(issued.key.id))):
        assert issued.text.split("_", 2)[2] not in shown
        assert text.split("_", 2)[2] not in shown


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "",
        "pnl",
        "pnl_a_b",
        "pnl_\0_x",
        "pnl_é_x",
        "x" * 9999,
        "sk_0123456789abcdef_" + "a" * 43,
        "pnl_0123456789ABCDEF_" + "a" * 43,
        "pnl_0123456789abcdef_" + "a" * 42,
        "pnl_0123456789abcdef_" + "a" * 43 + "\n",
    ],
)
def test_what_cannot_be_a_key_is_refused_before_the_database(wrong: str | None) -> None:
    with pytest.raises(AuthError):
        split_key(wrong)


def test_every_refusal_has_the_same_words(keys: KeyStore) -> None:
    issued = keys.issue("acme", READ, HOUR)
    stored = keys.find(issued.key.id)
    secret = split_key(issued.text).secret
    ended = keys.revoke(keys.issue("acme", READ).key.id)
    revoked = StoredKey(key=ended, secret_sha256=stored.secret_sha256 if stored else "")
    said = set()

    for known, sent, now in [
        (None, secret, START),
        (stored, secret[:-1] + "-", START),
        (stored, secret, START + DAY),
        (revoked, secret, START),
    ]:
        with pytest.raises(AuthError) as caught:
            admit(known, sent, now)
        said.add(str(caught.value))
    with pytest.raises(AuthError) as caught:
        split_key("pnl")

    assert said == {str(caught.value)}


def test_revoking_twice_keeps_the_first_time(keys: KeyStore) -> None:
    issued = keys.issue("acme", READ)

    first = keys.revoke(issued.key.id)

    assert keys.revoke(issued.key.id) == first == keys.list_keys()[0]
    assert first.state_at(START) == "revoked"


def test_key_ends_on_the_second_it_expires(keys: KeyStore) -> None:
    key = keys.issue("acme", READ, HOUR).key

    assert key.state_at(key.created_at + HOUR - timedelta(microseconds=1)) == "active"
    assert key.state_at(key.created_at + HOUR) == "expired"


def test_rotation_gives_the_same_rights_and_ends_the_old_key_after_the_overlap(
    keys: KeyStore, clock: TickingClock
) -> None:
    old = keys.issue("acme", READ)

    rotation = keys.rotate(old.key.id, HOUR)

    new = rotation.issued
    assert (new.key.tenant, new.key.scopes, new.key.expires_at) == ("acme", READ, None)
    assert _opens(keys, new.text).key_id == new.key.id != old.key.id
    assert rotation.old.expires_at == clock.now + HOUR
    assert _stored(keys, old.key.id) == rotation.old
    assert _opens(keys, old.text, clock.now).key_id == old.key.id
    with pytest.raises(AuthError):
        _opens(keys, old.text, clock.now + HOUR)


def test_rotation_keeps_the_lifetime_and_never_prolongs_the_old_key(
    keys: KeyStore, clock: TickingClock
) -> None:
    old = keys.issue("acme", READ, HOUR).key

    kept = keys.rotate(old.id, DAY)
    chosen = keys.rotate(old.id, DAY, lifetime=DAY)

    assert kept.issued.key.expires_at == kept.issued.key.created_at + HOUR
    assert kept.old.expires_at == old.expires_at
    assert chosen.issued.key.expires_at == clock.now + DAY


def test_ended_key_is_not_rotated(keys: KeyStore) -> None:
    revoked = keys.revoke(keys.issue("acme", READ).key.id)
    expired = keys.issue("acme", READ, timedelta(0)).key

    with pytest.raises(ConflictError, match="is revoked: create a new one"):
        keys.rotate(revoked.id, HOUR)
    with pytest.raises(ConflictError, match="is expired: create a new one"):
        keys.rotate(expired.id, HOUR)
    assert len(keys.list_keys()) == 2


def test_unknown_id_is_named_without_showing_a_secret(keys: KeyStore) -> None:
    text = keys.issue("acme", READ).text

    for act in (keys.revoke, lambda key_id: keys.rotate(key_id, HOUR)):
        with pytest.raises(NotFoundError) as caught:
            act(text)
        assert split_key(text).secret not in str(caught.value)


def test_key_without_scope_or_tenant_is_refused(keys: KeyStore) -> None:
    with pytest.raises(InputError):
        keys.issue("acme", frozenset())
    with pytest.raises(InputError):
        keys.issue("", READ)
