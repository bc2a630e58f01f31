"""Time and identifiers, as values that are handed in.

Decisions take `now`; only edges call a `Clock`.
"""

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The present moment, aware, in UTC."""
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """`prefix_` + a UUIDv7 in hex: ids sort by the millisecond in which they were made.

    Layout from RFC 9562, section 5.7: 48 bits of Unix milliseconds, version, 74 random bits.
    """
    millis = time.time_ns() // 1_000_000
    rand = int.from_bytes(os.urandom(10))
    value = (millis & (1 << 48) - 1) << 80 | 0x7 << 76 | (rand >> 68 & 0xFFF) << 64
    value |= 0b10 << 62 | rand & (1 << 62) - 1
    return f"{prefix}_{value:032x}"
