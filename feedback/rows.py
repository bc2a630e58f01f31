"""Records to rows and back, without loss: `to_record(to_row(x)) == x`."""

from dataclasses import fields
from typing import Any, cast

from perennial.feedback.records import (
    SIGNALS,
    Feedback,
    Interaction,
    Message,
    Role,
    Signal,
    SourceKind,
    Status,
    Target,
)
from perennial.feedback.store import IdempotencyKey
from perennial.feedback.tables import FeedbackRow, InteractionRow

_SAME_IN_INTERACTION = tuple(
    f.name for f in fields(Interaction) if f.name not in ("messages", "tags")
)
_SAME_IN_FEEDBACK = tuple(
    f.name for f in fields(Feedback) if f.name not in ("target", "signal", "tags")
)


def interaction_row(item: Interaction, key: IdempotencyKey | None) -> InteractionRow:
    """A row to insert."""
    same = {name: getattr(item, name) for name in _SAME_IN_INTERACTION}
    return InteractionRow(
        **same,
        messages=_message_json(item.messages),
        tags=dict(item.tags),
        **_key_columns(key),
    )


def interaction_record(row: InteractionRow) -> Interaction:
    """The record that the row was made from."""
    same = {name: getattr(row, name) for name in _SAME_IN_INTERACTION}
    return Interaction(**same, messages=_messages(row.messages), tags=row.tags)


def feedback_row(item: Feedback, key: IdempotencyKey | None) -> FeedbackRow:
    """A row to insert."""
    same = {name: getattr(item, name) for name in _SAME_IN_FEEDBACK}
    return FeedbackRow(
        **same,
        target_interaction_id=item.target.interaction_id,
        target_trace_id=item.target.trace_id,
        target_messages=_message_json(item.target.messages),
        target_completion=item.target.completion,
        kind=item.signal.kind,
        signal=signal_json(item.signal),
        tags=dict(item.tags),
        **_key_columns(key),
    )


def feedback_record(row: FeedbackRow) -> Feedback:
    """The record that the row was made from."""
    same = {name: getattr(row, name) for name in _SAME_IN_FEEDBACK}
    same["source_kind"] = cast(SourceKind, row.source_kind)
    same["status"] = cast(Status, row.status)
    target = Target(
        interaction_id=row.target_interaction_id,
        trace_id=row.target_trace_id,
        messages=_messages(row.target_messages),
        completion=row.target_completion,
    )
    # Any: the fields of a signal are as many types as there are kinds.
    signal = SIGNALS[row.kind](**cast(Any, row.signal))
    return Feedback(**same, target=target, signal=signal, tags=row.tags)


def signal_json(signal: Signal) -> dict[str, str | float | bool | None]:
    """The fields of a signal, without its kind."""
    return {f.name: getattr(signal, f.name) for f in fields(signal)}


def _key_columns(key: IdempotencyKey | None) -> dict[str, str | None]:
    return {
        "idempotency_key": key.value if key else None,
        "payload_sha256": key.payload_sha256 if key else None,
    }


def _message_json(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _messages(items: list[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(role=cast(Role, m["role"]), content=m["content"]) for m in items)
