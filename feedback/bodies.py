"""The JSON that apps send: strict structs, and what the OpenAPI says of them.

A body is checked for its shape here; the rules between fields, and those on the characters of a
text, are the records' own. An unknown field is an error, because a misspelt one would lose a user's
word in silence.
"""

from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

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
    SourceKind,
    Target,
)
from perennial.infra.errors import InputError

MAX_BATCH_ITEMS = 1_000
KEY_PATTERN = r"^[\x21-\x7e]{1,255}$"
# Said in the OpenAPI and checked by the records: PostgreSQL text cannot hold NUL.
_NO_NUL = {"pattern": r"^[^\x00]*$"}

Id = Annotated[str, Meta(pattern=ID_PATTERN)]
Key = Annotated[str, Meta(pattern=KEY_PATTERN)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS, extra_json_schema=_NO_NUL)]
AnyText = Annotated[str, Meta(max_length=MAX_TEXT_CHARS, extra_json_schema=_NO_NUL)]
FilledText = Annotated[
    str, Meta(min_length=1, max_length=MAX_TEXT_CHARS, extra_json_schema=_NO_NUL)
]
TagKey = Annotated[str, Meta(min_length=1, max_length=MAX_TAG_KEY_CHARS, extra_json_schema=_NO_NUL)]
TagValue = Annotated[str, Meta(max_length=MAX_TAG_VALUE_CHARS, extra_json_schema=_NO_NUL)]
Tags = Annotated[dict[TagKey, TagValue], Meta(max_length=MAX_TAGS)]
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Latency = Annotated[float, Meta(ge=0)]
Time = Annotated[
    datetime, Meta(tz=True, description="RFC 3339 with its offset, such as 2026-05-01T12:00:00Z.")
]


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Strict: no coercion, no unknown field."""


class MessageBody(Body, frozen=True):
    """One turn of a conversation."""

    role: Role
    content: AnyText


Messages = Annotated[list[MessageBody], Meta(min_length=1, max_length=MAX_MESSAGES)]


class InteractionBody(Body, frozen=True):
    """One answered request, as an app or the gateway reports it.

    `id` is chosen by the client, or given out if absent.
    """

    task: Name
    messages: Messages
    completion: AnyText
    model_version: Name
    id: Id | None = None
    route_role: Name = "external"
    subject: Name | None = None
    session: Name | None = None
    trace_id: Name | None = None
    num_prompt_tokens: Count | None = None
    num_completion_tokens: Count | None = None
    latency_ms: Latency | None = None
    finish_reason: Name | None = None
    occurred_at: Time | None = None
    tags: Tags = {}

    def to_record(self, *, id: str, tenant: str, received_at: datetime) -> Interaction:
        """The record, with what the server knows; `id` where the client chose none."""
        return Interaction(
            id=self.id or id,
            tenant=tenant,
            task=self.task,
            messages=_messages(self.messages),
            completion=self.completion,
            model_version=self.model_version,
            route_role=self.route_role,
            subject=self.subject,
            session=self.session,
            trace_id=self.trace_id,
            num_prompt_tokens=self.num_prompt_tokens,
            num_completion_tokens=self.num_completion_tokens,
            latency_ms=self.latency_ms,
            finish_reason=self.finish_reason,
            received_at=received_at,
            occurred_at=self.occurred_at,
            tags=self.tags,
        )


class BinaryBody(Body, frozen=True, tag_field="kind", tag="binary"):
    """Thumbs up or down."""

    value: bool


class ScoreBody(Body, frozen=True, tag_field="kind", tag="score"):
    """A rating with its scale: min <= value <= max, min < max."""

    value: float
    min: float
    max: float


class LabelBody(Body, frozen=True, tag_field="kind", tag="label"):
    """A class name."""

    value: Name


class CorrectionBody(Body, frozen=True, tag_field="kind", tag="correction"):
    """What the answer should have been."""

    text: FilledText


class PreferenceBody(Body, frozen=True, tag_field="kind", tag="preference"):
    """The better and the worse of two answers."""

    chosen: FilledText
    rejected: FilledText


class DemonstrationBody(Body, frozen=True, tag_field="kind", tag="demonstration"):
    """An expert's own answer."""

    text: FilledText


class CommentBody(Body, frozen=True, tag_field="kind", tag="comment"):
    """Free text."""

    text: FilledText


class ImplicitBody(Body, frozen=True, tag_field="kind", tag="implicit"):
    """What a user did; `text` is the edited answer and comes with `edit` only."""

    action: Action
    text: FilledText | None = None


SignalBody = (
    BinaryBody
    | ScoreBody
    | LabelBody
    | CorrectionBody
    | PreferenceBody
    | DemonstrationBody
    | CommentBody
    | ImplicitBody
)


class TargetBody(Body, frozen=True):
    """Exactly one of `interaction_id`, `trace_id`, or `messages` with their `task`.

    An interaction's id is also the id of the completion that the gateway returned. A trace stands
    for its latest interaction. Messages are a conversation that was not reported as an interaction.
    """

    interaction_id: Id | None = None
    trace_id: Name | None = None
    task: Name | None = None
    messages: Messages | None = None
    completion: AnyText | None = None

    def to_record(self) -> Target:
        """The target; raises InputError unless it is exactly one."""
        if self.task is not None and self.messages is None:
            raise InputError("target.task comes with target.messages only")
        return Target(
            interaction_id=self.interaction_id,
            trace_id=self.trace_id,
            messages=_messages(self.messages) if self.messages else (),
            completion=self.completion,
        )


class SourceBody(Body, frozen=True):
    """Who judged."""

    kind: SourceKind = "end_user"
    id: Name | None = None


class FeedbackBody(Body, frozen=True):
    """One signal about one answer.

    `id` is chosen by the client, or given out if absent. `may_train` says whether a model may learn
    from it.
    """

    target: TargetBody
    signal: SignalBody
    id: Id | None = None
    source: SourceBody = SourceBody()
    subject: Name | None = None
    may_train: bool = True
    occurred_at: Time | None = None
    tags: Tags = {}

    def to_record(self, *, id: str, tenant: str, received_at: datetime) -> Feedback:
        """The record, with what the server knows; `id` where the client chose none."""
        signal = SIGNALS[self.signal.__struct_config__.tag]  # type: ignore[index]  # always a str
        return Feedback(
            id=self.id or id,
            tenant=tenant,
            task=self.target.task,
            target=self.target.to_record(),
            signal=signal(**msgspec.structs.asdict(self.signal)),
            source_kind=self.source.kind,
            source_id=self.source.id,
            subject=self.subject,
            may_train=self.may_train,
            occurred_at=self.occurred_at,
            received_at=received_at,
            tags=self.tags,
        )


class InteractionItemBody(InteractionBody, frozen=True):
    """An interaction of a batch, with an idempotency key of its own."""

    idempotency_key: Key | None = None


class FeedbackItemBody(FeedbackBody, frozen=True):
    """A feedback of a batch, with an idempotency key of its own."""

    idempotency_key: Key | None = None


class BatchBody(Body, frozen=True):
    """1 to 1,000 objects, each checked and answered by itself."""

    # Raw: a bad item must not cost its neighbours.
    items: Annotated[list[Raw], Meta(min_length=1, max_length=MAX_BATCH_ITEMS)]


def json_schemas(ref_template: str) -> dict[str, Any]:  # Any: JSON schema
    """The schema of each body by its name."""
    _, found = msgspec.json.schema_components(
        (InteractionBody, FeedbackBody, InteractionItemBody, FeedbackItemBody, BatchBody),
        ref_template=ref_template,
    )
    batch = found.pop("BatchBody")
    for kind in ("Interaction", "Feedback"):
        # A bad item gets an answer of its own, so anything may stand in its place.
        item = {"anyOf": [{"$ref": ref_template.format(name=f"{kind}ItemBody")}, {}]}
        items = {**batch["properties"]["items"], "items": item}
        found[f"{kind}BatchBody"] = {**batch, "properties": {"items": items}}
    return found


def _messages(bodies: list[MessageBody]) -> tuple[Message, ...]:
    return tuple([Message(role=m.role, content=m.content) for m in bodies])
