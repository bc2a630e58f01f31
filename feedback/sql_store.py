"""The store on SQLite and PostgreSQL: one transaction per call, committed before it returns.

Writers take turns: on SQLite by BEGIN IMMEDIATE, on PostgreSQL by an advisory lock that is released
after the commit is visible. So `seq` and `received_at` grow in the order in which rows become
visible, and a reader that goes on after the last `seq` it saw misses nothing; without the lock a
PostgreSQL transaction may commit a smaller `seq` after a larger one was read. It also makes
look-up-then-insert safe; the unique constraints stand behind it. A faster writer is left to another
implementation of `FeedbackStore`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Select, and_, func, or_, select, text, update
from sqlalchemy.orm import Session

from perennial.feedback.records import Feedback, Interaction, Judged
from perennial.feedback.rows import (
    feedback_record,
    feedback_row,
    interaction_record,
    interaction_row,
)
from perennial.feedback.store import (
    IdempotencyKey,
    Page,
    Stored,
    StoredFeedback,
    Submission,
)
from perennial.feedback.tables import FeedbackRow, InteractionRow
from perennial.infra.clock import Clock
from perennial.infra.db import Database
from perennial.infra.errors import ConflictError, NotFoundError

_WRITER_LOCK = 0x706E6C_01
_LOCK_TIMEOUT_S = 10
_JOIN_BATCH = 500

RowT = TypeVar("RowT", InteractionRow, FeedbackRow)


class SqlFeedbackStore:
    """Implements `FeedbackStore` on `infra.db`."""

    def __init__(self, database: Database, clock: Clock) -> None:
        """Rows are stamped with `clock` while the writer's turn is held."""
        self._database = database
        self._clock = clock

    def add_interaction(self, item: Interaction, key: IdempotencyKey | None = None) -> Stored:
        """Store `item` once by its id and by `key`, and join the feedback that waited for it."""
        with self._write() as session:
            known = _known_by_key(session, InteractionRow, item.tenant, key)
            known = known or _known_by_id(session, item)
            if known is not None:
                return Stored(id=known.id, is_replay=True)
            now = self._clock()
            session.add(interaction_row(replace(item, received_at=now), key))
            session.flush()
            _join_waiting(session, item, now)
        return Stored(id=item.id, is_replay=False)

    def add_feedback(self, item: Feedback, key: IdempotencyKey | None = None) -> StoredFeedback:
        """Store `item` once by `key`."""
        (result,) = self.add_feedback_batch((Submission(feedback=item, key=key),))
        if isinstance(result, ConflictError):
            raise result
        return result

    def add_feedback_batch(
        self, submissions: Sequence[Submission]
    ) -> tuple[StoredFeedback | ConflictError, ...]:
        """Store all in one transaction; a reused key costs its own submission only."""
        with self._write() as session:
            now = self._clock()
            return tuple(_add_feedback(session, each, now) for each in submissions)

    def get_interaction(self, tenant: str, id: str) -> Interaction:
        """The interaction `id` of `tenant`."""
        query = select(InteractionRow).filter_by(tenant=tenant, id=id)
        with self._database.read() as session:
            row = session.scalar(query)
            if row is None:
                raise NotFoundError(f"there is no interaction {id}")
            return interaction_record(row)

    def get_feedback(self, tenant: str, id: str) -> Feedback:
        """The feedback `id` of `tenant`."""
        query = select(FeedbackRow).filter_by(tenant=tenant, id=id)
        with self._database.read() as session:
            row = session.scalar(query)
            if row is None:
                raise NotFoundError(f"there is no feedback {id}")
            return feedback_record(row)

    def list_interactions(
        self, tenant: str, after: int, limit: int, task: str | None = None
    ) -> Page[Interaction]:
        """Up to `limit` rows after the cursor, oldest first."""
        query = select(InteractionRow).filter_by(tenant=tenant)
        if task is not None:
            query = query.filter_by(task=task)
        query = query.where(InteractionRow.seq > after).order_by(InteractionRow.seq).limit(limit)
        with self._database.read() as session:
            rows = session.scalars(query).all()
            items = tuple(map(interaction_record, rows))
            return Page(items=items, next_after=rows[-1].seq if rows else after)

    def list_feedback(self, tenant: str, after: int, limit: int) -> Page[Feedback]:
        """Up to `limit` rows after the cursor, oldest first."""
        query = select(FeedbackRow).filter_by(tenant=tenant)
        query = query.where(FeedbackRow.seq > after).order_by(FeedbackRow.seq).limit(limit)
        with self._database.read() as session:
            rows = session.scalars(query).all()
            items = tuple(map(feedback_record, rows))
            return Page(items=items, next_after=rows[-1].seq if rows else after)

    def interactions_between(
        self, task: str, since: datetime, until: datetime, limit: int
    ) -> tuple[Interaction, ...]:
        """The latest `limit` with since <= received_at < until, oldest first."""
        query = (
            select(InteractionRow)
            .filter_by(task=task)
            .where(InteractionRow.received_at >= since, InteractionRow.received_at < until)
            .order_by(InteractionRow.seq.desc())
            .limit(limit)
        )
        with self._database.read() as session:
            rows = session.scalars(query).all()
            return tuple(interaction_record(row) for row in reversed(rows))

    def feedback_between(self, task: str, since: datetime, until: datetime) -> tuple[Judged, ...]:
        """Joined feedback with since <= joined_at < until, oldest first."""
        same = and_(
            InteractionRow.tenant == FeedbackRow.tenant,
            InteractionRow.id == FeedbackRow.interaction_id,
        )
        query = (
            select(FeedbackRow, InteractionRow)
            .outerjoin(InteractionRow, same)
            .where(FeedbackRow.task == task, FeedbackRow.status == "joined")
            .where(FeedbackRow.joined_at >= since, FeedbackRow.joined_at < until)
            .order_by(FeedbackRow.joined_at, FeedbackRow.seq)
        )
        with self._database.read() as session:
            return tuple(_judged(feedback, about) for feedback, about in session.execute(query))

    def count_interactions_since(self, task: str, since: datetime) -> int:
        """How many interactions were received at `since` or later."""
        query = select(func.count()).select_from(InteractionRow).filter_by(task=task)
        with self._database.read() as session:
            return session.scalar(query.where(InteractionRow.received_at >= since)) or 0

    def count_feedback_since(self, task: str, since: datetime) -> int:
        """How many feedback were joined at `since` or later."""
        query = select(func.count()).select_from(FeedbackRow).filter_by(task=task)
        with self._database.read() as session:
            return session.scalar(query.where(FeedbackRow.joined_at >= since)) or 0

    def newest_interaction_at(self, task: str) -> datetime | None:
        """When the last interaction was received."""
        query = select(func.max(InteractionRow.received_at)).where(InteractionRow.task == task)
        with self._database.read() as session:
            return session.scalar(query)

    def newest_feedback_at(self, task: str) -> datetime | None:
        """When the last feedback was joined."""
        query = select(func.max(FeedbackRow.joined_at)).where(FeedbackRow.task == task)
        with self._database.read() as session:
            return session.scalar(query)

    def join_pending(self) -> int:
        """Join what an import or a restore left pending; how many were joined."""
        num_joined, after = 0, 0
        while True:
            query = select(FeedbackRow).filter_by(status="pending").where(FeedbackRow.seq > after)
            with self._write() as session:
                now = self._clock()
                rows = session.scalars(query.order_by(FeedbackRow.seq).limit(_JOIN_BATCH)).all()
                num_joined += sum(_join(session, row, now) for row in rows)
            if not rows:
                return num_joined
            after = rows[-1].seq

    def horizon(self) -> datetime:
        """Now, once every writer that began earlier has committed."""
        with self._write():
            return self._clock()

    def ping(self) -> None:
        """Raises UnavailableError when the tables cannot be read."""
        with self._database.read() as session:
            session.execute(select(InteractionRow.seq).limit(1))

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with self._database.write() as session:
            if self._database.dialect == "postgresql":
                # A writer that hangs must cost the others a 503, not their threads.
                session.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_S}s'"))
                session.execute(select(func.pg_advisory_xact_lock(_WRITER_LOCK)))
            yield session


def _known_by_key(
    session: Session, kind: type[RowT], tenant: str, key: IdempotencyKey | None
) -> RowT | None:
    if key is None:
        return None
    row = session.scalar(select(kind).filter_by(tenant=tenant, idempotency_key=key.value))
    if row is not None and row.payload_sha256 != key.payload_sha256:
        raise ConflictError("this idempotency key was used before with another payload")
    return row


def _known_by_id(session: Session, item: Interaction) -> InteractionRow | None:
    row = session.scalar(select(InteractionRow).filter_by(tenant=item.tenant, id=item.id))
    if row is None:
        return None
    if replace(interaction_record(row), received_at=item.received_at) != item:
        raise ConflictError(f"the interaction id {item.id} was used before with another payload")
    return row


def _add_feedback(
    session: Session, submission: Submission, now: datetime
) -> StoredFeedback | ConflictError:
    item = submission.feedback
    try:
        known = _known_by_key(session, FeedbackRow, item.tenant, submission.key)
    except ConflictError as conflict:
        return conflict
    row = known or feedback_row(_as_pending(item, now), submission.key)
    if known is None:
        session.add(row)
        session.flush()
        _join(session, row, now)
    record = feedback_record(row)
    return StoredFeedback(id=record.id, is_replay=known is not None, status=record.status)


def _join(session: Session, row: FeedbackRow, now: datetime) -> bool:
    """Whether the target of a pending `row` is known now; then the row says so."""
    if row.target_messages:
        row.status, row.joined_at = "joined", now
        return True
    about = session.scalar(_target_query(row))
    if about is None:
        return False
    row.status, row.joined_at = "joined", now
    row.task, row.interaction_id = about.task, about.id
    return True


def _as_pending(item: Feedback, now: datetime) -> Feedback:
    return replace(item, received_at=now, status="pending", interaction_id=None, joined_at=None)


def _target_query(row: FeedbackRow) -> Select[tuple[InteractionRow]]:
    query = select(InteractionRow).filter_by(tenant=row.tenant)
    if row.target_interaction_id is not None:
        return query.filter_by(id=row.target_interaction_id)
    # A trace stands for its latest interaction.
    query = query.filter_by(trace_id=row.target_trace_id)
    return query.order_by(InteractionRow.seq.desc()).limit(1)


def _join_waiting(session: Session, item: Interaction, now: datetime) -> None:
    is_about_item = FeedbackRow.target_interaction_id == item.id
    if item.trace_id is not None:
        is_about_item = or_(is_about_item, FeedbackRow.target_trace_id == item.trace_id)
    session.execute(
        update(FeedbackRow)
        .where(FeedbackRow.tenant == item.tenant, FeedbackRow.status == "pending", is_about_item)
        .values(status="joined", joined_at=now, task=item.task, interaction_id=item.id)
    )


def _judged(feedback: FeedbackRow, about: InteractionRow | None) -> Judged:
    return Judged(
        feedback=feedback_record(feedback),
        interaction=None if about is None else interaction_record(about),
    )
