"""How fast Python is just now: shared machines change by the minute, and all figures with them."""

import json
import time

_TRIES = 7
_TURNS = 1000


def yardstick_us() -> float:
    """Microseconds for one small object to JSON and back, of the best of seven tries."""
    return min(_try() for _ in range(_TRIES)) / _TURNS * 1e6


def _try() -> float:
    started = time.perf_counter()
    for number in range(_TURNS):
        json.loads(json.dumps({"id": [number, str(number)], "tags": {"event": number}}))
    return time.perf_counter() - started
