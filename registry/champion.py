"""Which version is live, since when, by whose decision.

A promotion is a compare-and-set: it names the version that it expects to replace and loses when
another is live. The champion, the log and the note for MLflow change in one transaction. Serving
switches by itself when it reads the new champion; MLflow's aliases follow through `reconcile`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from perennial.infra.clock import Clock
from perennial.infra.db import Database
from perennial.infra.errors import ConflictError, NotFoundError
from perennial.registry.tables import ChampionRow, LiveLogRow, OutboxRow, VersionRow
from perennial.registry.version_store import check_task, get_row, move
from perennial.registry.versions import BASE, VersionState


class ChangeKind(StrEnum):
    """How a version went live."""

    PROMOTE = "promote"
    ROLLBACK = "rollback"


@dataclass(frozen=True, kw_only=True, slots=True)
class Champion:
    """The live version and where its adapter lies; `row_version` grows with every change."""

    task: str
    version: str
    adapter_path: Path
    adapter_digest: str
    row_version: int
    since: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One entry of the log; a version of None is the base model."""

    decision_id: str
    task: str
    row_version: int
    kind: ChangeKind
    version: str | None
    previous: str | None
    decided_by: str
    evidence_digest: str | None
    reasons: tuple[str, ...]
    at: datetime


class ChampionStore:
    """Reads and changes champions."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def current(self, task: str) -> Champion | None:
        """The live version, or None while the base model is live."""
        query = (
            select(ChampionRow, VersionRow)
            .join(VersionRow, ChampionRow.version == VersionRow.name)
            .where(ChampionRow.task == task)
        )
        with self._database.read() as session:
            found = session.execute(query).one_or_none()
            return None if found is None else _to_champion(*found)

    def promote(
        self,
        task: str,
        version: str,
        *,
        decision_id: str,
        expected: str | None,
        decided_by: str,
        evidence_digest: str,
        reasons: Sequence[str],
    ) -> Change:
        """The change that made `version` live in place of `expected` (None is the base model).

        The same decision again returns the first change and alters nothing.

        Raises:
            ConflictError: another version is live, the version is not approved, or the decision id
                was used for something else.
            NotFoundError: there is no such version.
        """
        with self._database.write() as session:
            row = _locked(session, task, self._clock())
            if (known := session.get(LiveLogRow, decision_id)) is not None:
                return _same(known, task, ChangeKind.PROMOTE, version)
            if row.version != expected:
                raise ConflictError(
                    f"{version} was to replace {expected or BASE}, but {row.version or BASE} is "
                    f"live for {task}: evaluate again",
                    expected=expected,
                    live=row.version,
                )
            target = get_row(session, version)
            check_task(target, task)
            if target.state != VersionState.APPROVED:
                raise ConflictError(f"{version} is {target.state}, not approved", version=version)
            entry = LiveLogRow(
                decision_id=decision_id,
                kind=ChangeKind.PROMOTE,
                decided_by=decided_by,
                evidence_digest=evidence_digest,
                reasons=list(reasons),
            )
            return self._change(session, row, target, entry)

    def rollback(self, task: str, *, decision_id: str, decided_by: str, reason: str) -> Change:
        """The change back to what the live version replaced when it was promoted.

        A second rollback goes one promotion further back. The same decision again returns the
        first change.

        Raises:
            NotFoundError: the base model is live, so there is nothing to go back to.
            ConflictError: the decision id was used for a promotion.
        """
        with self._database.write() as session:
            row = _locked(session, task, self._clock())
            if (known := session.get(LiveLogRow, decision_id)) is not None:
                return _same(known, task, ChangeKind.ROLLBACK, known.version)
            if row.version is None:
                raise NotFoundError(f"the base model is live for {task}: nothing to go back to")
            target_name = _replaced_by(session, task, row.version)
            target = None if target_name is None else get_row(session, target_name)
            entry = LiveLogRow(
                decision_id=decision_id,
                kind=ChangeKind.ROLLBACK,
                decided_by=decided_by,
                evidence_digest=None,
                reasons=[reason],
            )
            return self._change(session, row, target, entry)

    def history(self, task: str, limit: int = 100) -> tuple[Change, ...]:
        """Changes of a task, newest first."""
        query = select(LiveLogRow).filter_by(task=task).order_by(LiveLogRow.row_version.desc())
        with self._database.read() as session:
            return tuple(_to_change(row) for row in session.scalars(query.limit(limit)))

    def live_at(self, task: str, moment: datetime) -> str | None:
        """The version that was live at a moment, None for the base model."""
        query = select(LiveLogRow.version).filter_by(task=task).where(LiveLogRow.at <= moment)
        with self._database.read() as session:
            return session.scalar(query.order_by(LiveLogRow.row_version.desc()).limit(1))

    def previous(self, task: str) -> str | None:
        """What a rollback would make live: a version, or None for the base model or nothing."""
        with self._database.read() as session:
            row = session.get(ChampionRow, task)
            if row is None or row.version is None:
                return None
            return _replaced_by(session, task, row.version)

    def _change(
        self, session: Session, row: ChampionRow, target: VersionRow | None, entry: LiveLogRow
    ) -> Change:
        # A clock that was set back must not reorder the log.
        now = max(self._clock(), row.since)
        if row.version is not None:
            move(get_row(session, row.version), VersionState.RETIRED)
        if target is not None:
            move(target, VersionState.CHAMPION)
        entry.task = row.task
        entry.previous = row.version
        entry.version = row.version = None if target is None else target.name
        entry.row_version = row.row_version = row.row_version + 1
        entry.at = row.since = now
        session.add_all(
            (entry, OutboxRow(task=row.task, decision_id=entry.decision_id, created_at=now))
        )
        session.flush()
        return _to_change(entry)


class Outbox:
    """Changes that MLflow must still be told of."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def newest_pending(self, task: str) -> int | None:
        """The highest id that is not done, or None when MLflow was told of everything."""
        query = select(func.max(OutboxRow.id)).filter_by(task=task, done_at=None)
        with self._database.read() as session:
            return session.scalar(query)

    def mark_done(self, task: str, up_to: int) -> None:
        """Record that MLflow shows everything up to this id."""
        query = select(OutboxRow).filter_by(task=task, done_at=None).where(OutboxRow.id <= up_to)
        with self._database.write() as session:
            for row in session.scalars(query):
                row.done_at = self._clock()


def _locked(session: Session, task: str, now: datetime) -> ChampionRow:
    row = session.get(ChampionRow, task, with_for_update=True)
    if row is not None:
        return row
    if session.get_bind().dialect.name == "postgresql":
        # No row yet means nothing to lock: two first promotions would both insert it.
        session.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"champion:{task}"))))
        if (row := session.get(ChampionRow, task, with_for_update=True)) is not None:
            return row
    row = ChampionRow(task=task, version=None, row_version=0, since=now)
    session.add(row)
    session.flush()
    return row


def _replaced_by(session: Session, task: str, version: str) -> str | None:
    query = (
        select(LiveLogRow.previous)
        .filter_by(task=task, version=version, kind=ChangeKind.PROMOTE)
        .order_by(LiveLogRow.row_version.desc())
        .limit(1)
    )
    return session.scalar(query)


def _same(known: LiveLogRow, task: str, kind: ChangeKind, version: str | None) -> Change:
    if (known.task, known.kind, known.version) != (task, kind, version):
        raise ConflictError(
            f"decision {known.decision_id} was a {known.kind} of {known.version or BASE} "
            f"for {known.task}",
            decision_id=known.decision_id,
        )
    return _to_change(known)


def _to_champion(row: ChampionRow, version: VersionRow) -> Champion:
    return Champion(
        task=row.task,
        version=version.name,
        adapter_path=Path(version.adapter_path),
        adapter_digest=version.adapter_digest,
        row_version=row.row_version,
        since=row.since,
    )


def _to_change(row: LiveLogRow) -> Change:
    return Change(
        decision_id=row.decision_id,
        task=row.task,
        row_version=row.row_version,
        kind=ChangeKind(row.kind),
        version=row.version,
        previous=row.previous,
        decided_by=row.decided_by,
        evidence_digest=row.evidence_digest,
        reasons=tuple(row.reasons),
        at=row.at,
    )
