"""What every request gets: an id, security headers, a place in the metrics, a line in the log.

The line goes to the logger `perennial.access` while that is enabled for INFO. It holds the route's
template and sizes; never a body, a query, a path as sent or a key.
"""

import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perennial.feedback.metrics import Metrics
from perennial.infra.clock import new_id

access_log = logging.getLogger("perennial.access")

_Headers = list[tuple[bytes, bytes]]

_REQUEST_ID = b"x-request-id"
_FIXED: _Headers = [
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
_OWN_NAMES = frozenset(name for name, _ in _FIXED) | {_REQUEST_ID}
_PLAIN_ID = re.compile(rb"[A-Za-z0-9._\-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Observe:
    """ASGI middleware: names, counts, times, guards and logs every request.

    A client's own `X-Request-Id` is kept when it is short and plain; anything else could forge log
    lines.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wraps `app`."""
        self._app = app
        self._metrics = metrics
        self._templates: dict[object, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["request_id"] = _request_id(scope)
        request_id = scope["state"]["request_id"].encode()
        exchange = _Exchange(receive, send, [*_FIXED, (_REQUEST_ID, request_id)])
        start = time.perf_counter()
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            seconds = time.perf_counter() - start
            route = self._template(scope)
            method = _method(scope, route)
            self._metrics.count_request(route, method, exchange.status, seconds)
            if access_log.isEnabledFor(logging.INFO):
                _log(scope, route, method, seconds, exchange)

    def _template(self, scope: Scope) -> str:
        """The template of the matched route; only FastAPI's own routes write theirs into scope."""
        if "route" in scope:
            return str(scope["route"].path)
        endpoint = scope.get("endpoint")
        if endpoint is None:
            return "unmatched"
        if endpoint not in self._templates:
            routes = (r for r in scope["app"].routes if getattr(r, "endpoint", None) is endpoint)
            self._templates[endpoint] = str(getattr(next(routes, None), "path", "unmatched"))
        return self._templates[endpoint]


class _Exchange:
    """One request and its answer on their way through: headers are added, bytes counted."""

    __slots__ = ("_headers", "_receive", "_send", "bytes_in", "bytes_out", "status")

    def __init__(self, receive: Receive, send: Send, headers: _Headers) -> None:
        self._receive, self._send, self._headers = receive, send, headers
        self.status, self.bytes_in, self.bytes_out = 500, 0, 0

    async def receive(self) -> Message:
        message = await self._receive()
        self.bytes_in += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kept = [header for header in message["headers"] if header[0] not in _OWN_NAMES]
            message["headers"] = kept + self._headers
        else:
            self.bytes_out += len(message.get("body", b""))
        await self._send(message)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == _REQUEST_ID and _PLAIN_ID.fullmatch(value):
            return str(value, "ascii")
    return new_id("req")


def _method(scope: Scope, route: str) -> str:
    """The method, if it is a common one of a known route: others are any word of the client's."""
    is_known = route != "unmatched" and scope["method"] in _METHODS
    return str(scope["method"]) if is_known else "any"


def _log(scope: Scope, route: str, method: str, seconds: float, exchange: _Exchange) -> None:
    caller = scope["state"].get("principal")
    access_log.info(
        "method=%s route=%s status=%d ms=%.1f tenant=%s key_id=%s request_id=%s"
        " bytes_in=%d bytes_out=%d",
        method,
        route,
        exchange.status,
        seconds * 1000,
        caller.tenant if caller else "-",
        (caller and caller.key_id) or "-",
        scope["state"]["request_id"],
        exchange.bytes_in,
        exchange.bytes_out,
    )
