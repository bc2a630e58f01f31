"""Append-only files of items that are still to be sent. POSIX only.

The process that made or adopted a segment holds its lock, which the kernel releases when that
process dies, however it dies; then another process adopts the segment.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import time
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

Durability = Literal["process", "disk"]
"""What a kept item survives: the death of this process, or a power cut too (one fsync each)."""


@dataclass(kw_only=True, slots=True, eq=False)
class Segment:
    """A file of JSON lines, locked by this process."""

    path: Path
    file: FileIO
    num_items: int = 0
    num_bytes: int = 0
    began_s: float = field(default_factory=time.monotonic)

    def append(self, line: bytes, durability: Durability) -> None:
        """Keep one line, which ends with a newline. After an OSError it may or may not be kept."""
        if self.file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if durability == "disk":
            os.fsync(self.file.fileno())
        self.num_items += 1
        self.num_bytes += len(line)

    def read(self) -> list[dict[str, Any]]:  # Any: JSON
        """Every line that was kept; a last one that was cut off was promised to nobody."""
        found = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:  # pages that a power cut left empty
                logger.error("spool line unreadable path=%s num_bytes=%d", self.path, len(line))
        return found

    def discard(self) -> None:
        """Delete the file, and only then give up its lock."""
        self.path.unlink(missing_ok=True)
        self.file.close()

    def release(self) -> None:
        """Leave the file to whoever adopts it."""
        self.file.close()


def create_segment(folder: Path, durability: Durability) -> Segment:
    """An empty segment; names sort by age."""
    while True:
        path = folder / f"{time.time_ns():020d}-{os.getpid()}.jsonl"
        file = FileIO(path, "x", opener=_open_private)
        if _lock(file):
            break
        file.close()  # adopted by a process that was just looking
    if durability == "disk":
        _sync_folder(folder)
    return Segment(path=path, file=file)


def adopt_segments(folder: Path) -> list[Segment]:
    """The segments that no living process holds, oldest first; they are this one's now."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        try:
            file = FileIO(path, "r")
        except FileNotFoundError:
            continue  # sent and deleted since it was listed
        if _lock(file) and os.fstat(file.fileno()).st_nlink > 0:
            size = os.fstat(file.fileno()).st_size
            found.append(Segment(path=path, file=file, num_bytes=size))
        else:
            file.close()
    return found


def _lock(file: FileIO) -> bool:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
