"""The table of checks. Every check that was made is kept, whatever it decided."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from perennial.infra.db import Base, UtcDateTime


class CheckRow(Base):
    """One check; (task, window_until, inputs_digest) names it, so a second run adds nothing."""

    __tablename__ = "checks"
    __table_args__ = (
        UniqueConstraint("task", "window_until", "inputs_digest", name="uq_checks_natural_key"),
        Index("ix_checks_task_id", "task", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    task: Mapped[str]
    window_since: Mapped[datetime] = mapped_column(UtcDateTime)
    window_until: Mapped[datetime] = mapped_column(UtcDateTime)
    reference_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    reference_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    num_current: Mapped[int]
    num_reference: Mapped[int]
    num_new_examples: Mapped[int]
    drift_distance: Mapped[float | None]
    drift_p_value: Mapped[float | None]
    thumbs_down_rate: Mapped[float | None]
    correction_rate: Mapped[float | None]
    decision: Mapped[str]
    # Any: JSON documents whose shape `check.scores` and `check.reasons_json` own.
    reasons: Mapped[list[Any]] = mapped_column(JSON)
    scores: Mapped[dict[str, Any]] = mapped_column(JSON)
    report_path: Mapped[str | None]
    inputs_digest: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
