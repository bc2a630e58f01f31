"""The requests that are sent: one event as each server wants it, ready for the wire but its marker.

The same event everywhere: a person corrected an answer. With its JSON it has 1,024 bytes.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rig.load import PLACE

EVENT_BYTES = 1024
BATCH_ITEMS = 100
NUM_TEMPLATES = 64
_WORDS = ("warranty", "the", "battery", "lasts", "two", "years", "and", "returns", "are", "free")


def feedback(port: int, targets: Sequence[str], key: str, rng: random.Random) -> tuple[str, ...]:
    """Single feedback about one of `targets`, an interaction id each."""
    bodies = [_correction(targets[n % len(targets)], rng) for n in range(NUM_TEMPLATES)]
    return tuple(_request(port, "/v1/feedback", body, _ours(key)) for body in bodies)


def interactions(port: int, key: str, rng: random.Random) -> tuple[str, ...]:
    """Single interactions, their ids chosen by the client."""

    def body(text: str) -> dict[str, Any]:
        return {
            "id": f"int_{PLACE}",
            "task": "assistant",
            "messages": [{"role": "user", "content": "How long is the warranty?"}],
            "completion": text,
            "model_version": "assistant-v1-0a1b2c3d",
            "subject": f"s-{PLACE}",
            "tags": {"event": PLACE},
        }

    bodies = [_sized(body, rng) for _ in range(NUM_TEMPLATES)]
    return tuple(_request(port, "/v1/interactions", body, _ours(key)) for body in bodies)


def batches(port: int, targets: Sequence[str], key: str, rng: random.Random) -> tuple[str, ...]:
    """100 corrections at a time, each as large as a single one."""
    events = [_correction(targets[n % len(targets)], rng) for n in range(BATCH_ITEMS)]
    return _batch(port, events, key)


def thumbs(port: int, targets: Sequence[str], key: str) -> tuple[str, ...]:
    """100 votes at a time, the smallest event there is."""
    events = [
        {
            "target": {"interaction_id": targets[n % len(targets)]},
            "signal": {"kind": "binary", "value": n % 3 > 0},
            "subject": f"s-{PLACE}",
            "tags": {"event": PLACE},
        }
        for n in range(BATCH_ITEMS)
    ]
    return _batch(port, events, key)


def item_marker(marker: str, index: int) -> str:
    """The marker of one item of a batch."""
    return f"{marker}-{chr(97 + index // 26)}{chr(97 + index % 26)}"


def mlflow_feedback(port: int, traces: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """What `mlflow.log_feedback` sends (rest_store.create_assessment)."""

    def request(trace: str) -> str:
        def body(text: str) -> dict[str, Any]:
            return {
                "assessment": {
                    "assessment_name": "correction",
                    "trace_id": trace,
                    "source": {"source_type": "HUMAN", "source_id": f"s-{PLACE}"},
                    "create_time": "2026-05-01T12:00:00.000Z",
                    "last_update_time": "2026-05-01T12:00:00.000Z",
                    "feedback": {"value": text},
                    "metadata": {"event": PLACE},
                    "valid": True,
                }
            }

        return _request(port, f"/api/3.0/mlflow/traces/{trace}/assessments", _sized(body, rng), {})

    return tuple(request(traces[n % len(traces)]) for n in range(NUM_TEMPLATES))


def phoenix_annotation(port: int, spans: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """One span annotation a request, answered when it is stored (`sync=true`)."""

    def request(span: str) -> str:
        def body(text: str) -> dict[str, Any]:
            annotation = {
                "span_id": span,
                "name": "correction",
                "annotator_kind": "HUMAN",
                "identifier": f"s-{PLACE}",
                "result": {"label": "corrected", "explanation": text},
                "metadata": {"event": PLACE},
            }
            return {"data": [annotation]}

        return _request(port, "/v1/span_annotations?sync=true", _sized(body, rng), {})

    return tuple(request(spans[n % len(spans)]) for n in range(NUM_TEMPLATES))


def _correction(target: str, rng: random.Random) -> dict[str, Any]:
    def body(text: str) -> dict[str, Any]:
        return {
            "target": {"interaction_id": target},
            "signal": {"kind": "correction", "text": text},
            "subject": f"s-{PLACE}",
            "tags": {"event": PLACE},
        }

    return _sized(body, rng)


def _batch(port: int, events: Sequence[dict[str, Any]], key: str) -> tuple[str, ...]:
    items = [
        {**event, "tags": {"event": item_marker(PLACE, index)}}
        for index, event in enumerate(events)
    ]
    return (_request(port, "/v1/feedback/batch", {"items": items}, _ours(key)),)


def _sized(make: Callable[[str], dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    """The body whose JSON has EVENT_BYTES bytes."""
    room = EVENT_BYTES - len(json.dumps(make("")))
    text = " ".join(rng.choices(_WORDS, k=room // 2))[:room]
    return make(text)


def _ours(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Idempotency-Key": f"bench-{PLACE}"}


def _request(port: int, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> str:
    content = json.dumps(body)
    fields = {
        "Host": f"127.0.0.1:{port}",
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        **headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n{content}"
