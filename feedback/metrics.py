"""Counters and latencies for Prometheus, in a registry of the app's own.

Labels are route templates and codes, never what a client chose, so their number is bounded.
"""

import re
import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perennial.feedback.store import Stored
from perennial.infra.clock import new_id

_REQUEST_ID = "x-request-id"


class Metrics:
    """The instruments of one app."""

    def __init__(self) -> None:
        """Every app has its own registry: two in one process do not add up."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "perennial_http_requests",
            "Requests answered",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "perennial_http_request_seconds",
            "Time to the end of the answer",
            ("route",),
            registry=self.registry,
        )
        self.interactions = Counter(
            "perennial_interactions_stored", "Interactions stored", registry=self.registry
        )
        self.feedback = Counter(
            "perennial_feedback_stored",
            "Feedback stored",
            ("kind", "status"),
            registry=self.registry,
        )
        self.redacted = Counter(
            "perennial_redacted", "Texts redacted", ("label",), registry=self.registry
        )
        # Looking children up by their labels takes longer than counting.
        self._of_request: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def count_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """One more request answered."""
        labels = (route, method, status)
        found = self._of_request.get(labels)
        if found is None:
            counter = self.requests.labels(route, method, str(status))
            found = self._of_request[labels] = (counter, self.seconds.labels(route))
        counter, histogram = found
        counter.inc()
        histogram.observe(seconds)

    def count_redacted(self, counts: Mapping[str, int]) -> None:
        """What was taken out of one record, by class."""
        for label, num in counts.items():
            self.redacted.labels(label).inc(num)

    def count_interaction(self, stored: Stored) -> None:
        """One more, unless it was there before."""
        if not stored.is_replay:
            self.interactions.inc()

    def count_feedback(self, kind: str, stored: Stored) -> None:
        """One more of `kind`, unless it was there before."""
        if not stored.is_replay:
            self.feedback.labels(kind, stored.status).inc()


class Observe:
    """ASGI middleware: gives every request an id, counts it and takes its time.

    A client's own `X-Request-Id` is kept when it is short and plain; anything else could forge log
    lines.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wraps `app`."""
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status, start = 500, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            route = _route(scope)
            method = scope["method"] if route != "unmatched" else "any"
            self._metrics.requests.labels(route, method, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - start)


def _route(scope: Scope) -> str:
    """The template of the matched route; only FastAPI's own routes write theirs into the scope."""
    if "route" in scope:
        return str(scope["route"].path)
    endpoint = scope.get("endpoint")
    known = (r for r in scope["app"].routes if endpoint and getattr(r, "endpoint", 0) is endpoint)
    return str(getattr(next(known, None), "path", "unmatched"))


def _request_id(scope: Scope) -> str:
    sent = dict(scope["headers"]).get(_REQUEST_ID.encode(), b"").decode("latin-1")
    return sent if re.fullmatch(r"[A-Za-z0-9._\-]{1,64}", sent) else new_id("req")
