"""Records to rows and back, without loss: a record that is written and read is equal.

Writing gives plain tuples in the order of the columns, for whole groups at a time; reading takes
the ORM's rows.
"""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, cast

import msgspec

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
from perennial.feedback.store import About, Submission
from perennial.feedback.tables import FeedbackRow, InteractionRow

Value = str | int | float | bool | datetime | None
Row = tuple[Value, ...]

_NOT_SENT = ("seq", "erased_at")
INTERACTION_COLUMNS = tuple(
    c.key for c in InteractionRow.__table__.columns if c.key not in _NOT_SENT
)
FEEDBACK_COLUMNS = tuple(c.key for c in FeedbackRow.__table__.columns if c.key not in _NOT_SENT)

_SAME_IN_INTERACTION = tuple(
    name for name in Interaction.__struct_fields__ if name not in ("messages", "tags")
)
_SAME_IN_FEEDBACK = tuple(
    name for name in Feedback.__struct_fields__ if name not in ("target", "signal", "tags")
)
_NOT_IN_DIGEST = ("id", "tenant", "received_at")
_sent_interaction = attrgetter(
    *(name for name in Interaction.__struct_fields__ if name not in _NOT_IN_DIGEST)
)
_SET_BY_STORE = (*_NOT_IN_DIGEST, "status", "interaction_id", "joined_at")
_sent_feedback = attrgetter(
    *(name for name in Feedback.__struct_fields__ if name not in _SET_BY_STORE)
)
_encode = msgspec.json.Encoder(order="deterministic").encode


def payload_sha256(item: Interaction | Feedback, chosen_id: str | None) -> str:
    """SHA-256 of what a client sent, in one form: spelling and field order do not matter.

    `chosen_id` is the id if the client chose it; one that the server gave out is new in each try.
    It is taken after redaction, so that nothing of what was redacted reaches the disk.
    """
    if isinstance(item, Interaction):
        sent = ("interaction", _sent_interaction(item))
    else:
        sent = (item.signal.kind, _sent_feedback(item))
    return hashlib.sha256(_encode((chosen_id, *sent))).hexdigest()


def submission_of(item: Interaction | Feedback, key: str | None = None) -> Submission:
    """A record with an id of its own, to be stored once by it and by `key`."""
    return Submission(item=item, payload_sha256=payload_sha256(item, item.id), key=key)


def interaction_values(submission: Submission, now: datetime) -> Row:
    """The row to insert, in the order of `INTERACTION_COLUMNS`."""
    item = submission.item
    assert isinstance(item, Interaction)
    return (
        item.tenant,
        item.id,
        item.task,
        _message_json(item.messages),
        item.completion,
        item.model_version,
        item.route_role,
        item.subject,
        item.session,
        item.trace_id,
        item.num_prompt_tokens,
        item.num_completion_tokens,
        item.latency_ms,
        item.finish_reason,
        now,
        _utc(item.occurred_at),
        _encode(item.tags).decode(),
        submission.key,
        submission.payload_sha256,
    )


def feedback_values(submission: Submission, about: About | None, now: datetime) -> Row:
    """The row to insert, in the order of `FEEDBACK_COLUMNS`; `about` is its target, if known."""
    item = submission.item
    assert isinstance(item, Feedback)
    target = item.target
    is_joined = about is not None or target.is_inline
    return (
        item.tenant,
        item.id,
        about.task if about else item.task,
        target.interaction_id,
        target.trace_id,
        _message_json(target.messages),
        target.completion,
        item.signal.kind,
        _encode(item.signal).decode(),
        item.source_kind,
        item.source_id,
        item.subject,
        item.may_train,
        "joined" if is_joined else "pending",
        about.id if about else None,
        now,
        now if is_joined else None,
        _utc(item.occurred_at),
        _encode(item.tags).decode(),
        submission.key,
        submission.payload_sha256,
    )


def interaction_record(row: InteractionRow) -> Interaction:
    """The record that the row was made from."""
    same = {name: getattr(row, name) for name in _SAME_IN_INTERACTION}
    return Interaction(**same, messages=_messages(row.messages), tags=row.tags)


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


def signal_json(signal: Signal) -> Mapping[str, str | float | bool | None]:
    """The fields of a signal, without its kind."""
    return msgspec.structs.asdict(signal)


def _message_json(messages: tuple[Message, ...]) -> str:
    return _encode(messages).decode()


def _messages(items: list[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(role=cast(Role, m["role"]), content=m["content"]) for m in items)


def _utc(time: datetime | None) -> datetime | None:
    return None if time is None else time.astimezone(UTC)
