"""Interactions and feedback as they are sent: pure builders of JSON bodies.

What a field may hold is the server's to check; docs/api.md describes every one.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NewType, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Unpack

Json = dict[str, Any]  # Any: JSON
Kind = Literal["interactions", "feedback"]
Role = Literal["system", "developer", "user", "assistant", "tool"]
SourceKind = Literal["end_user", "annotator", "llm_judge", "code"]
Action = Literal["copy", "regenerate", "accept", "edit", "abandon", "retry"]

KINDS: tuple[Kind, ...] = ("interactions", "feedback")
"""In the order in which they are sent, so that feedback finds its interaction."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


Signal = NewType("Signal", Json)
"""What somebody thought of an answer; made by one of the eight functions below."""

Target = NewType("Target", Json)
"""What a feedback is about; an interaction's id is given as it is."""


def thumb(*, up: bool) -> Signal:
    """Thumbs up or down."""
    return Signal({"kind": "binary", "value": up})


def score(value: float, *, min: float, max: float) -> Signal:
    """A rating with its scale."""
    return Signal({"kind": "score", "value": value, "min": min, "max": max})


def label(value: str) -> Signal:
    """A class name, such as `refusal` or `off_topic`."""
    return Signal({"kind": "label", "value": value})


def correction(text: str) -> Signal:
    """What the answer should have been."""
    return Signal({"kind": "correction", "text": text})


def preference(*, chosen: str, rejected: str) -> Signal:
    """The better and the worse of two answers."""
    return Signal({"kind": "preference", "chosen": chosen, "rejected": rejected})


def demonstration(text: str) -> Signal:
    """An expert's own answer."""
    return Signal({"kind": "demonstration", "text": text})


def comment(text: str) -> Signal:
    """Free text for people to read."""
    return Signal({"kind": "comment", "text": text})


def implicit(action: Action, *, text: str | None = None) -> Signal:
    """What a user did; `text` is the edited answer and comes with `edit` only."""
    return Signal(_without_none({"kind": "implicit", "action": action, "text": text}))


def trace(trace_id: str) -> Target:
    """The latest interaction of a trace."""
    return Target({"trace_id": trace_id})


def inline(*, task: str, messages: Sequence[Message], completion: str | None = None) -> Target:
    """A conversation that was not reported as an interaction."""
    content = {"task": task, "messages": list(messages), "completion": completion}
    return Target(_without_none(content))


class _InteractionNeeds(TypedDict):
    task: str
    messages: Sequence[Message]
    completion: str
    model_version: str


class InteractionFields(_InteractionNeeds, total=False):
    """What can be said of an interaction; without `id` it is given one here."""

    id: str
    route_role: str
    subject: str | None
    session: str | None
    trace_id: str | None
    num_prompt_tokens: int | None
    num_completion_tokens: int | None
    latency_ms: float | None
    finish_reason: str | None
    occurred_at: datetime | None
    tags: Mapping[str, str]
    idempotency_key: str | None


class FeedbackFields(TypedDict, total=False):
    """What can be said of a feedback beside its target and its signal."""

    id: str
    source_kind: SourceKind
    source_id: str | None
    subject: str | None
    may_train: bool
    occurred_at: datetime | None
    tags: Mapping[str, str]
    idempotency_key: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One interaction or feedback with the key under which the server stores it once."""

    kind: Kind
    key: str
    body: Json

    @property
    def keyed_body(self) -> Json:
        """As an item of a batch."""
        return {**self.body, "idempotency_key": self.key}


def interaction(**fields: Unpack[InteractionFields]) -> Item:
    """One answered request."""
    body = _without_none({"id": new_interaction_id(), **fields})
    key = body.pop("idempotency_key", None) or uuid.uuid4().hex
    return Item(kind="interactions", key=key, body=_plain(body))


def feedback(target: str | Target, signal: Signal, **fields: Unpack[FeedbackFields]) -> Item:
    """One signal about one answer; a `target` that is a text is the id of an interaction."""
    body = _without_none(dict(fields))
    key = body.pop("idempotency_key", None) or uuid.uuid4().hex
    kind, id = body.pop("source_kind", "end_user"), body.pop("source_id", None)
    body["source"] = _without_none({"kind": kind, "id": id})
    body["target"] = {"interaction_id": target} if isinstance(target, str) else target
    body["signal"] = signal
    return Item(kind="feedback", key=key, body=_plain(body))


def new_interaction_id() -> str:
    """An id that no other interaction has."""
    return f"int_{uuid.uuid4().hex}"


def encode(body: Json) -> bytes:
    """`body` as JSON on one line; ValueError for NaN and for what UTF-8 cannot hold."""
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def _plain(body: Json) -> Json:
    time = body.get("occurred_at")
    if time is None:
        return body
    if time.utcoffset() is None:
        raise ValueError(f"occurred_at must know its time zone, got {time!r}")
    return {**body, "occurred_at": time.isoformat()}


def _without_none(body: Json) -> Json:
    return {name: value for name, value in body.items() if value is not None}
