"""Keeps every answer durably without ever failing or delaying one by much.

An answer goes to the sink (the store, handed in); if that is down or slow, to a bounded spool on
disk, from which one thread delivers in order once the sink is back. Each record carries its own
id, so a second delivery is harmless. What an interaction is in the store is not known here.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter

from perennial.infra.errors import PerennialError, TooLargeError, UnavailableError
from perennial.serving.engine import ChatMessage
from perennial.serving.spool import Spool, read_segment

_log = logging.getLogger(__name__)
_MAX_FAILED = 5  # then one record must not hold up all that follow


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedAnswer:
    """One answered request. `finish_reason` adds `cancelled` and `error` for partial answers."""

    id: str
    tenant: str
    task: str
    messages: tuple[ChatMessage, ...]
    completion: str
    model_version: str
    route_role: str
    subject: str | None
    session: str | None
    trace_id: str | None
    num_prompt_tokens: int | None
    num_completion_tokens: int | None
    latency_ms: float
    finish_reason: str
    received_at: datetime
    tags: Mapping[str, str] = field(default_factory=dict)


Sink = Callable[[RecordedAnswer], None]


class Outcome(StrEnum):
    """Where a record is now."""

    STORED = "stored"
    SPOOLED = "spooled"
    REFUSED = "refused"  # by a store that finds it wrong, or by a full spool: not kept


@dataclass(frozen=True, kw_only=True, slots=True)
class RecorderHealth:
    """Counts since the start, and what waits on disk."""

    num_stored: int
    num_spooled: int
    num_refused: int
    num_bytes_waiting: int
    is_degraded: bool


class Recorder(Protocol):
    """Keeps answers; never raises."""

    def record(self, answer: RecordedAnswer) -> Outcome:
        """Keep `answer` before returning."""

    def health(self) -> RecorderHealth:
        """How the recorder is."""


class _Verdict(StrEnum):
    STORED = "stored"
    REFUSED = "refused"
    DOWN = "down"
    FAILED = "failed"  # in a way the sink does not name; perhaps because of this very record


class SpoolingRecorder:
    """The `Recorder` over a sink and a `Spool`. Starts its thread at once; `close` ends it.

    Args:
        sink: stores a record once per id; raises `UnavailableError` when it cannot now, another
            `PerennialError` when it never will.
        folder: where the spool lives; one process at a time.
        max_bytes: size above which the spool refuses.
        budget_s: how long an answer waits for the sink before it goes to the spool.
        retry_s: pause between attempts while the sink is down.
    """

    def __init__(
        self,
        sink: Sink,
        folder: Path,
        *,
        max_bytes: int = 256 << 20,
        budget_s: float = 0.25,
        retry_s: float = 1.0,
    ) -> None:
        self._sink = sink
        self._spool = Spool(folder, max_bytes=max_bytes)
        self._budget_s = budget_s
        self._retry_s = retry_s
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(Outcome, 0)
        # Degraded: everything goes to the spool, so that order is kept and nobody waits.
        self._is_degraded = bool(self._spool.segments())
        self._direct: queue.SimpleQueue[tuple[RecordedAnswer, Future[_Verdict]] | None] = (
            queue.SimpleQueue()
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="serving-recorder", daemon=True)
        self._thread.start()

    def record(self, answer: RecordedAnswer) -> Outcome:
        """Keep `answer` in the store or on disk before returning; never raises."""
        verdict = _Verdict.DOWN if self._is_degraded else self._offer(answer)
        if verdict in (_Verdict.STORED, _Verdict.REFUSED):
            outcome = Outcome(verdict.value)
        else:
            outcome = self._append(answer)
        with self._lock:
            self._counts[outcome] += 1
        return outcome

    def health(self) -> RecorderHealth:
        """Counts since the start, and what waits on disk."""
        return RecorderHealth(
            num_stored=self._counts[Outcome.STORED],
            num_spooled=self._counts[Outcome.SPOOLED],
            num_refused=self._counts[Outcome.REFUSED],
            num_bytes_waiting=self._spool.num_bytes,
            is_degraded=self._is_degraded,
        )

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread; what waits on disk is delivered by the next start."""
        self._closing.set()
        self._direct.put(None)
        self._thread.join(timeout_s)
        with self._lock:
            self._is_degraded = True
            self._spool.close()

    def _offer(self, answer: RecordedAnswer) -> _Verdict:
        done: Future[_Verdict] = Future()
        self._direct.put((answer, done))
        try:
            verdict = done.result(self._budget_s)
        except (FutureTimeoutError, CancelledError):
            done.cancel()
            _log.warning("the store is slow, recording to disk budget_s=%s", self._budget_s)
            verdict = _Verdict.DOWN
        return verdict

    def _append(self, answer: RecordedAnswer) -> Outcome:
        with self._lock:
            try:
                self._spool.append(_RECORD.dump_json(answer))
            except (TooLargeError, OSError, ValueError) as error:
                _log.critical("ANSWER NOT RECORDED id=%s reason=%s", answer.id, error)
                return Outcome.REFUSED
            was_degraded, self._is_degraded = self._is_degraded, True
        if not was_degraded:
            self._direct.put(None)  # wakes the thread, which then drains
        return Outcome.SPOOLED

    # Below: the recorder's thread only.

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                self._drain() if self._is_degraded else self._serve_one()
            except OSError:
                _log.exception("the spool cannot be read, trying again in %s s", self._retry_s)
                self._closing.wait(self._retry_s)
        while not self._direct.empty():
            if item := self._direct.get():
                item[1].cancel()

    def _serve_one(self) -> None:
        item = self._direct.get()
        if item is not None and item[1].set_running_or_notify_cancel():
            item[1].set_result(self._try_sink(item[0]))

    def _drain(self) -> None:
        """Deliver what is on disk, oldest first; ends degraded when the spool is empty."""
        with self._lock:
            self._spool.seal()
            segments = self._spool.segments()
            if not segments:
                self._is_degraded = False
                _log.info("the spool is empty, recording to the store again")
                return
        for segment in segments:
            if not self._drain_segment(read_segment(segment)):
                return
            with self._lock:
                self._spool.remove(segment)

    def _drain_segment(self, records: Iterator[bytes]) -> bool:
        for body in records:
            try:
                answer = _RECORD.validate_json(body)
            except ValueError:
                _log.exception("a record on disk cannot be read")
                self._spool.set_aside(body)
                continue
            if not self._drain_one(answer, body):
                return False
        return True

    def _drain_one(self, answer: RecordedAnswer, body: bytes) -> bool:
        """Deliver one record, however long the store is down; False when closing."""
        num_failed = 0
        while not self._closing.is_set():
            verdict = self._try_sink(answer)
            num_failed += verdict is _Verdict.FAILED
            if verdict is _Verdict.STORED:
                return True
            if verdict is _Verdict.REFUSED or num_failed >= _MAX_FAILED:
                self._spool.set_aside(body)
                return True
            self._closing.wait(self._retry_s)
        return False

    def _try_sink(self, answer: RecordedAnswer) -> _Verdict:
        try:
            self._sink(answer)
        except UnavailableError as error:
            _log.warning("the store is down id=%s reason=%s", answer.id, error)
        except PerennialError as error:
            _log.error("the store refuses an answer id=%s reason=%s", answer.id, error)
            return _Verdict.REFUSED
        except Exception:  # noqa: BLE001  # thread edge: logged whole, kept on disk, tried again
            _log.exception("the store failed id=%s", answer.id)
            return _Verdict.FAILED
        else:
            return _Verdict.STORED
        return _Verdict.DOWN


_RECORD = TypeAdapter(RecordedAnswer)
