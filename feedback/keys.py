"""API keys: what they are, where they are kept, and whether a text is one.

A key reads `pnl_<id>_<secret>`. The secret has 256 random bits, so a plain SHA-256 at rest is
enough and cheap. Answering without a read of the database is left to `key_cache`; which scope a
route needs, to the routes.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Literal, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from perennial.feedback.records import check_id
from perennial.feedback.tables import ApiKeyRow
from perennial.infra.clock import Clock
from perennial.infra.db import Database
from perennial.infra.errors import AuthError, ConflictError, InputError, NotFoundError

OPEN_TENANT = "default"
_KEY = re.compile(r"pnl_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")


class Scope(StrEnum):
    """What a key allows."""

    INGEST = "ingest"
    READ = "read"
    REVIEW = "review"
    TRAIN = "train"
    PROMOTE = "promote"
    ADMIN = "admin"


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """An authenticated caller."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str | None = None


Authenticate = Callable[[str | None], Principal | Awaitable[Principal]]
"""The caller from the text of a key, or from None when there was none: at once where that takes no
look at the database, else awaitable. Raises AuthError, also when awaited."""

KeyState = Literal["active", "expired", "revoked"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """A key as listed; the secret is gone."""

    id: str
    tenant: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    def state_at(self, now: datetime) -> KeyState:
        """Whether the key opens anything at `now`; its last moment is before `expires_at`."""
        if self.revoked_at is not None:
            return "revoked"
        return "active" if self.expires_at is None or now < self.expires_at else "expired"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredKey:
    """A key as the database holds it."""

    key: ApiKey
    secret_sha256: str = field(repr=False)
    principal: Principal = field(init=False)

    def __post_init__(self) -> None:
        key = self.key
        principal = Principal(tenant=key.tenant, scopes=key.scopes, key_id=key.id)
        object.__setattr__(self, "principal", principal)


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuedKey:
    """A key just made; `text` is shown once and kept nowhere."""

    key: ApiKey
    text: str = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """A key and the one that replaces it; both work until the old one expires."""

    old: ApiKey
    issued: IssuedKey


class KeyParts(NamedTuple):
    """The two halves of a key's text."""

    id: str
    secret: str


def open_access(tenant: str = OPEN_TENANT) -> Authenticate:
    """Everybody is `tenant` with every scope; for loopback only, which the wiring enforces."""
    principal = Principal(tenant=tenant, scopes=frozenset(Scope))
    return lambda _: principal


def split_key(text: str | None) -> KeyParts:
    """The halves of `text`; raises AuthError when it cannot be a key."""
    found = _KEY.fullmatch(text or "")
    if found is None:
        raise _refusal()
    return KeyParts(found[1], found[2])


def admit(stored: StoredKey | None, secret: str, now: datetime) -> Principal:
    """The caller whom `secret` makes of what is stored under its id, None if nothing is.

    Raises:
        AuthError: an unknown, wrong, expired or revoked key; always in the same words.
    """
    expected = stored.secret_sha256 if stored else _sha256("")
    is_secret = hmac.compare_digest(expected, _sha256(secret))
    if stored is None or not is_secret or stored.key.state_at(now) != "active":
        raise _refusal()
    return stored.principal


class KeyStore:
    """API keys in the database."""

    def __init__(self, database: Database, clock: Clock) -> None:
        """Keys live in `database`; `clock` stamps them."""
        self._database = database
        self._clock = clock

    def issue(
        self, tenant: str, scopes: frozenset[Scope], lifetime: timedelta | None = None
    ) -> IssuedKey:
        """A new key for `tenant`; without a lifetime it never expires."""
        check_id("tenant", tenant)
        if not scopes:
            raise InputError("a key needs at least one scope")
        with self._database.write() as session:
            return _add(session, tenant, scopes, self._clock(), lifetime)

    def rotate(
        self, key_id: str, overlap: timedelta, lifetime: timedelta | None = None
    ) -> Rotation:
        """A new key of the same tenant and scopes; the old one expires after `overlap`, or before.

        The new one lives for `lifetime`, or when None for as long as the old one was meant to.

        Raises:
            NotFoundError: there is no such key.
            ConflictError: it has expired or was revoked.
        """
        now = self._clock()
        with self._database.write() as session:
            row = _existing(session, key_id)
            old = _to_key(row)
            if (state := old.state_at(now)) != "active":
                raise ConflictError(f"API key {old.id} is {state}: create a new one")
            if lifetime is None and old.expires_at is not None:
                lifetime = old.expires_at - old.created_at
            issued = _add(session, old.tenant, old.scopes, now, lifetime)
            row.expires_at = min(old.expires_at or now + overlap, now + overlap)
            return Rotation(old=_to_key(row), issued=issued)

    def revoke(self, key_id: str) -> ApiKey:
        """End a key; revoking it twice keeps the first time."""
        with self._database.write() as session:
            row = _existing(session, key_id)
            row.revoked_at = row.revoked_at or self._clock()
            return _to_key(row)

    def list_keys(self) -> tuple[ApiKey, ...]:
        """All keys, oldest first, the ended ones too."""
        with self._database.read() as session:
            rows = session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.id))
            return tuple(_to_key(row) for row in rows)

    def find(self, key_id: str) -> StoredKey | None:
        """The key with this id."""
        with self._database.read() as session:
            row = session.get(ApiKeyRow, key_id)
            if row is None:
                return None
            return StoredKey(key=_to_key(row), secret_sha256=row.secret_sha256)


def _refusal() -> AuthError:
    return AuthError("send a valid API key as `Authorization: Bearer pnl_…`")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _add(
    session: Session,
    tenant: str,
    scopes: frozenset[Scope],
    now: datetime,
    lifetime: timedelta | None,
) -> IssuedKey:
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    row = ApiKeyRow(
        id=key_id,
        tenant=tenant,
        scopes=sorted(scopes),
        secret_sha256=_sha256(secret),
        created_at=now,
        expires_at=None if lifetime is None else now + lifetime,
        revoked_at=None,
    )
    session.add(row)
    return IssuedKey(key=_to_key(row), text=f"pnl_{key_id}_{secret}")


def _existing(session: Session, key_id: str) -> ApiKeyRow:
    row = session.get(ApiKeyRow, key_id)
    if row is None:
        # Somebody may have sent the whole key: show no secret.
        raise NotFoundError(f"there is no API key with the id {key_id[:16]!r}")
    return row


def _to_key(row: ApiKeyRow) -> ApiKey:
    return ApiKey(
        id=row.id,
        tenant=row.tenant,
        scopes=frozenset(map(Scope, row.scopes)),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
