"""The store on SQLite and PostgreSQL: one transaction per write, committed before it returns.

Writers take turns: on SQLite by BEGIN IMMEDIATE, on PostgreSQL by an advisory lock that is released
after the commit is visible. So `seq` and `received_at` grow in the order in which rows become
visible, and a reader that goes on after the last `seq` it saw misses nothing; without the lock a
PostgreSQL transaction may commit a smaller `seq` after a larger one was read. It also makes
look-up-then-insert safe; the unique constraints stand behind it. What a group of rows costs is
`group`'s business, which rows share a group is `committer`'s.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import CursorResult, Result, Select, and_, func, or_, select, update
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.orm import Session

from perennial.feedback.group import GroupRows, write_group
from perennial.feedback.postgres_rows import PostgresRows
from perennial.feedback.records import IMPORTED, Feedback, Interaction, Judged
from perennial.feedback.rows import feedback_record, interaction_record
from perennial.feedback.sqlite_rows import SqliteRows
from perennial.feedback.store import Outcome, Page, Submission
from perennial.feedback.tables import FeedbackRow, InteractionRow
from perennial.infra.clock import Clock
from perennial.infra.db import Database
from perennial.infra.errors import InputError, NotFoundError

_JOIN_BATCH = 500
_TICK = timedelta(microseconds=1)
# No task: an empty row falls into no window, and into no training set.
_EMPTY_INTERACTION: dict[str, Any] = {
    **dict.fromkeys(("subject", "session", "trace_id", "finish_reason", "occurred_at")),
    **{"task": "", "messages": [], "completion": "", "tags": {}},
}
_EMPTY_FEEDBACK: dict[str, Any] = {  # Any: column values
    **dict.fromkeys(("task", "target_completion", "target_trace_id", "source_id", "subject")),
    **{"target_messages": [], "signal": {}, "tags": {}, "may_train": False, "occurred_at": None},
}


class SqlFeedbackStore:
    """Implements `FeedbackStore` on `infra.db`."""

    def __init__(self, database: Database, clock: Clock) -> None:
        """Rows are stamped with `clock` while the writer's turn is held."""
        self._database = database
        self._clock = clock
        driver = database.engine.dialect.loaded_dbapi
        self._refusals = (driver.DataError, driver.IntegrityError)

    def write(self, submissions: Sequence[Submission]) -> tuple[Outcome, ...]:
        """Store all in one transaction and join feedback with interactions, both ways."""
        try:
            with self._database.write_cursor() as cursor:
                rows = self._rows(cursor)
                return write_group(rows, submissions, self._begin(rows))
        except self._refusals as error:
            # The driver's own words may repeat the row: they are kept from the answer.
            raise InputError("the database refuses a row") from error

    def get_interaction(self, tenant: str, id: str) -> Interaction:
        """The interaction `id` of `tenant`."""
        query = select(InteractionRow).filter_by(tenant=tenant, id=id, erased_at=None)
        with self._database.read() as session:
            row = session.scalar(query)
            if row is None:
                raise NotFoundError(f"there is no interaction {id}")
            return interaction_record(row)

    def get_feedback(self, tenant: str, id: str) -> Feedback:
        """The feedback `id` of `tenant`."""
        query = select(FeedbackRow).filter_by(tenant=tenant, id=id, erased_at=None)
        with self._database.read() as session:
            row = session.scalar(query)
            if row is None:
                raise NotFoundError(f"there is no feedback {id}")
            return feedback_record(row)

    def list_interactions(
        self, tenant: str, after: int, limit: int, task: str | None = None
    ) -> Page[Interaction]:
        """Up to `limit` rows after the cursor, oldest first."""
        query = select(InteractionRow).filter_by(tenant=tenant, erased_at=None)
        if task is not None:
            query = query.filter_by(task=task)
        query = query.where(InteractionRow.seq > after).order_by(InteractionRow.seq).limit(limit)
        with self._database.read() as session:
            rows = session.scalars(query).all()
            items = tuple(map(interaction_record, rows))
            return Page(items=items, next_after=rows[-1].seq if rows else after)

    def list_feedback(self, tenant: str, after: int, limit: int) -> Page[Feedback]:
        """Up to `limit` rows after the cursor, oldest first."""
        query = select(FeedbackRow).filter_by(tenant=tenant, erased_at=None)
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
            .where(InteractionRow.route_role != IMPORTED)
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
        query = query.where(InteractionRow.route_role != IMPORTED)
        with self._database.read() as session:
            return session.scalar(query.where(InteractionRow.received_at >= since)) or 0

    def count_feedback_since(self, task: str, since: datetime) -> int:
        """How many feedback were joined at `since` or later."""
        query = select(func.count()).select_from(FeedbackRow).filter_by(task=task)
        with self._database.read() as session:
            return session.scalar(query.where(FeedbackRow.joined_at >= since)) or 0

    def newest_interaction_at(self, task: str) -> datetime | None:
        """When the last interaction was received."""
        query = select(func.max(InteractionRow.received_at)).filter_by(task=task)
        query = query.where(InteractionRow.route_role != IMPORTED)
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
            query = (
                select(FeedbackRow)
                .filter_by(status="pending", erased_at=None)
                .where(FeedbackRow.seq > after)
            )
            with self._write() as (session, now):
                rows = session.scalars(query.order_by(FeedbackRow.seq).limit(_JOIN_BATCH)).all()
                num_joined += sum(_join(session, row, now) for row in rows)
            if not rows:
                return num_joined
            after = rows[-1].seq

    def horizon(self) -> datetime:
        """Now, once every writer that began earlier has committed."""
        with self._database.write_cursor() as cursor:
            return self._begin(self._rows(cursor))

    def erase_subject(self, tenant: str, subject: str) -> int:
        """Empty the interactions of `subject`, what was said of them, and what it said itself."""
        about = select(InteractionRow.id).filter_by(tenant=tenant, subject=subject)
        of_subject = FeedbackRow.subject == subject
        with self._write() as (session, now):
            said = or_(of_subject, FeedbackRow.interaction_id.in_(about))
            feedback = update(FeedbackRow).where(FeedbackRow.tenant == tenant, said)
            # First what hangs on the interactions, while they can be found by their subject.
            num = _num_changed(session.execute(feedback.values(**_EMPTY_FEEDBACK, erased_at=now)))
            asked = update(InteractionRow).filter_by(tenant=tenant, subject=subject)
            return num + _num_changed(
                session.execute(asked.values(**_EMPTY_INTERACTION, erased_at=now))
            )

    def erased_feedback(self) -> frozenset[str]:
        """Ids of the feedback that was emptied, of all tenants."""
        query = select(FeedbackRow.id).where(FeedbackRow.erased_at.is_not(None))
        with self._database.read() as session:
            return frozenset(session.scalars(query))

    def last_erased_at(self) -> datetime | None:
        """When a row of any tenant was last emptied."""
        columns = (InteractionRow.erased_at, FeedbackRow.erased_at)
        with self._database.read() as session:
            found = [session.scalar(select(func.max(column))) for column in columns]
        return max((at for at in found if at is not None), default=None)

    def ping(self) -> None:
        """Raises UnavailableError when the tables cannot be read."""
        with self._database.read() as session:
            session.execute(select(InteractionRow.seq).limit(1))

    @contextmanager
    def _write(self) -> Iterator[tuple[Session, datetime]]:
        """A session that has the writers' turn, and its `now`."""
        with self._database.write() as session:
            cursor = session.connection().connection.cursor()
            yield session, self._begin(self._rows(cursor))

    def _begin(self, rows: GroupRows) -> datetime:
        """The clock, read while the turn is held, and later than every row.

        So time grows as rows become visible, also when the clock is set back.
        """
        latest = rows.begin()
        return self._clock() if latest is None else max(self._clock(), latest + _TICK)

    def _rows(self, cursor: DBAPICursor) -> GroupRows:
        return SqliteRows(cursor) if self._database.dialect == "sqlite" else PostgresRows(cursor)


def _num_changed(result: Result[Any]) -> int:
    assert isinstance(result, CursorResult)  # an UPDATE
    return result.rowcount


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


def _target_query(row: FeedbackRow) -> Select[tuple[InteractionRow]]:
    query = select(InteractionRow).filter_by(tenant=row.tenant, erased_at=None)
    if row.target_interaction_id is not None:
        return query.filter_by(id=row.target_interaction_id)
    # A trace stands for its latest interaction.
    query = query.filter_by(trace_id=row.target_trace_id)
    return query.order_by(InteractionRow.seq.desc()).limit(1)


def _judged(feedback: FeedbackRow, about: InteractionRow | None) -> Judged:
    return Judged(
        feedback=feedback_record(feedback),
        interaction=None if about is None else interaction_record(about),
    )
