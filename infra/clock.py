"""Time and identifiers, as values that are handed in.

Decisions take `now`; only edges call a `Clock`.
"""

import os
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The present moment, aware, in UTC."""
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """`prefix_` + a UUIDv7 in hex: ids sort by the millisecond in which they were made.

    Layout from RFC 9562, section 5.7: 48 bits of Unix milliseconds, version, 74 random bits. The
    bits are to be unique, not secret: a secret is made by `secrets`.
    """
    millis = time.time_ns() // 1_000_000
    rand = _source().getrandbits(74)
    value = (millis & (1 << 48) - 1) << 80 | 0x7 << 76 | (rand >> 62) << 64
    value |= 0b10 << 62 | rand & (1 << 62) - 1
    return f"{prefix}_{value:032x}"


@cache
def _source() -> random.Random:
    """A generator seeded by the system, which a fork seeds anew lest it repeat its parent.

    Asking the system for each id costs more than all else that a request does.
    """
    found = random.Random()
    os.register_at_fork(after_in_child=found.seed)
    return found
