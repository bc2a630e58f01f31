"""What the disk gives: the number beside which every other one is read."""

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

_BYTES = 4096  # a page: the least that a commit of one row appends


@dataclass(frozen=True, kw_only=True, slots=True)
class FsyncRate:
    """Appends of one page, each made durable."""

    p50_ms: float
    per_s: float


def fsync_rate(folder: Path, seconds: float) -> FsyncRate:
    """How fast a file in `folder` grows page by page, one fsync a page."""
    path, page, took = folder / "fsync.probe", os.urandom(_BYTES), []
    deadline = time.perf_counter() + seconds
    with path.open("wb", buffering=0) as file:
        while (started := time.perf_counter()) < deadline:
            file.write(page)
            os.fsync(file.fileno())
            took.append(time.perf_counter() - started)
    path.unlink()
    return FsyncRate(p50_ms=1e3 * statistics.median(took), per_s=len(took) / sum(took))
