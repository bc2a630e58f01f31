"""A training and Evidently reports beside a server, put to sleep and woken by turns."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import psutil
from rig.processes import stop

_BUSY = Path(__file__).parent / "busy.py"


class Neighbours:
    """Both kinds of work, started when the block is entered, stopped with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: list[subprocess.Popen[str]] = []
        self._awake_s = self._cpu_s = 0.0

    def __enter__(self) -> Self:
        for mode in ("train", "report"):
            argv = [sys.executable, str(_BUSY), mode, str(self._folder / mode)]
            self._children.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            stop(child)

    def wait_until_busy(self) -> None:
        """Return when imports are over and the work itself has begun; RuntimeError if it ended."""
        for child in self._children:
            assert child.stdout is not None
            if child.stdout.readline() != "running\n":
                raise RuntimeError(f"{child.args!r} ended before its work began")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """They work, as in a round."""
        started, cpu_s = time.monotonic(), self._used_s()
        yield
        self._awake_s += time.monotonic() - started
        self._cpu_s += self._used_s() - cpu_s

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """They are stopped where they are, and go on afterwards."""
        found = self._processes()
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        try:
            yield
        finally:
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    @property
    def cores_used(self) -> float:
        """CPU seconds they got for each second awake; 0 would mean that nothing was beside us."""
        return self._cpu_s / self._awake_s

    def _processes(self) -> list[psutil.Process]:
        parents = [psutil.Process(child.pid) for child in self._children]
        return [one for each in parents for one in (each, *each.children(recursive=True))]

    def _used_s(self) -> float:
        total = 0.0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total
