"""What connections may cost before a request reaches the app: bytes, seconds, and their number.

uvicorn bounds neither the head of a request nor the time in which a request arrives, and refuses
what is too much without saying when to come back. The size of bodies is left to `limits`.

Beyond `max_requests` a connection is not read until one of them has ended: to refuse costs almost
what an answer costs, so a server that refuses twice what it can answer answers half of it. Only who
would wait too long, or would cost too much memory, is refused.
"""

import asyncio
import gc
import math
import signal
import socket
import sys
from collections import deque
from dataclasses import dataclass, field

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from perennial.feedback.problems import MEDIA_TYPE, problem_of
from perennial.infra.errors import OverloadedError

MAX_HEAD_BYTES = 32 << 10
# uvloop takes one connection of a listener in each turn of a busy loop: a wave of new clients
# would wait for seconds.
_NUM_LISTENERS = 16
# The writer gives the interpreter's lock away with each statement, and a busy event loop keeps it
# for all of this time: at Python's own 5 ms that is most of what a group of batches takes.
_SWITCH_S = 0.0005


def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Answer on `listener` until SIGTERM or Ctrl-C, then finish what was begun within 8 seconds."""
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        loop="uvloop",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # who we answer to is told by the key, not by the address
        timeout_graceful_shutdown=8,
        timeout_keep_alive=75,  # above that of common load balancers
    )
    sockets = [listener.dup() for _ in range(_NUM_LISTENERS)]
    listener.close()  # else the kernel lets clients in while the rest drains, and cuts them off
    # uvicorn raises the signal again when it has drained: a stop that was asked for is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()  # what is there now stays: no collection need look at it again
    uvicorn.Server(config).run(sockets=sockets)


@dataclass(kw_only=True, slots=True)
class _Queue:
    """The connections of one server that wait for their turn, the first first."""

    waiting: "deque[BoundedHttp]" = field(default_factory=deque)
    num_bytes: int = 0


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol, for which a request too slow or of too large a head ends the connection.

    Pass it to uvicorn as `http`.
    """

    head_timeout_s = 10.0
    body_timeout_s = 60.0
    held_timeout_s = 5.0
    max_requests = 1024  # answered at the same time; one more would only cost memory
    max_held_bytes = 16 << 20  # read from connections that wait
    app: ASGIApp
    _held: bytes | None = None
    _timer: asyncio.TimerHandle | None = None
    _deadline = math.inf
    _num_head_bytes: int | None = None
    _num_new_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Give the first head its time."""
        super().connection_made(transport)
        self._queue: _Queue = vars(self.server_state).setdefault("queue", _Queue())
        self._hurry(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time, and what was held."""
        if self._timer is not None:
            self._timer.cancel()
        self._take_held()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes before a head ends: the parser keeps it however long it is."""
        if self._held is not None or self._must_wait(data):
            self._hold(data)
            return
        self._num_new_bytes = len(data)
        super().data_received(data)
        if self._num_head_bytes is not None:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        """Give the head its time."""
        super().on_message_begin()
        self._num_head_bytes = 0
        self._hurry(self.head_timeout_s)

    def on_headers_complete(self) -> None:
        """Start the request; a ValueError, which uvicorn answers with a 400, if it is too large."""
        most = self._num_new_bytes + (self._num_head_bytes or 0)
        self._num_head_bytes = None
        self._hurry(self.body_timeout_s)
        if most > MAX_HEAD_BYTES:
            self._check_head()
        is_too_many = len(self.tasks) >= self.max_requests
        self.app = _overloaded if is_too_many else self._run
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The answer may take as long as it takes."""
        self._deadline = math.inf
        super().on_message_complete()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None  # uvicorn's; its own callback, added before, forgets it
        task.add_done_callback(self._let_go_on)
        await self.config.loaded_app(scope, receive, send)

    def _let_go_on(self, _: object) -> None:
        while self._queue.waiting and len(self.tasks) < self.max_requests:
            self._queue.waiting.popleft().go_on()

    def _must_wait(self, data: bytes) -> bool:
        if len(self.tasks) < self.max_requests or self._num_head_bytes is not None:
            return False
        is_first = self.cycle is None
        is_between = is_first or self.cycle.response_complete
        return is_between and self._queue.num_bytes + len(data) <= self.max_held_bytes

    def _hold(self, data: bytes) -> None:
        """Read no more until it is this connection's turn."""
        if self._held is None:
            self.flow.pause_reading()
            self._queue.waiting.append(self)
            self._hurry(self.held_timeout_s)
        self._held = (self._held or b"") + data
        self._queue.num_bytes += len(data)

    def _take_held(self) -> bytes:
        data, self._held = self._held or b"", None
        self._queue.num_bytes -= len(data)
        return data

    def go_on(self) -> None:
        """Go on where this connection was held."""
        if self._held is not None:
            data = self._take_held()
            self.flow.resume_reading()
            self._hurry(self.head_timeout_s)
            self.data_received(data)

    def _check_head(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            raise ValueError(f"the head of a request may have {MAX_HEAD_BYTES} bytes, got {size}")

    def _hurry(self, seconds: float) -> None:
        """Set the deadline. A timer for each would cost more than all else that is done here."""
        self._deadline = self.loop.time() + seconds
        if self._timer is None or self._timer.when() > self._deadline:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(self._deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self.loop.time() >= self._deadline:
            if self._held is not None:
                self.transport.write(_CLOSING_REFUSAL)
            self.transport.close()
        elif self._deadline < math.inf:
            self._set_timer()


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse before anything else is done: at such a time every microsecond counts."""
    await send({"type": "http.response.start", "status": 503, "headers": _REFUSAL_HEADERS})
    await send({"type": "http.response.body", "body": _REFUSAL})


_REFUSAL = (
    problem_of(OverloadedError("too many requests at once", retry_after_s=1))
    .model_dump_json()
    .encode()
)
_REFUSAL_HEADERS = [
    (b"content-type", MEDIA_TYPE.encode()),
    (b"content-length", str(len(_REFUSAL)).encode()),
    (b"retry-after", b"1"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
]
_CLOSING_REFUSAL = b"\r\n".join(
    [b"HTTP/1.1 503 Service Unavailable"]
    + [name + b": " + value for name, value in [*_REFUSAL_HEADERS, (b"connection", b"close")]]
    + [b"", _REFUSAL]
)
