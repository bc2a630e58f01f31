"""What connections may cost before a request reaches the app: bytes, seconds, and their number.

uvicorn bounds neither the head of a request nor the time in which a request arrives, and refuses
what is too much without saying when to come back. The size of bodies is left to `limits`.
"""

import asyncio
import gc
import math
import signal
import socket
import sys

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from perennial.feedback.problems import MEDIA_TYPE, problem_of
from perennial.infra.errors import OverloadedError

MAX_HEAD_BYTES = 32 << 10
MAX_REQUESTS = 1024  # answered at the same time; one more would only wait, and cost memory
# uvloop takes one connection of a listener in each turn of a busy loop: a wave of new clients
# would wait for seconds.
_NUM_LISTENERS = 16


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
    gc.freeze()  # what is there now stays: no collection need look at it again
    uvicorn.Server(config).run(sockets=sockets)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol, for which a request too slow or of too large a head ends the connection.

    Pass it to uvicorn as `http`.
    """

    head_timeout_s = 10.0
    body_timeout_s = 60.0
    app: ASGIApp
    _timer: asyncio.TimerHandle | None = None
    _deadline = math.inf
    _num_head_bytes: int | None = None
    _num_new_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Give the first head its time."""
        super().connection_made(transport)
        self._hurry(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes before a head ends: the parser keeps it however long it is."""
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
        is_too_many = len(self.tasks) >= MAX_REQUESTS
        self.app = _overloaded if is_too_many else self.config.loaded_app
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The answer may take as long as it takes."""
        self._deadline = math.inf
        super().on_message_complete()

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
