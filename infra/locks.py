"""A lock between processes: a file that one of them holds.

The kernel lets go of it when the holder dies, however it dies, so no lock is ever left behind.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perennial.infra.errors import UnavailableError

_POLL_S = 0.001
_MAX_POLL_S = 0.1


@contextmanager
def hold(path: Path, *, timeout_s: float) -> Iterator[int]:
    """Hold the lock on `path`; gives its descriptor, which a child may inherit to hold it too.

    Raises:
        UnavailableError: another process held it all of `timeout_s`, or it cannot be opened.
    """
    descriptor = _open(path)
    try:
        _wait(descriptor, path, timeout_s)
        yield descriptor
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be opened: {error.strerror}") from error


def _wait(descriptor: int, path: Path, timeout_s: float) -> None:
    deadline, pause_s = time.monotonic() + timeout_s, _POLL_S
    while not _is_taken(descriptor):
        if time.monotonic() > deadline:
            raise UnavailableError(f"{path} is held by another process")
        time.sleep(pause_s)
        pause_s = min(_MAX_POLL_S, pause_s * 1.2)


def _is_taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
