"""The JSON of the API: strict bodies in, records out, and what the OpenAPI says of both.

A body is checked for its shape here; the rules between fields are the records' own. An unknown
field is an error, because a misspelt one would lose a user's word in silence.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
)

from perennial.feedback.records import (
    ID_PATTERN,
    MAX_COUNT,
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_TAG_KEY_CHARS,
    MAX_TAG_VALUE_CHARS,
    MAX_TAGS,
    MAX_TEXT_CHARS,
    SIGNALS,
    Action,
    Feedback,
    Interaction,
    Message,
    Role,
    Signal,
    SourceKind,
    Target,
)

MAX_BATCH_ITEMS = 1_000
MAX_PAGE = 200
KEY_PATTERN = r"^[\x21-\x7e]{1,255}$"
# PostgreSQL text cannot hold NUL.
_NO_NUL = r"^[^\x00]*$"


def _only_iso_text(value: object) -> object:
    # pydantic would read a number, and a text of digits, as seconds since 1970.
    if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d[Tt ]", value):
        return value
    raise ValueError("a time is a text such as 2026-05-01T12:00:00Z")


Id = Annotated[str, StringConstraints(pattern=ID_PATTERN)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS, pattern=_NO_NUL)]
AnyText = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS, pattern=_NO_NUL)]
FilledText = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS, pattern=_NO_NUL)
]
TagKey = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_TAG_KEY_CHARS, pattern=_NO_NUL)
]
TagValue = Annotated[str, StringConstraints(max_length=MAX_TAG_VALUE_CHARS, pattern=_NO_NUL)]
Tags = Annotated[dict[TagKey, TagValue], Field(max_length=MAX_TAGS)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
# The validator hands over a Python text, which a strict datetime would refuse.
Time = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_only_iso_text)]


class Body(BaseModel):
    """Strict: no coercion, no unknown field, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class MessageBody(Body):
    """One turn of a conversation."""

    role: Role
    content: AnyText


Messages = Annotated[list[MessageBody], Field(min_length=1, max_length=MAX_MESSAGES)]


class InteractionBody(Body):
    """One answered request, as an app or the gateway reports it."""

    id: Id | None = Field(default=None, description="Chosen by the client, or given out if absent.")
    task: Name
    messages: Messages
    completion: AnyText
    model_version: Name
    route_role: Name = "external"
    subject: Name | None = None
    session: Name | None = None
    trace_id: Name | None = None
    num_prompt_tokens: Count | None = None
    num_completion_tokens: Count | None = None
    latency_ms: Annotated[float, Field(ge=0)] | None = None
    finish_reason: Name | None = None
    occurred_at: Time | None = None
    tags: Tags = Field(default_factory=dict)

    def to_record(self, *, id: str, tenant: str, received_at: datetime) -> Interaction:
        """The record, with what the server knows."""
        same = self.model_dump(exclude={"id", "messages", "occurred_at"})
        return Interaction(
            **same,
            id=self.id or id,
            tenant=tenant,
            messages=_messages(self.messages),
            occurred_at=_in_utc(self.occurred_at),
            received_at=received_at,
        )


class BinaryBody(Body):
    """Thumbs up or down."""

    kind: Literal["binary"]
    value: bool


class ScoreBody(Body):
    """A rating with its scale: min <= value <= max, min < max."""

    kind: Literal["score"]
    value: float
    min: float
    max: float


class LabelBody(Body):
    """A class name."""

    kind: Literal["label"]
    value: Name


class CorrectionBody(Body):
    """What the answer should have been."""

    kind: Literal["correction"]
    text: FilledText


class PreferenceBody(Body):
    """The better and the worse of two answers."""

    kind: Literal["preference"]
    chosen: FilledText
    rejected: FilledText


class DemonstrationBody(Body):
    """An expert's own answer."""

    kind: Literal["demonstration"]
    text: FilledText


class CommentBody(Body):
    """Free text."""

    kind: Literal["comment"]
    text: FilledText


class ImplicitBody(Body):
    """What a user did; `text` is the edited answer and comes with `edit` only."""

    kind: Literal["implicit"]
    action: Action
    text: FilledText | None = None


SignalBody = Annotated[
    BinaryBody
    | ScoreBody
    | LabelBody
    | CorrectionBody
    | PreferenceBody
    | DemonstrationBody
    | CommentBody
    | ImplicitBody,
    Field(discriminator="kind"),
]


class InteractionTarget(Body):
    """An interaction by its id, which the gateway also returns as the completion's id."""

    interaction_id: Id


class TraceTarget(Body):
    """The latest interaction of a trace."""

    trace_id: Name


class InlineTarget(Body):
    """A conversation that was not reported as an interaction."""

    task: Name
    messages: Messages
    completion: AnyText | None = None


def _target_tag(value: object) -> str | None:
    # Any: a parsed JSON object or one of the models themselves.
    known: Any = value if isinstance(value, Mapping) else getattr(value, "model_fields_set", ())
    for name in ("interaction_id", "trace_id", "messages"):
        if name in known:
            return name
    return None


TargetBody = Annotated[
    Annotated[InteractionTarget, Tag("interaction_id")]
    | Annotated[TraceTarget, Tag("trace_id")]
    | Annotated[InlineTarget, Tag("messages")],
    Discriminator(_target_tag),
]


class SourceBody(Body):
    """Who judged."""

    kind: SourceKind = "end_user"
    id: Name | None = None


class FeedbackBody(Body):
    """One signal about one answer."""

    target: TargetBody
    signal: SignalBody
    source: SourceBody = SourceBody()
    subject: Name | None = None
    may_train: bool = Field(default=True, description="Whether a model may learn from it.")
    occurred_at: Time | None = None
    tags: Tags = Field(default_factory=dict)

    def to_record(self, *, id: str, tenant: str, received_at: datetime) -> Feedback:
        """The record, with what the server knows."""
        target = self.target
        return Feedback(
            id=id,
            tenant=tenant,
            task=target.task if isinstance(target, InlineTarget) else None,
            target=_target(target),
            signal=_signal(self.signal),
            source_kind=self.source.kind,
            source_id=self.source.id,
            subject=self.subject,
            may_train=self.may_train,
            occurred_at=_in_utc(self.occurred_at),
            received_at=received_at,
            tags=self.tags,
        )


class BatchItemBody(FeedbackBody):
    """A feedback with an idempotency key of its own."""

    idempotency_key: Annotated[str, StringConstraints(pattern=KEY_PATTERN)] | None = None


class BatchBody(Body):
    """Feedback in bulk: 1 to 1,000 objects like `BatchItemBody`, each answered by itself."""

    # Any: an item is checked alone, so that a bad one does not cost its neighbours.
    items: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_BATCH_ITEMS)]


class PageQuery(BaseModel):
    """Where a page begins and how long it is; a misspelt parameter is an error here too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(
        default=0, description="`next_after` of the last page"
    )
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 50


class TaskPageQuery(PageQuery):
    """A page of one task, or of all."""

    task: Name | None = None


def payload_sha256(body: BaseModel) -> str:
    """SHA-256 of the body in one canonical form, so that spelling and field order do not matter."""
    content = body.model_dump(mode="json", exclude={"idempotency_key"})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _messages(bodies: list[MessageBody]) -> tuple[Message, ...]:
    return tuple(Message(role=m.role, content=m.content) for m in bodies)


def _signal(body: SignalBody) -> Signal:
    return SIGNALS[body.kind](**body.model_dump(exclude={"kind"}))


def _target(body: InteractionTarget | TraceTarget | InlineTarget) -> Target:
    if isinstance(body, InteractionTarget):
        return Target(interaction_id=body.interaction_id)
    if isinstance(body, TraceTarget):
        return Target(trace_id=body.trace_id)
    return Target(messages=_messages(body.messages), completion=body.completion)


def _in_utc(time: datetime | None) -> datetime | None:
    # The years at both ends would overflow in the conversion; the record refuses them.
    return time if time is None or not 1 < time.year < 9999 else time.astimezone(UTC)
