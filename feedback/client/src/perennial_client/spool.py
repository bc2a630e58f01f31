"""A bounded queue on disk: lines go in, batches of them come out.

A segment is a batch and is deleted once it is settled, so there is no other state to keep. When its
process is killed between the server's answer and the deletion, it is sent again with the same keys.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perennial_client.errors import SenderClosedError, SpoolFullError
from perennial_client.segment import Durability, Segment, adopt_segments, create_segment

_MAX_BATCH_BYTES = 4 << 20  # the server takes 5 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Spooling:
    """How items wait, and for how long.

    `max_bytes` bounds what waits in this process; beyond it `when_full` decides between
    SpoolFullError and a counted drop. A batch goes when it has `max_batch_items` (the server takes
    1,000) or is `max_batch_wait_s` old.
    """

    durability: Durability = "process"
    when_full: Literal["raise", "drop"] = "raise"
    max_bytes: int = 64 << 20
    max_batch_items: int = 100
    max_batch_wait_s: float = 1.0


class Spool:
    """The segments of `folder` that this process holds: those of dead processes and its own."""

    def __init__(self, folder: Path, how: Spooling) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._how = how
        # Its lock is reentrant: the garbage collector may end a wrapped stream, and so put a line,
        # while this very thread is inside.
        self._changed = threading.Condition()
        self._filling: Segment | None = None
        self._sealed = deque(adopt_segments(folder))
        self._num_bytes = sum(segment.num_bytes for segment in self._sealed)
        self._is_closed = False
        self.num_dropped = 0

    def put(self, line: bytes) -> None:
        """Keep `line`, which ends with a newline, until its batch is settled."""
        with self._changed:
            if self._is_closed:
                raise SenderClosedError("this sender was closed; make another one")
            if self._num_bytes + len(line) <= self._how.max_bytes:
                self._append(line)
            elif self._how.when_full == "drop":
                self.num_dropped += 1
            else:
                raise SpoolFullError(f"{self._num_bytes} bytes wait in {self._folder} already")

    def take(self) -> Segment | None:
        """The oldest batch, waited for; None when there is none and the spool is closed."""
        with self._changed:
            while not self._sealed:
                if self._is_closed:
                    return None
                wait_s = self._wait_s()
                if wait_s is None or wait_s > 0:
                    self._changed.wait(wait_s)
                else:
                    self._seal()
            return self._sealed[0]

    def settle(self, segment: Segment) -> None:
        """Forget a batch that was taken."""
        with self._changed:
            segment.discard()
            self._sealed.remove(segment)
            self._num_bytes -= segment.num_bytes
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Whether all that was put before was settled within `timeout_s`."""
        with self._changed:
            self._seal()
            waiting = set(self._sealed)
            return self._changed.wait_for(lambda: waiting.isdisjoint(self._sealed), timeout_s)

    def close(self) -> None:
        """Take no more lines; what waits can still be taken."""
        with self._changed:
            self._seal()
            self._is_closed = True
            self._changed.notify_all()

    def is_closed_within(self, timeout_s: float) -> bool:
        """Whether the spool is closed; waits for it."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_closed, timeout_s)

    def release(self) -> None:
        """Leave what waits to whoever adopts it; after a fork, to the parent."""
        for segment in (*self._sealed, self._filling):
            if segment is not None:
                segment.release()

    def _append(self, line: bytes) -> None:
        if self._filling is not None and self._filling.num_bytes + len(line) > _MAX_BATCH_BYTES:
            self._seal()
        segment = self._filling or self._begin()
        try:
            segment.append(line, self._how.durability)
        except OSError:
            self._seal()  # nothing may follow a line that was cut off
            raise
        self._num_bytes += len(line)
        if segment.num_items >= self._how.max_batch_items:
            self._seal()

    def _begin(self) -> Segment:
        segment = create_segment(self._folder, self._how.durability)
        self._seal()  # one that a nested call began meanwhile
        self._filling = segment
        self._changed.notify_all()
        return segment

    def _seal(self) -> None:
        if self._filling is not None:
            self._sealed.append(self._filling)
            self._filling = None
            self._changed.notify_all()

    def _wait_s(self) -> float | None:
        if self._filling is None:
            return None
        return self._filling.began_s + self._how.max_batch_wait_s - time.monotonic()
