"""The tables of the feedback component: interactions, feedback, api_keys.

`seq` is the order in which rows became visible (see `sql_store`), so it can serve as a cursor. The
idempotency key and the digest of its payload live in the row they made: one commit, no drift. An
erased row keeps them and its id, and nothing else, so that a late retry does not bring it back.
"""

from datetime import datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column

from perennial.infra.db import Base, UtcDateTime

# SQLite gives out rowids to INTEGER keys only.
_Seq = BigInteger().with_variant(Integer, "sqlite")
_Name = String(256)
_Id = String(128)


class InteractionRow(Base):
    """One answered request."""

    __tablename__ = "interactions"
    __table_args__ = (
        UniqueConstraint("tenant", "id", name="uq_interactions_tenant_id"),
        UniqueConstraint("tenant", "idempotency_key", name="uq_interactions_tenant_key"),
        Index("ix_interactions_task_received_at", "task", "received_at"),
        Index("ix_interactions_tenant_trace_id", "tenant", "trace_id"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(_Seq, primary_key=True, autoincrement=True)
    tenant: Mapped[str] = mapped_column(_Name)
    id: Mapped[str] = mapped_column(_Id)
    task: Mapped[str] = mapped_column(_Name)
    messages: Mapped[list[dict[str, str]]] = mapped_column(JSON)
    completion: Mapped[str] = mapped_column(Text)
    model_version: Mapped[str] = mapped_column(_Name)
    route_role: Mapped[str] = mapped_column(_Name)
    subject: Mapped[str | None] = mapped_column(_Name)
    session: Mapped[str | None] = mapped_column(_Name)
    trace_id: Mapped[str | None] = mapped_column(_Name)
    num_prompt_tokens: Mapped[int | None] = mapped_column(Integer)
    num_completion_tokens: Mapped[int | None] = mapped_column(Integer)
    latency_ms: Mapped[float | None] = mapped_column(Float)
    finish_reason: Mapped[str | None] = mapped_column(_Name)
    received_at: Mapped[datetime] = mapped_column(UtcDateTime)
    occurred_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    tags: Mapped[dict[str, str]] = mapped_column(JSON)
    idempotency_key: Mapped[str | None] = mapped_column(String(300))
    payload_sha256: Mapped[str | None] = mapped_column(String(64))
    erased_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class FeedbackRow(Base):
    """One signal; `signal` and `target` are the JSON of the records, the rest is for queries."""

    __tablename__ = "feedback"
    __table_args__ = (
        UniqueConstraint("tenant", "id", name="uq_feedback_tenant_id"),
        UniqueConstraint("tenant", "idempotency_key", name="uq_feedback_tenant_key"),
        ForeignKeyConstraint(
            ("tenant", "interaction_id"),
            ("interactions.tenant", "interactions.id"),
            name="fk_feedback_interaction",
        ),
        Index("ix_feedback_task_joined_at", "task", "joined_at"),
        Index("ix_feedback_tenant_interaction_id", "tenant", "interaction_id"),
        Index("ix_feedback_target_interaction", "tenant", "status", "target_interaction_id"),
        Index("ix_feedback_target_trace", "tenant", "status", "target_trace_id"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(_Seq, primary_key=True, autoincrement=True)
    tenant: Mapped[str] = mapped_column(_Name)
    id: Mapped[str] = mapped_column(_Id)
    task: Mapped[str | None] = mapped_column(_Name)
    target_interaction_id: Mapped[str | None] = mapped_column(_Id)
    target_trace_id: Mapped[str | None] = mapped_column(_Name)
    target_messages: Mapped[list[dict[str, str]]] = mapped_column(JSON)
    target_completion: Mapped[str | None] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(String(32))
    signal: Mapped[dict[str, str | float | bool | None]] = mapped_column(JSON)
    source_kind: Mapped[str] = mapped_column(String(32))
    source_id: Mapped[str | None] = mapped_column(_Name)
    subject: Mapped[str | None] = mapped_column(_Name)
    may_train: Mapped[bool] = mapped_column(Boolean)
    status: Mapped[str] = mapped_column(String(16))
    interaction_id: Mapped[str | None] = mapped_column(_Id)
    received_at: Mapped[datetime] = mapped_column(UtcDateTime)
    joined_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    occurred_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    tags: Mapped[dict[str, str]] = mapped_column(JSON)
    idempotency_key: Mapped[str | None] = mapped_column(String(300))
    payload_sha256: Mapped[str | None] = mapped_column(String(64))
    erased_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class ApiKeyRow(Base):
    """One API key; of its secret only the SHA-256 is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(_Name)
    scopes: Mapped[list[str]] = mapped_column(JSON)
    secret_sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
