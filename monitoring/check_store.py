"""Keeps checks, so that "why did it retrain in March?" has an answer.

Adding a check twice keeps the first. Reports lie in folders; only their path is kept here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from perennial.infra.clock import Clock, new_id
from perennial.infra.db import Database
from perennial.infra.errors import NotFoundError
from perennial.monitoring.check import CheckResult, decision_name, reasons_json, scores
from perennial.monitoring.policy import Reason, ReasonCode
from perennial.monitoring.tables import CheckRow


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCheck:
    """A check as it was kept.

    Attributes:
        scores: the document of `check.scores`.
    """

    id: str
    task: str
    window_since: datetime
    window_until: datetime
    reference_since: datetime | None
    reference_until: datetime | None
    num_current: int
    num_reference: int
    num_new_examples: int
    drift_p_value: float | None
    thumbs_down_rate: float | None
    correction_rate: float | None
    decision: Literal["retrain", "hold"]
    reasons: tuple[Reason, ...]
    scores: Mapping[str, Any]  # JSON edge
    report_path: Path | None
    inputs_digest: str
    created_at: datetime


class SqlCheckStore:
    """Checks in the database."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    def add(self, task: str, result: CheckResult, *, report_path: Path | None) -> StoredCheck:
        """The check as kept; when the same rows were checked before, that first check."""
        values = _values(task, result, report_path, self._clock())
        dialect = sqlite if self._db.dialect == "sqlite" else postgresql
        with self._db.write() as session:
            session.execute(dialect.insert(CheckRow).values(**values).on_conflict_do_nothing())
            row = session.execute(
                select(CheckRow).where(
                    CheckRow.task == task,
                    CheckRow.window_until == result.split.current.until,
                    CheckRow.inputs_digest == result.inputs_digest,
                )
            ).scalar_one()
            return _stored(row)

    def get(self, check_id: str) -> StoredCheck:
        """The check of this id.

        Raises:
            NotFoundError: there is none.
        """
        with self._db.read() as session:
            row = session.get(CheckRow, check_id)
            if row is None:
                raise NotFoundError(f"no check {check_id}", check_id=check_id)
            return _stored(row)

    def latest(self, task: str) -> StoredCheck | None:
        """The newest check of `task`, or None before the first."""
        newest = self.list_checks(task, limit=1)
        return newest[0] if newest else None

    def list_checks(self, task: str, *, limit: int) -> tuple[StoredCheck, ...]:
        """At most `limit` checks of `task`, newest first."""
        query = (
            select(CheckRow).where(CheckRow.task == task).order_by(CheckRow.id.desc()).limit(limit)
        )
        with self._db.read() as session:
            return tuple(_stored(row) for row in session.execute(query).scalars())


# Any: one value per column, checked by the table.
def _values(
    task: str, result: CheckResult, report_path: Path | None, now: datetime
) -> dict[str, Any]:
    current, reference = result.split.current, result.split.reference
    evidence = result.evidence
    return {
        "id": new_id("chk"),
        "task": task,
        "window_since": current.since,
        "window_until": current.until,
        "reference_since": reference.since if reference else None,
        "reference_until": reference.until if reference else None,
        "num_current": evidence.num_current,
        "num_reference": evidence.num_reference,
        "num_new_examples": evidence.num_new_examples,
        "drift_distance": evidence.drift.distance if evidence.drift else None,
        "drift_p_value": evidence.drift.p_value if evidence.drift else None,
        "thumbs_down_rate": evidence.current.thumbs_down.value,
        "correction_rate": evidence.current.correction.value,
        "decision": decision_name(result.decision),
        "reasons": reasons_json(result.decision.reasons),
        "scores": scores(result),
        "report_path": None if report_path is None else str(report_path),
        "inputs_digest": result.inputs_digest,
        "created_at": now,
    }


def _stored(row: CheckRow) -> StoredCheck:
    return StoredCheck(
        id=row.id,
        task=row.task,
        window_since=row.window_since,
        window_until=row.window_until,
        reference_since=row.reference_since,
        reference_until=row.reference_until,
        num_current=row.num_current,
        num_reference=row.num_reference,
        num_new_examples=row.num_new_examples,
        drift_p_value=row.drift_p_value,
        thumbs_down_rate=row.thumbs_down_rate,
        correction_rate=row.correction_rate,
        decision=cast(Literal["retrain", "hold"], row.decision),
        reasons=tuple(
            Reason(code=ReasonCode(item["code"]), text=item["text"]) for item in row.reasons
        ),
        scores=row.scores,
        report_path=None if row.report_path is None else Path(row.report_path),
        inputs_digest=row.inputs_digest,
        created_at=row.created_at,
    )
