"""What a connection may cost before its request is known: bytes and seconds.

uvicorn bounds neither the head of a request nor the time it takes to arrive. Bodies are left to
`limits`.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 << 10


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol, for which a head too large or too slow is the end of the connection.

    Pass it to uvicorn as `http`.
    """

    head_timeout_s = 10.0
    _timer: asyncio.TimerHandle | None = None
    _num_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Give the first head its time."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes before a head ends: the parser keeps it however long it is."""
        super().data_received(data)
        if self._timer is not None:
            self._num_bytes += len(data)
            if self._num_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        """Give the next head its time."""
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """Start the request; a ValueError, which uvicorn answers with a 400, if it is too large."""
        self._stop_timer()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            raise ValueError(f"the head of a request may have {MAX_HEAD_BYTES} bytes, got {size}")
        super().on_headers_complete()

    def _expect_head(self) -> None:
        if self._timer is None:
            self._num_bytes = 0
            self._timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
