"""Keys in memory, so that a request does not cost a read of the database.

What the database says of an id holds for 30 seconds: a revocation acts within that time, a key that
expires ends on the second. Only digests are kept, never a secret. Real and unknown ids are kept
apart and both are bounded, so guesses neither grow memory nor push real keys out.

When the database cannot be reached, a key that is not fresh is refused with UnavailableError: a
caller whose key may be revoked is not let in.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta

from perennial.feedback.keys import Principal, StoredKey, admit, split_key
from perennial.infra.clock import Clock
from perennial.infra.errors import UnavailableError

TTL = timedelta(seconds=30)
UNKNOWN_TTL = timedelta(seconds=5)
MAX_KEYS = 4096
MAX_UNKNOWN = 1024
_PAUSE = timedelta(seconds=1)


class KeyCache:
    """Authenticates callers from memory, and by `find` when it must."""

    def __init__(self, find: Callable[[str], StoredKey | None], clock: Clock) -> None:
        """`find` says what the database holds under an id; it may block, and be unavailable."""
        self._find = find
        self._clock = clock
        self._known = _Recent(MAX_KEYS, TTL)
        self._unknown = _Recent(MAX_UNKNOWN, UNKNOWN_TTL)
        self._failed_at: datetime | None = None
        # One thread: requests that wait for the same id share one read, and a flood of guesses or a
        # database that hangs occupies one connection and no thread of anybody else.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="keys")

    def authenticate(self, text: str | None) -> Principal | Awaitable[Principal]:
        """The caller that `text` stands for; the event loop never waits for the database.

        Raises:
            AuthError: no key, a malformed, unknown, expired or revoked one; always the same words.
            UnavailableError: the database must be asked and does not answer.
        """
        caller = self._recall(text)
        if caller is not None:
            return caller
        return asyncio.get_running_loop().run_in_executor(self._reader, self._ask, text)

    def _recall(self, text: str | None) -> Principal | None:
        """The caller, from memory; None when the database must be asked."""
        parts, now = split_key(text), self._clock()
        answer = self._known.get(parts.id, now) or self._unknown.get(parts.id, now)
        return None if answer is None else admit(answer.stored, parts.secret, now)

    def _ask(self, text: str | None) -> Principal:
        """The caller, from memory if somebody asked meanwhile; only the reader's thread runs it."""
        if (caller := self._recall(text)) is not None:
            return caller
        parts, now = split_key(text), self._clock()
        if self._failed_at is not None and _is_recent(self._failed_at, now, _PAUSE):
            raise UnavailableError("keys cannot be checked: the database did not answer just now")
        try:
            stored = self._find(parts.id)
        except UnavailableError:
            self._failed_at = self._clock()
            raise
        recent = self._unknown if stored is None else self._known
        # The moment before the read: what was revoked while it ran is seen in time as well.
        recent.put(parts.id, _Answer(stored=stored, read_at=now))
        return admit(stored, parts.secret, now)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What the database said of an id, and when it was asked."""

    stored: StoredKey | None
    read_at: datetime


class _Recent:
    """The newest answers by id. The order of the dict is that of the reads, so the first is oldest.

    One thread puts, any thread gets.
    """

    def __init__(self, max_items: int, ttl: timedelta) -> None:
        self._max_items = max_items
        self._ttl = ttl
        self._items: dict[str, _Answer] = {}

    def get(self, key_id: str, now: datetime) -> _Answer | None:
        found = self._items.get(key_id)
        return found if found and _is_recent(found.read_at, now, self._ttl) else None

    def put(self, key_id: str, answer: _Answer) -> None:
        self._items.pop(key_id, None)
        if len(self._items) >= self._max_items:
            del self._items[next(iter(self._items))]
        self._items[key_id] = answer


def _is_recent(at: datetime, now: datetime, ttl: timedelta) -> bool:
    # A clock that was set back must not keep an answer fresh for as long.
    return timedelta(0) <= now - at < ttl
