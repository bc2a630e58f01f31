"""When to try again: decisions on values, and the count of the attempts at one request."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from perennial_client.errors import ApiError, BusyError, ClientError, UnreachableError


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often, and for how long, one request is tried."""

    max_attempts: int = 5
    max_total_s: float = 60.0
    base_wait_s: float = 0.25
    max_wait_s: float = 10.0

    def wait_s(self, num_failed: int, failure: ClientError | None, jitter: float) -> float:
        """Seconds before the next attempt: what the server asked for, and a random part.

        `jitter` in [0, 1] spreads the clients over an exponentially growing interval ("full
        jitter", AWS Architecture Blog 2015), so that they do not come back all at once.
        """
        asked_s = failure.problem.retry_after_s if isinstance(failure, ApiError) else None
        ceiling_s = min(self.max_wait_s, self.base_wait_s * 2.0 ** min(num_failed - 1, 30))
        return (asked_s or 0.0) + jitter * ceiling_s


class Attempts:
    """The failed attempts at one request."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._started_s = time.monotonic()
        self._num_failed = 0

    def wait_s_after(self, failure: BusyError | UnreachableError) -> float:
        """Seconds before the next attempt; raises `failure` when there should be none."""
        self._num_failed += 1
        wait_s = self._retry.wait_s(self._num_failed, failure, random.random())
        ends_s = time.monotonic() - self._started_s + wait_s
        if self._num_failed >= self._retry.max_attempts or ends_s > self._retry.max_total_s:
            raise failure
        return wait_s
