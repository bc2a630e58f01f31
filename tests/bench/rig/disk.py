"""What the disk gives: the number beside which every other one is read."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

_BYTES = 4096  # a page: the least that a commit of one row appends


@dataclass(frozen=True, kw_only=True, slots=True)
class FsyncRate:
    """Appends of one page, each made durable."""

    p50_ms: float
    p99_ms: float
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
    took_ms = sorted(1e3 * each for each in took)
    return FsyncRate(
        p50_ms=took_ms[len(took) // 2],
        p99_ms=took_ms[int(0.99 * len(took))],
        per_s=len(took) / sum(took),
    )
