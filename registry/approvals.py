"""Questions to a person: may this version go live, and what was the answer.

The first answer stands. Where it came from (the command line, a tag in MLflow) is kept. Promoting
what was approved is left to `champion`, which looks again at what is live.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import select

from perennial.infra.clock import Clock
from perennial.infra.db import Database
from perennial.infra.errors import ConflictError, NotFoundError
from perennial.registry.tables import ApprovalRow
from perennial.registry.version_store import get_row, move
from perennial.registry.versions import VersionState


class ApprovalState(StrEnum):
    """The answer so far."""

    PENDING = "pending"
    APPROVED = "approved"
    REJECTED = "rejected"


@dataclass(frozen=True, kw_only=True, slots=True)
class Approval:
    """A question and its answer; `expected` is the champion that the evidence was made against."""

    version: str
    task: str
    round_id: str
    expected: str | None
    evidence_digest: str
    state: ApprovalState
    requested_at: datetime
    decided_at: datetime | None
    decided_by: str | None
    channel: str | None
    note: str | None


class Approvals:
    """Asks and answers."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def request(self, version: str, *, expected: str | None, evidence_digest: str) -> Approval:
        """The question about a version, asked now or found again with its answer.

        Raises:
            NotFoundError: there is no such version.
            ConflictError: it was asked on other evidence.
        """
        with self._database.write() as session:
            known = session.get(ApprovalRow, version)
            if known is not None:
                if (known.expected, known.evidence_digest) != (expected, evidence_digest):
                    raise ConflictError(f"{version} waits for approval on other evidence")
                return _to_approval(known)
            about = get_row(session, version)
            row = ApprovalRow(
                version=version,
                task=about.task,
                round_id=about.round_id,
                expected=expected,
                evidence_digest=evidence_digest,
                state=ApprovalState.PENDING,
                requested_at=self._clock(),
            )
            session.add(row)
            session.flush()
            return _to_approval(row)

    def get(self, version: str) -> Approval:
        """The question about a version.

        Raises:
            NotFoundError: nobody was asked about it.
        """
        with self._database.read() as session:
            return _to_approval(_found(session.get(ApprovalRow, version), version))

    def pending(self, task: str) -> tuple[Approval, ...]:
        """Questions without an answer, oldest first."""
        query = select(ApprovalRow).filter_by(task=task, state=ApprovalState.PENDING)
        with self._database.read() as session:
            rows = session.scalars(query.order_by(ApprovalRow.requested_at, ApprovalRow.version))
            return tuple(_to_approval(row) for row in rows)

    def approve(self, version: str, *, by: str, channel: str) -> Approval:
        """The approval; approving again keeps the first answer.

        Raises:
            NotFoundError: nobody was asked about the version.
            ConflictError: it was rejected.
        """
        return self._answer(version, ApprovalState.APPROVED, by, channel, None)

    def reject(self, version: str, *, by: str, channel: str, reason: str) -> Approval:
        """The rejection; rejecting again keeps the first answer.

        Raises:
            NotFoundError: nobody was asked about the version.
            ConflictError: it was approved.
        """
        return self._answer(version, ApprovalState.REJECTED, by, channel, reason)

    def _answer(
        self, version: str, state: ApprovalState, by: str, channel: str, note: str | None
    ) -> Approval:
        with self._database.write() as session:
            row = _found(session.get(ApprovalRow, version, with_for_update=True), version)
            if row.state == state:
                return _to_approval(row)
            if row.state != ApprovalState.PENDING:
                raise ConflictError(
                    f"{version} was {row.state} by {row.decided_by} before", version=version
                )
            row.state, row.decided_by, row.channel, row.note = state, by, channel, note
            row.decided_at = self._clock()
            move(get_row(session, version), VersionState(state.value))
            return _to_approval(row)


def _found(row: ApprovalRow | None, version: str) -> ApprovalRow:
    if row is None:
        raise NotFoundError(f"nobody was asked about {version}", version=version)
    return row


def _to_approval(row: ApprovalRow) -> Approval:
    return Approval(
        version=row.version,
        task=row.task,
        round_id=row.round_id,
        expected=row.expected,
        evidence_digest=row.evidence_digest,
        state=ApprovalState(row.state),
        requested_at=row.requested_at,
        decided_at=row.decided_at,
        decided_by=row.decided_by,
        channel=row.channel,
        note=row.note,
    )
