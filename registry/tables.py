"""The registry's tables. Text of users is not here, save answers given to evaluation rows.

Rows of `live_log` are only ever added. Who reads and writes which table: `Ledger` the rounds,
`VersionStore` versions and membership, `EvaluationStore` the scores, `ChampionStore` the champion,
its log and the outbox, `Approvals` the approvals.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from perennial.infra.db import Base, UtcDateTime

Json = dict[str, Any]  # Any: JSON as its writer made it


class RoundRow(Base):
    """One retraining. `epoch` grows with every claim; a write with an older one is refused."""

    __tablename__ = "rounds"
    __table_args__ = (UniqueConstraint("task", "inputs_digest"), UniqueConstraint("task", "number"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    task: Mapped[str] = mapped_column(String(64))
    number: Mapped[int]
    reason: Mapped[str] = mapped_column(Text)
    inputs_digest: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    reasons: Mapped[list[str]] = mapped_column(JSON, default=list)
    opened_at: Mapped[datetime] = mapped_column(UtcDateTime)
    closed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    epoch: Mapped[int] = mapped_column(default=0)
    owner: Mapped[str | None] = mapped_column(String(255))
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)


class RoundStepRow(Base):
    """The result of a step of a round for one digest of its inputs."""

    __tablename__ = "round_steps"

    round_id: Mapped[str] = mapped_column(ForeignKey("rounds.id"), primary_key=True)
    step: Mapped[str] = mapped_column(String(64), primary_key=True)
    inputs_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    result: Mapped[Json] = mapped_column(JSON)
    epoch: Mapped[int]
    finished_at: Mapped[datetime] = mapped_column(UtcDateTime)


class VersionRow(Base):
    """A registered adapter."""

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("task", "number"),
        UniqueConstraint("round_id", "adapter_digest"),
    )

    name: Mapped[str] = mapped_column(String(80), primary_key=True)
    task: Mapped[str] = mapped_column(String(64))
    number: Mapped[int]
    adapter_digest: Mapped[str] = mapped_column(String(64))
    adapter_path: Mapped[str] = mapped_column(Text)
    base_digest: Mapped[str] = mapped_column(String(64))
    round_id: Mapped[str] = mapped_column(ForeignKey("rounds.id"))
    parent: Mapped[str | None] = mapped_column(ForeignKey("versions.name"))
    dataset_digest: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class MembershipRow(Base):
    """That a version was itself trained on an event; parents are followed when it is read."""

    __tablename__ = "membership"
    __table_args__ = (
        Index("ix_membership_event", "event_id"),
        Index("ix_membership_subject", "subject"),
    )

    version: Mapped[str] = mapped_column(ForeignKey("versions.name"), primary_key=True)
    event_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    subject: Mapped[str | None] = mapped_column(String(256))


class EvaluationRow(Base):
    """One model's answer and scores on one row of one suite, in one round."""

    __tablename__ = "evaluation_rows"

    round_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    suite: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[str] = mapped_column(String(80), primary_key=True)
    row_id: Mapped[str] = mapped_column(String(192), primary_key=True)
    cluster: Mapped[str] = mapped_column(String(256))
    score: Mapped[float | None]
    nll: Mapped[float | None]
    answer: Mapped[str | None] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)
    scored_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ChampionRow(Base):
    """Which version of a task is live; no version is the base model."""

    __tablename__ = "champions"

    task: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[str | None] = mapped_column(ForeignKey("versions.name"))
    row_version: Mapped[int]
    since: Mapped[datetime] = mapped_column(UtcDateTime)


class LiveLogRow(Base):
    """One change of a champion, never altered."""

    __tablename__ = "live_log"
    __table_args__ = (
        UniqueConstraint("task", "row_version"),
        Index("ix_live_log_task_at", "task", "at"),
    )

    decision_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    task: Mapped[str] = mapped_column(String(64))
    row_version: Mapped[int]
    kind: Mapped[str] = mapped_column(String(16))
    version: Mapped[str | None] = mapped_column(String(80))
    previous: Mapped[str | None] = mapped_column(String(80))
    decided_by: Mapped[str] = mapped_column(String(255))
    evidence_digest: Mapped[str | None] = mapped_column(String(64))
    reasons: Mapped[list[str]] = mapped_column(JSON)
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class OutboxRow(Base):
    """A change of a champion that MLflow has not been told of while `done_at` is empty."""

    __tablename__ = "outbox"
    __table_args__ = (UniqueConstraint("decision_id"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    task: Mapped[str] = mapped_column(String(64))
    decision_id: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    done_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class ApprovalRow(Base):
    """What a person was asked, and the answer."""

    __tablename__ = "approvals"
    __table_args__ = (Index("ix_approvals_task_state", "task", "state"),)

    version: Mapped[str] = mapped_column(ForeignKey("versions.name"), primary_key=True)
    task: Mapped[str] = mapped_column(String(64))
    round_id: Mapped[str] = mapped_column(String(64))
    expected: Mapped[str | None] = mapped_column(String(80))
    evidence_digest: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    requested_at: Mapped[datetime] = mapped_column(UtcDateTime)
    decided_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    decided_by: Mapped[str | None] = mapped_column(String(255))
    channel: Mapped[str | None] = mapped_column(String(32))
    note: Mapped[str | None] = mapped_column(Text)
