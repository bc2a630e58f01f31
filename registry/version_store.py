"""Versions in the database, and what each was trained on.

Membership is kept for the rows a version was itself trained on and is read closed over parents:
an adapter that continues another has learned from whatever that one learned from.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from perennial.infra.clock import Clock
from perennial.infra.db import Database
from perennial.infra.errors import ConflictError, NotFoundError
from perennial.registry.tables import MembershipRow, VersionRow
from perennial.registry.versions import (
    Lineage,
    ModelVersion,
    NewVersion,
    VersionState,
    check_move,
    lineage,
    version_name,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """An event that a version was trained on, and whose it was."""

    event_id: str
    subject: str | None


class VersionStore:
    """Registers versions and answers which of them learned from whom."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def register(self, new: NewVersion, members: Iterable[Member]) -> ModelVersion:
        """The version of this round and adapter with its number, made now or found again.

        Raises:
            NotFoundError: the parent is not a version.
        """
        with self._database.write() as session:
            _lock_task(session, new.task)
            known = session.scalar(
                select(VersionRow).filter_by(
                    round_id=new.round_id, adapter_digest=new.adapter_digest
                )
            )
            if known is not None:
                return to_version(known)
            if new.parent is not None:
                get_row(session, new.parent)
            row = self._new_row(session, new)
            session.add(row)
            session.flush()
            subjects = {member.event_id: member.subject for member in members}
            session.add_all(
                MembershipRow(version=row.name, event_id=event_id, subject=subject)
                for event_id, subject in sorted(subjects.items())
            )
            return to_version(row)

    def get(self, name: str) -> ModelVersion:
        """One version.

        Raises:
            NotFoundError: there is no such version.
        """
        with self._database.read() as session:
            return to_version(get_row(session, name))

    def list_versions(self, task: str) -> tuple[ModelVersion, ...]:
        """Every version of a task, newest first."""
        query = select(VersionRow).filter_by(task=task).order_by(VersionRow.number.desc())
        with self._database.read() as session:
            return tuple(to_version(row) for row in session.scalars(query))

    def reject(self, name: str) -> ModelVersion:
        """The version, rejected by the gate; rejecting it again changes nothing.

        Raises:
            ConflictError: it has been live.
        """
        with self._database.write() as session:
            row = get_row(session, name)
            move(row, VersionState.REJECTED)
            return to_version(row)

    def approve(self, name: str) -> ModelVersion:
        """The version, approved by policy; a person's approval goes through `Approvals`.

        Raises:
            ConflictError: it was rejected or has been live.
        """
        with self._database.write() as session:
            row = get_row(session, name)
            move(row, VersionState.APPROVED)
            return to_version(row)

    def lineage(self, name: str) -> Lineage:
        """The ancestry of a version, nearest first."""
        version = self.get(name)
        return lineage(name, {v.name: v for v in self.list_versions(version.task)})

    def members(self, name: str) -> tuple[Member, ...]:
        """The events that a version learned from, its ancestors' included, by event id."""
        chain = (name, *self.lineage(name).ancestors)
        query = select(MembershipRow.event_id, MembershipRow.subject).distinct()
        query = query.where(MembershipRow.version.in_(chain)).order_by(MembershipRow.event_id)
        with self._database.read() as session:
            return tuple(Member(event_id=e, subject=s) for e, s in session.execute(query))

    def versions_trained_on(
        self, *, subject: str | None = None, event_id: str | None = None
    ) -> tuple[str, ...]:
        """Names of the versions that learned from a subject or an event, heirs included.

        Exactly one of the two must be given.
        """
        if (subject is None) == (event_id is None):
            raise ValueError("give either a subject or an event id")
        query = select(MembershipRow.version).distinct()
        query = query.filter_by(subject=subject) if subject else query.filter_by(event_id=event_id)
        with self._database.read() as session:
            tainted = set(session.scalars(query))
            # A parent has a smaller number than its heirs, so one pass in order closes the set.
            rows = session.execute(
                select(VersionRow.name, VersionRow.parent).order_by(
                    VersionRow.task, VersionRow.number
                )
            )
            ordered = [(name, parent) for name, parent in rows]
        for name, parent in ordered:
            if parent in tainted:
                tainted.add(name)
        return tuple(name for name, _ in ordered if name in tainted)

    def _new_row(self, session: Session, new: NewVersion) -> VersionRow:
        highest = session.scalar(select(func.max(VersionRow.number)).filter_by(task=new.task)) or 0
        return VersionRow(
            name=version_name(new.task, highest + 1, new.adapter_digest),
            task=new.task,
            number=highest + 1,
            adapter_digest=new.adapter_digest,
            adapter_path=str(new.adapter_path),
            base_digest=new.base_digest,
            round_id=new.round_id,
            parent=new.parent,
            dataset_digest=new.dataset_digest,
            state=VersionState.REGISTERED,
            created_at=self._clock(),
        )


def get_row(session: Session, name: str) -> VersionRow:
    """The row of a version.

    Raises:
        NotFoundError: there is no such version.
    """
    row = session.get(VersionRow, name)
    if row is None:
        raise NotFoundError(f"there is no version {name}", version=name)
    return row


def move(row: VersionRow, target: VersionState) -> None:
    """Set the state of a version.

    Raises:
        ConflictError: the step is not allowed.
    """
    row.state = check_move(row.name, VersionState(row.state), target)


def to_version(row: VersionRow) -> ModelVersion:
    """The row as a value."""
    return ModelVersion(
        name=row.name,
        task=row.task,
        number=row.number,
        adapter_digest=row.adapter_digest,
        adapter_path=Path(row.adapter_path),
        base_digest=row.base_digest,
        round_id=row.round_id,
        parent=row.parent,
        dataset_digest=row.dataset_digest,
        state=VersionState(row.state),
        created_at=row.created_at,
    )


def check_task(row: VersionRow, task: str) -> None:
    """Nothing, when the version belongs to the task.

    Raises:
        ConflictError: it belongs to another task.
    """
    if row.task != task:
        raise ConflictError(f"{row.name} is a version of {row.task}, not of {task}")


def _lock_task(session: Session, task: str) -> None:
    # SQLite has one writer already; on PostgreSQL two writers could draw the same number.
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"versions:{task}"))))
