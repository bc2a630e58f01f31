"""Who may send how much: token buckets for keys and subjects, a watermark for the disk.

Decisions over an injected clock; what waits for the disk is bounded by `committer`.
"""

import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perennial.infra.errors import OverloadedError, RateLimitedError

_MAX_BUCKETS = 50_000
_DISK_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Tokens per second and how many may be saved up; a rate of 0 is no limit."""

    per_s: float
    burst: float


class TokenBuckets:
    """One bucket for each name; the longest unused is forgotten when there are too many."""

    def __init__(self, rate: Rate, monotonic: Callable[[], float] = time.monotonic) -> None:
        """A name that was never seen has a full bucket, as has one that was forgotten."""
        self._rate = rate
        self._now = monotonic
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, num: int) -> float:
        """Take `num` tokens of `name` and return 0, or take none and return the seconds to wait.

        More than the burst can never be there at once: such a request takes a full bucket.
        """
        rate, now = self._rate, self._now()
        if not rate.per_s:
            return 0.0
        left, at = self._left.pop(name, (rate.burst, now))
        left = min(rate.burst, left + (now - at) * rate.per_s)
        wanted = min(num, rate.burst)
        is_enough = left >= wanted
        self._left[name] = (left - wanted if is_enough else left, now)
        if len(self._left) > _MAX_BUCKETS:
            self._left.popitem(last=False)
        return 0.0 if is_enough else (wanted - left) / rate.per_s


class DiskWatermark:
    """Refuses writes before the disk is full: a database that meets ENOSPC may need repair."""

    def __init__(
        self,
        folder: Path,
        min_free_bytes: int,
        monotonic: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        """The free space is read once a second at most."""
        self._folder = folder
        self._min_free_bytes = min_free_bytes
        self._now = monotonic
        self._free_bytes = free_bytes
        self._checked_at = -_DISK_EVERY_S
        self._is_low = False

    def check(self) -> None:
        """Raise OverloadedError while less than the watermark is free."""
        now = self._now()
        if now - self._checked_at >= _DISK_EVERY_S:
            self._checked_at = now
            self._is_low = self._free_bytes(self._folder) < self._min_free_bytes
        if self._is_low:
            raise OverloadedError("the disk is almost full", retry_after_s=30)


class Admission:
    """The limits of one service."""

    def __init__(
        self, *, keys: TokenBuckets, subjects: TokenBuckets, disk: DiskWatermark | None
    ) -> None:
        """`disk` is None where the database lives elsewhere."""
        self._keys = keys
        self._subjects = subjects
        self._disk = disk

    def admit(self, caller: str, num: int) -> None:
        """Raise unless `caller`, an API key or tenant, may write `num` rows now."""
        if self._disk is not None:
            self._disk.check()
        _refuse("this API key", self._keys.take(caller, num))

    def admit_subject(self, tenant: str, subject: str | None, num: int = 1) -> None:
        """Raise unless `subject` may send `num` more rows now."""
        if subject is not None:
            _refuse("this subject", self._subjects.take(f"{tenant} {subject}", num))


def open_admission() -> Admission:
    """No limits."""
    no_limit = Rate(per_s=0, burst=0)
    return Admission(keys=TokenBuckets(no_limit), subjects=TokenBuckets(no_limit), disk=None)


def _refuse(who: str, wait_s: float) -> None:
    if wait_s:
        raise RateLimitedError(f"{who} sends too much", retry_after_s=wait_s)
