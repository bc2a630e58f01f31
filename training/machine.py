"""What this machine gives to training: threads and memory."""

import os
import resource
import sys
from contextlib import suppress

import psutil
import torch

_LOOK_S = 0.5
_MAX_THREADS = 16  # beyond it a model of this size gains nothing from one more core


def choose_threads(wanted: int | None) -> int:
    """Set and return torch's threads: `wanted`, or the cores this process may use, bounded.

    Two threads beside another busy process run several times slower than one, so a core that others
    keep busy is not counted.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Not the load average: it still counts what ended a minute ago.
    idle = round((allowed or 1) * (1 - psutil.cpu_percent(interval=_LOOK_S) / 100))
    num = wanted or max(1, min(idle, _MAX_THREADS))
    torch.set_num_threads(num)
    return num


def peak_rss_mb() -> float:
    """Most memory this process has held, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def yield_cores() -> None:
    """Have only what no other process wants of the cores: somebody waits for their answers.

    A low priority alone would keep a core until its slice ends, milliseconds after it was wanted.
    """
    os.nice(10)
    if hasattr(os, "SCHED_IDLE"):  # Linux
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch, its CPU allocator and Python raise when memory is refused."""
    refused = "allocate memory" in str(error) or "bad_alloc" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or refused
