"""Group commit: many requests, one writer thread, one transaction for all that wait.

There is no timer: while one group is being made durable the next one gathers, so an idle service
answers after one fsync and a busy one pays each fsync once for hundreds of rows. A request is
answered after the commit of its rows. What a transaction does is left to the store.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from perennial.feedback.store import Outcome, Submission
from perennial.infra.errors import InputError, OverloadedError, UnavailableError

log = logging.getLogger(__name__)

Write = Callable[[Sequence[Submission]], tuple[Outcome, ...]]
Outcomes = tuple[Outcome, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupLimits:
    """How much may share a transaction, and how much may wait for one."""

    group_rows: int = 512
    group_bytes: int = 4 << 20
    queue_rows: int = 8192
    queue_bytes: int = 32 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What waits for a commit now."""

    num_rows: int
    num_bytes: int


@dataclass(kw_only=True, slots=True, eq=False)
class _Request:
    """Submissions that are answered together, though groups may part them."""

    future: "Future[Outcomes] | asyncio.Future[Outcomes]"
    num_waiting: int
    outcomes: list[Outcome] = field(default_factory=list)
    error: UnavailableError | None = None


_Waiting = tuple[Submission, _Request]


class GroupCommitter:
    """Commits what requests hand in, in their order."""

    def __init__(self, write: Write, limits: GroupLimits | None = None) -> None:
        """`write` is called by one thread only; it starts with `start` or the first request."""
        self._write = write
        self._limits = limits or GroupLimits()
        self._queue: deque[_Waiting] = deque()
        self._num_bytes = 0
        self._has_work = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take requests, also after a `close`."""
        with self._has_work:
            self._is_closed = False
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
                self._thread.start()

    def submit(self, submissions: Sequence[Submission]) -> Outcomes:
        """What became of each, once committed; for threads.

        Raises:
            OverloadedError: too much waits already; nothing was taken.
            UnavailableError: it is not known whether the rows were stored: try the same keys again.
        """
        future: Future[Outcomes] = Future()
        self._enqueue(submissions, future)
        return future.result()

    async def store(self, submissions: Sequence[Submission]) -> Outcomes:
        """`submit`, for the event loop that it is called on."""
        future: asyncio.Future[Outcomes] = asyncio.get_running_loop().create_future()
        self._enqueue(submissions, future)
        return await future

    def load(self) -> Load:
        """How full the queue is."""
        return Load(num_rows=len(self._queue), num_bytes=self._num_bytes)

    @property
    def is_full(self) -> bool:
        """Whether a request would be refused now; read without a lock, to refuse it early."""
        limits = self._limits
        return len(self._queue) >= limits.queue_rows or self._num_bytes >= limits.queue_bytes

    @property
    def is_running(self) -> bool:
        """Whether what is handed in will be written."""
        return not self._is_closed

    def close(self, timeout_s: float = 8.0) -> bool:
        """Take nothing more and commit what waits; whether that was done in time."""
        with self._has_work:
            self._is_closed = True
            self._has_work.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _enqueue(
        self,
        submissions: Sequence[Submission],
        future: "Future[Outcomes] | asyncio.Future[Outcomes]",
    ) -> None:
        if not submissions:
            future.set_result(())
            return
        if self._thread is None:
            self.start()
        request = _Request(future=future, num_waiting=len(submissions))
        num_bytes = sum(each.num_bytes for each in submissions)
        with self._has_work:
            if not self.is_running:
                raise UnavailableError("the writer has stopped")
            if self.is_full:
                raise OverloadedError("too many writes are waiting", retry_after_s=1)
            self._num_bytes += num_bytes
            self._queue.extend((each, request) for each in submissions)
            self._has_work.notify()

    def _run(self) -> None:
        group: list[_Waiting] = []
        try:
            while group := self._next_group():
                self._answer(group, self._commit([each for each, _ in group]))
        finally:
            # Also when this thread dies of a bug: nobody may wait for an answer for ever.
            self._is_closed = True
            error = UnavailableError("the writer has stopped")
            self._answer([*group, *self._queue], [error] * (len(group) + len(self._queue)))

    def _next_group(self) -> list[_Waiting]:
        """What is committed next; empty when closed and drained."""
        with self._has_work:
            while not self._queue and not self._is_closed:
                self._has_work.wait()
            group: list[_Waiting] = []
            num_bytes = 0
            while self._queue and len(group) < self._limits.group_rows:
                size = self._queue[0][0].num_bytes
                if group and num_bytes + size > self._limits.group_bytes:
                    break
                group.append(self._queue.popleft())
                num_bytes += size
            self._num_bytes -= num_bytes
            return group

    def _commit(self, group: Sequence[Submission]) -> Iterable[Outcome]:
        """One outcome each. A row that the database refuses is found by halving and fails alone."""
        try:
            return self._write(group)
        except UnavailableError as error:
            log.error("group not committed rows=%d error=%s", len(group), error)
            return [error] * len(group)
        except InputError as error:
            if len(group) == 1:
                return [error]
            half = len(group) // 2
            return [*self._commit(group[:half]), *self._commit(group[half:])]
        except Exception:  # thread edge: logged whole, and the next group may do
            log.exception("group not committed rows=%d", len(group))
            return [UnavailableError("the write failed, the log says why")] * len(group)

    def _answer(self, group: Sequence[_Waiting], outcomes: Iterable[Outcome]) -> None:
        """Resolve every request that is complete, with one wake-up for each event loop."""
        done: list[_Request] = []
        for (_, request), outcome in zip(group, outcomes, strict=True):
            request.outcomes.append(outcome)
            if isinstance(outcome, UnavailableError):
                request.error = outcome
            request.num_waiting -= 1
            if not request.num_waiting:
                done.append(request)
        loops: dict[asyncio.AbstractEventLoop, list[_Request]] = {}
        for request in done:
            if isinstance(request.future, Future):
                _resolve(request)
            else:
                loops.setdefault(request.future.get_loop(), []).append(request)
        for loop, requests in loops.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve_all, requests)


def _resolve_all(requests: Sequence[_Request]) -> None:
    for request in requests:
        if not request.future.done():  # the client went away
            _resolve(request)


def _resolve(request: _Request) -> None:
    if request.error is not None:
        request.future.set_exception(request.error)
    else:
        request.future.set_result(tuple(request.outcomes))
