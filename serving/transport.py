"""What the gateway needs of HTTP itself: bounded bodies, streams, clients that go away."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import ExitStack
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from perennial.infra.errors import InputError, TooLargeError

_T = TypeVar("_T")


class EventStream(StreamingResponse):
    """A stream that ends its request, whichever way the connection ends."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        request_end: ExitStack,
        headers: dict[str, str],
    ) -> None:
        super().__init__(
            _chain(first, rest),
            media_type="text/event-stream",
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._rest = rest
        self._request_end = request_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, then end the request."""
        with self._request_end:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._rest.aclose()


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a JSON request.

    Raises:
        InputError: the content type is another.
        TooLargeError: there are more than `max_bytes`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page can send other kinds to a loopback address without asking the browser first.
        raise InputError("content-type must be application/json", param="content-type")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise TooLargeError(f"the body exceeds {max_bytes} bytes")
    return bytes(body)


async def unless_gone(request: Request, work: Awaitable[_T]) -> _T | None:
    """The result of `work`, or None when the client left; `work` is then cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece
