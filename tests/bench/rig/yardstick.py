"""What the machine gave meanwhile: a shared one changes by the minute, and all figures with it."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_TRIES = 7
_TURNS = 1000


@contextmanager
def yardstick() -> Iterator[dict[str, float]]:
    """Filled at the end: `python_us` of a fixed piece of work, `stolen` share of the cores' time.

    Stolen is what the hypervisor gave to other machines while this one wanted to run.
    """
    found: dict[str, float] = {}
    before_us, before = _python_us(), psutil.cpu_times()
    yield found
    after = psutil.cpu_times()
    stolen = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    found["stolen"] = round(stolen / max(sum(after) - sum(before), 1e-9), 3)
    found["python_us"] = round((before_us + _python_us()) / 2, 2)


def _python_us() -> float:
    """Microseconds for one small object to JSON and back, of the best of seven tries."""
    return min(_try() for _ in range(_TRIES)) / _TURNS * 1e6


def _try() -> float:
    started = time.perf_counter()
    for number in range(_TURNS):
        json.loads(json.dumps({"id": [number, str(number)], "tags": {"event": number}}))
    return time.perf_counter() - started
