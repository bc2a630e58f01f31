"""A bounded queue of records on disk that survives `kill -9`.

Records are lines `crc32 json` in numbered segment files; an append returns after fsync. Segments
of an earlier process are only read, so a line torn by a crash stays the last of its file and is
skipped. A segment is deleted once all its records were delivered: after a crash some come twice.
"""

import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from perennial.infra.errors import TooLargeError
from perennial.infra.locks import hold

_log = logging.getLogger(__name__)
_SEGMENT_BYTES = 1 << 20


class Spool:
    """One process's queue in `folder`; a second process on the same folder is refused."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = ExitStack()
        self._lock.enter_context(hold(folder / "lock", timeout_s=0))
        segments = self.segments()
        self.num_bytes = sum(path.stat().st_size for path in segments)
        self._next = int(segments[-1].stem) + 1 if segments else 1
        self._active: BinaryIO | None = None

    def append(self, body: bytes) -> None:
        """Keep `body` (one line of text); it is on disk when this returns.

        Raises:
            TooLargeError: the spool would exceed `max_bytes`.
            OSError: the disk refuses; the spool is as before.
        """
        line = _line(body)
        if self.num_bytes + len(line) > self._max_bytes:
            raise TooLargeError(f"the spool {self._folder} is full at {self.num_bytes} bytes")
        file = self._active or self._open_segment()
        start = file.tell()
        try:
            file.write(line)
            os.fsync(file.fileno())
        except OSError:
            self._drop_after(file, start)
            raise
        self.num_bytes += len(line)
        if file.tell() >= _SEGMENT_BYTES:
            self.seal()

    def seal(self) -> None:
        """Close the segment being written; the next append starts another."""
        if self._active is not None:
            self._active.close()
            self._active = None

    def segments(self) -> list[Path]:
        """All segment files, oldest first."""
        return sorted(self._folder.glob("*.spool"), key=lambda path: int(path.stem))

    def remove(self, segment: Path) -> None:
        """Forget a sealed segment whose records were all delivered."""
        size = segment.stat().st_size
        segment.unlink()
        _sync(self._folder)
        self.num_bytes -= size

    def set_aside(self, body: bytes) -> None:
        """Keep a record that the store refuses in `refused.jsonl`, for a person to look at."""
        with (self._folder / "refused.jsonl").open("ab") as file:
            file.write(body + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files; records stay."""
        self.seal()
        self._lock.close()

    def _open_segment(self) -> BinaryIO:
        path = self._folder / f"{self._next:012d}.spool"
        file = path.open("xb", buffering=0)
        _sync(self._folder)
        self._next += 1
        self._active = file
        return file

    def _drop_after(self, file: BinaryIO, start: int) -> None:
        try:
            file.truncate(start)
        except OSError:  # half a line may stay; it is the last of its file and will be skipped
            _log.warning("half a record stays in %s", file.name)
            self.num_bytes += max(0, Path(file.name).stat().st_size - start)
        self.seal()


def read_segment(path: Path) -> Iterator[bytes]:
    """The records of a sealed segment; damaged lines are skipped and logged."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            checksum, _, body = line.rstrip(b"\n").partition(b" ")
            if line.endswith(b"\n") and checksum == _checksum(body):
                yield body
            else:
                level = logging.ERROR if line.endswith(b"\n") else logging.WARNING
                _log.log(level, "damaged record skipped file=%s line=%d", path, number)


def _line(body: bytes) -> bytes:
    return _checksum(body) + b" " + body + b"\n"


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
