"""What the API answers with: models of the response bodies, made from records."""

from datetime import datetime
from typing import Self

from msgspec.structs import asdict
from pydantic import BaseModel, Field

from perennial.feedback.records import (
    Feedback,
    Interaction,
    Message,
    Role,
    SourceKind,
    Status,
)
from perennial.feedback.rows import signal_json


class FieldProblem(BaseModel):
    """One field that cannot be accepted; the value itself is never repeated."""

    field: str
    reason: str


class Problem(BaseModel):
    """An error after RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None = None
    retry_after_s: float | None = None
    errors: list[FieldProblem] = Field(default_factory=list)


class InteractionCreated(BaseModel):
    """The interaction is on disk."""

    id: str


class FeedbackCreated(BaseModel):
    """The feedback is on disk; `pending` until its target is known."""

    id: str
    status: Status


class InteractionItemReply(BaseModel):
    """What became of one item: 201 stored, 200 stored before, else a problem."""

    index: int
    status: int
    interaction: InteractionCreated | None
    problem: Problem | None


class FeedbackItemReply(BaseModel):
    """What became of one item: 201 stored, 200 stored before, else a problem."""

    index: int
    status: int
    feedback: FeedbackCreated | None
    problem: Problem | None


class InteractionBatchReply(BaseModel):
    """One reply for each item, in their order."""

    items: list[InteractionItemReply]


class FeedbackBatchReply(BaseModel):
    """One reply for each item, in their order."""

    items: list[FeedbackItemReply]


class MessageReply(BaseModel):
    """One turn."""

    role: Role
    content: str


class InteractionReply(BaseModel):
    """A stored interaction."""

    id: str
    task: str
    messages: list[MessageReply]
    completion: str
    model_version: str
    route_role: str
    subject: str | None
    session: str | None
    trace_id: str | None
    num_prompt_tokens: int | None
    num_completion_tokens: int | None
    latency_ms: float | None
    finish_reason: str | None
    received_at: datetime
    occurred_at: datetime | None
    tags: dict[str, str]

    @classmethod
    def of(cls, item: Interaction) -> Self:
        """Everything but the tenant, which the caller is."""
        content = asdict(item)
        del content["tenant"]
        return cls(**{**content, "messages": _messages(item.messages)})


class TargetReply(BaseModel):
    """What the feedback is about, as it was sent."""

    interaction_id: str | None
    trace_id: str | None
    messages: list[MessageReply]
    completion: str | None


class SourceReply(BaseModel):
    """Who judged."""

    kind: SourceKind
    id: str | None


class FeedbackReply(BaseModel):
    """A stored feedback."""

    id: str
    task: str | None
    target: TargetReply
    signal: dict[str, str | bool | float | None]
    source: SourceReply
    subject: str | None
    may_train: bool
    status: Status
    interaction_id: str | None
    received_at: datetime
    joined_at: datetime | None
    occurred_at: datetime | None
    tags: dict[str, str]

    @classmethod
    def of(cls, item: Feedback) -> Self:
        """Everything but the tenant, which the caller is."""
        nested = ("tenant", "target", "signal", "source_kind", "source_id")
        same = {name: value for name, value in asdict(item).items() if name not in nested}
        target = {**asdict(item.target), "messages": _messages(item.target.messages)}
        return cls(
            **same,
            target=TargetReply(**target),
            signal={"kind": item.signal.kind, **signal_json(item.signal)},
            source=SourceReply(kind=item.source_kind, id=item.source_id),
        )


class InteractionPage(BaseModel):
    """Interactions in the order they became visible; go on with `after=next_after`."""

    items: list[InteractionReply]
    next_after: int


class FeedbackPage(BaseModel):
    """Feedback in the order they became visible; go on with `after=next_after`."""

    items: list[FeedbackReply]
    next_after: int


class Erased(BaseModel):
    """How many rows were emptied by this call."""

    num_rows: int


class Health(BaseModel):
    """Alive, or ready."""

    status: str = "ok"


def _messages(messages: tuple[Message, ...]) -> list[MessageReply]:
    return [MessageReply(role=each.role, content=each.content) for each in messages]
