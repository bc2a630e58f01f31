"""Counters and latencies for Prometheus, in a registry of the app's own.

Labels are route templates and codes, never what a client chose, so their number is bounded.
"""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from perennial.feedback.store import Stored


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
        self._of_feedback: dict[tuple[str, str], Counter] = {}

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

    def watch(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Show what `read` says whenever somebody looks."""
        Gauge(name, meaning, registry=self.registry).set_function(read)

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
        if stored.is_replay:
            return
        labels = (kind, stored.status)
        found = self._of_feedback.get(labels)
        if found is None:
            found = self._of_feedback[labels] = self.feedback.labels(*labels)
        found.inc()
