"""The statements of a group on PostgreSQL: whole columns as arrays, unnested by the server."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import JSON, Dialect, String
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine.interfaces import DBAPICursor

from perennial.feedback.group import Known, Pair, Table, Waiting
from perennial.feedback.rows import FEEDBACK_COLUMNS, INTERACTION_COLUMNS, Row
from perennial.feedback.store import About
from perennial.feedback.tables import FeedbackRow, InteractionRow

# A writer that hangs must cost the others a 503, not their threads.
_TAKE_TURN = ("SET LOCAL lock_timeout = '10s'", f"SELECT pg_advisory_xact_lock({0x706E6C_01})")
_LATEST = """
SELECT greatest(
  (SELECT received_at FROM interactions ORDER BY seq DESC LIMIT 1),
  (SELECT received_at FROM feedback ORDER BY seq DESC LIMIT 1))
"""
_KNOWN = """
SELECT t.tenant, t.{column}, t.id, t.payload_sha256, {status}
FROM unnest(%s::text[], %s::text[]) AS wanted(tenant, value)
JOIN {table} AS t ON t.tenant = wanted.tenant AND t.{column} = wanted.value
"""
_BY_ID = """
SELECT t.tenant, t.id, t.id, t.task
FROM unnest(%s::text[], %s::text[]) AS wanted(tenant, value)
JOIN interactions AS t ON t.tenant = wanted.tenant AND t.id = wanted.value
AND t.erased_at IS NULL
"""
_BY_TRACE = """
SELECT DISTINCT ON (t.tenant, t.trace_id) t.tenant, t.trace_id, t.id, t.task
FROM unnest(%s::text[], %s::text[]) AS wanted(tenant, value)
JOIN interactions AS t ON t.tenant = wanted.tenant AND t.trace_id = wanted.value
ORDER BY t.tenant, t.trace_id, t.seq DESC
"""
_WAITING = """
SELECT f.seq, f.tenant, f.target_interaction_id, f.target_trace_id
FROM unnest(%s::text[], %s::text[]) AS came(tenant, value)
JOIN feedback AS f ON f.tenant = came.tenant AND f.{column} = came.value AND f.status = 'pending'
AND f.erased_at IS NULL
"""
_JOIN = """
UPDATE feedback SET status = 'joined', task = found.task, interaction_id = found.id, joined_at = %s
FROM unnest(%s::bigint[], %s::text[], %s::text[]) AS found(seq, id, task)
WHERE feedback.seq = found.seq
"""


class PostgresRows:
    """Implements `GroupRows` on a cursor of psycopg."""

    def __init__(self, cursor: DBAPICursor) -> None:
        """The cursor's transaction is the caller's."""
        self._cursor = cursor

    def begin(self) -> datetime | None:
        """Take the writers' turn; when the last row was received."""
        for statement in (*_TAKE_TURN, _LATEST):
            self._cursor.execute(statement)
        row = self._cursor.fetchone()
        assert row is not None  # a SELECT without FROM gives one row
        found: datetime | None = row[0]
        return found

    def known_by_id(self, table: Table, pairs: Sequence[Pair]) -> Mapping[Pair, Known]:
        """Those of `pairs` (tenant, id) that are there."""
        return self._known(table, "id", pairs)

    def known_by_key(self, table: Table, pairs: Sequence[Pair]) -> Mapping[Pair, Known]:
        """Those of `pairs` (tenant, key) that are there."""
        return self._known(table, "idempotency_key", pairs)

    def interactions(self, ids: Sequence[Pair]) -> Mapping[Pair, About]:
        """Those of `ids` that are there and not erased."""
        return self._about(_BY_ID, ids)

    def latest_of_traces(self, traces: Sequence[Pair]) -> Mapping[Pair, About]:
        """The latest interaction of each trace."""
        return self._about(_BY_TRACE, traces)

    def waiting(self, ids: Sequence[Pair], traces: Sequence[Pair]) -> Sequence[Waiting]:
        """Pending feedback on these interactions and traces."""
        found = self._select(_WAITING.format(column="target_interaction_id"), ids)
        if traces:
            found = [*found, *self._select(_WAITING.format(column="target_trace_id"), traces)]
        return [
            Waiting(seq=seq, tenant=tenant, interaction_id=id, trace_id=trace)
            for seq, tenant, id, trace in found
        ]

    def join(self, found: Sequence[tuple[int, About]], now: datetime) -> None:
        """Mark the feedback of each seq as joined."""
        seqs = [seq for seq, _ in found]
        ids, tasks = [a.id for _, a in found], [a.task for _, a in found]
        self._cursor.execute(_JOIN, (now, seqs, ids, tasks))

    def insert(self, table: Table, rows: Sequence[Row]) -> None:
        """Insert rows in one statement."""
        self._cursor.execute(_insert(table), [list(column) for column in zip(*rows, strict=True)])

    def _known(self, table: Table, column: str, pairs: Sequence[Pair]) -> Mapping[Pair, Known]:
        query = _KNOWN.format(
            column=column,
            table=table,
            status="'joined'" if table == "interactions" else "t.status",
        )
        return {
            (tenant, value): Known(id=id, payload_sha256=digest, status=status)
            for tenant, value, id, digest, status in self._select(query, pairs)
        }

    def _about(self, query: str, pairs: Sequence[Pair]) -> Mapping[Pair, About]:
        found = self._select(query, pairs)
        return {(tenant, value): About(id=id, task=task) for tenant, value, id, task in found}

    # Any: rows of the driver, unpacked at once by the callers above.
    def _select(self, query: str, pairs: Sequence[Pair]) -> Sequence[Any]:
        tenants, values = [tenant for tenant, _ in pairs], [value for _, value in pairs]
        self._cursor.execute(query, (tenants, values))
        return self._cursor.fetchall()


@cache
def _insert(table: Table) -> str:
    row = InteractionRow if table == "interactions" else FeedbackRow
    wanted = INTERACTION_COLUMNS if table == "interactions" else FEEDBACK_COLUMNS
    columns = {name: row.__table__.columns[name].type for name in wanted}
    dialect: Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's own
    arrays, values = [], []
    for name, kind in columns.items():
        # JSON travels as text: the driver would make an array of it.
        is_text = isinstance(kind, JSON | String)
        arrays.append(f"%s::{'text' if is_text else kind.compile(dialect)}[]")
        values.append(f"{name}::json" if isinstance(kind, JSON) else name)
    names = ", ".join(columns)
    return (
        f"INSERT INTO {row.__tablename__} ({names}) SELECT {', '.join(values)} "
        f"FROM unnest({', '.join(arrays)}) WITH ORDINALITY AS new({names}, place) ORDER BY place"
    )
