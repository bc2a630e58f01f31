"""Who is calling: API keys, their scopes, and the tenant they stand for.

A key reads `pnl_<id>_<secret>`. The secret has 256 random bits, so a plain SHA-256 at rest is
enough and cheap. Which scope a route needs is left to `api`.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from sqlalchemy import select

from perennial.feedback.records import check_id
from perennial.feedback.tables import ApiKeyRow
from perennial.infra.clock import Clock
from perennial.infra.db import Database
from perennial.infra.errors import AuthError, InputError, NotFoundError

OPEN_TENANT = "default"
_PREFIX = "pnl"


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


Authenticate = Callable[[str | None], Principal]
"""From the text of a key, or None when the caller sent none; raises AuthError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """A key as listed; the secret is gone."""

    id: str
    tenant: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuedKey:
    """A key just made; `text` is shown once and kept nowhere."""

    key: ApiKey
    text: str = field(repr=False)


def open_access(tenant: str = OPEN_TENANT) -> Authenticate:
    """Everybody is `tenant` with every scope; for loopback only, which the wiring enforces."""
    principal = Principal(tenant=tenant, scopes=frozenset(Scope))
    return lambda _: principal


class KeyStore:
    """API keys in the database."""

    def __init__(self, database: Database, clock: Clock) -> None:
        """Keys live in `database`; `clock` decides what has expired."""
        self._database = database
        self._clock = clock

    def issue(
        self, tenant: str, scopes: frozenset[Scope], expires_at: datetime | None = None
    ) -> IssuedKey:
        """A new key for `tenant`."""
        check_id("tenant", tenant)
        if not scopes:
            raise InputError("a key needs at least one scope")
        key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        row = ApiKeyRow(
            id=key_id,
            tenant=tenant,
            scopes=sorted(scopes),
            secret_sha256=_sha256(secret),
            created_at=self._clock(),
            expires_at=expires_at,
            revoked_at=None,
        )
        with self._database.write() as session:
            session.add(row)
        return IssuedKey(key=_to_key(row), text=f"{_PREFIX}_{key_id}_{secret}")

    def authenticate(self, text: str | None) -> Principal:
        """The caller that `text` stands for.

        Raises:
            AuthError: no key, a malformed, unknown, expired or revoked one; always the same words.
        """
        prefix, _, rest = (text or "").partition("_")
        key_id, _, secret = rest.partition("_")
        # PostgreSQL refuses NUL in a parameter: only what can be a key reaches the database.
        row = self._find(key_id) if prefix == _PREFIX and _is_plain(rest) else None
        expected = row.secret_sha256 if row else _sha256("")
        is_secret = hmac.compare_digest(expected, _sha256(secret))
        if row is None or not is_secret or not self._is_live(row):
            raise AuthError("send a valid API key as `Authorization: Bearer pnl_…`")
        key = _to_key(row)
        return Principal(tenant=key.tenant, scopes=key.scopes, key_id=key.id)

    def revoke(self, key_id: str) -> None:
        """End a key at once; revoking it twice keeps the first time."""
        with self._database.write() as session:
            row = session.get(ApiKeyRow, key_id)
            if row is None:
                raise NotFoundError(f"there is no API key {key_id}")
            row.revoked_at = row.revoked_at or self._clock()

    def list_keys(self) -> tuple[ApiKey, ...]:
        """All keys, oldest first, the ended ones too."""
        with self._database.read() as session:
            rows = session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.id))
            return tuple(_to_key(row) for row in rows)

    def _find(self, key_id: str) -> ApiKeyRow | None:
        with self._database.read() as session:
            row = session.get(ApiKeyRow, key_id)
            if row is not None:
                session.expunge(row)
            return row

    def _is_live(self, row: ApiKeyRow) -> bool:
        has_expired = row.expires_at is not None and row.expires_at <= self._clock()
        return row.revoked_at is None and not has_expired


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and len(text) <= 128


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _to_key(row: ApiKeyRow) -> ApiKey:
    return ApiKey(
        id=row.id,
        tenant=row.tenant,
        scopes=frozenset(map(Scope, row.scopes)),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
