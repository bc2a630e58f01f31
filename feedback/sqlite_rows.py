"""The statements of a group on SQLite.

Each is one step of the engine for many rows: a step gives the interpreter's lock away and has to
win it back, so a step for each row would cost more than the row.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Any

import msgspec
from sqlalchemy.engine.interfaces import DBAPICursor

from perennial.feedback.group import Known, Pair, Table, Waiting
from perennial.feedback.rows import FEEDBACK_COLUMNS, INTERACTION_COLUMNS, Row
from perennial.feedback.store import About

_MAX_ROWS = 256  # of one INSERT: 32,766 parameters are allowed

_LATEST = """
SELECT max(
  coalesce((SELECT received_at FROM interactions ORDER BY seq DESC LIMIT 1), ''),
  coalesce((SELECT received_at FROM feedback ORDER BY seq DESC LIMIT 1), ''))
"""
_KNOWN = """
SELECT json_group_array(json_array(t.tenant, t.{column}, t.id, t.payload_sha256, {status}))
FROM json_each(?) AS wanted CROSS JOIN {table} AS t
ON t.tenant = json_extract(wanted.value, '$[0]') AND t.{column} = json_extract(wanted.value, '$[1]')
"""
_BY_ID = """
SELECT json_group_array(json_array(t.tenant, t.id, t.id, t.task))
FROM json_each(?) AS wanted CROSS JOIN interactions AS t
ON t.tenant = json_extract(wanted.value, '$[0]') AND t.id = json_extract(wanted.value, '$[1]')
AND t.erased_at IS NULL
"""
_BY_TRACE = """
SELECT json_group_array(json_array(t.tenant, t.trace_id, t.id, t.task))
FROM json_each(?) AS wanted CROSS JOIN interactions AS t ON t.seq = (
  SELECT max(seq) FROM interactions WHERE tenant = json_extract(wanted.value, '$[0]')
  AND trace_id = json_extract(wanted.value, '$[1]'))
"""
_WAITING = """
SELECT json_group_array(
  json_array(f.seq, f.tenant, f.target_interaction_id, f.target_trace_id))
FROM json_each(?) AS came CROSS JOIN feedback AS f
ON f.tenant = json_extract(came.value, '$[0]') AND f.status = 'pending'
AND f.{column} = json_extract(came.value, '$[1]') AND f.erased_at IS NULL
"""
_JOIN = """
UPDATE feedback SET status = 'joined', task = ?, interaction_id = ?, joined_at = ? WHERE seq = ?
"""


class SqliteRows:
    """Implements `GroupRows` on a cursor of sqlite3."""

    def __init__(self, cursor: DBAPICursor) -> None:
        """The cursor's transaction is the caller's."""
        self._cursor = cursor

    def begin(self) -> datetime | None:
        """When the last row was received; the transaction already has the turn."""
        self._cursor.execute(_LATEST)
        row = self._cursor.fetchone()
        assert row is not None  # an aggregate gives one row
        return datetime.fromisoformat(row[0]).replace(tzinfo=UTC) if row[0] else None

    def known_by_id(self, table: Table, pairs: Sequence[Pair]) -> Mapping[Pair, Known]:
        """Those of `pairs` (tenant, id) that are there."""
        return self._known(table, "id", pairs)

    def known_by_key(self, table: Table, pairs: Sequence[Pair]) -> Mapping[Pair, Known]:
        """Those of `pairs` (tenant, key) that are there."""
        return self._known(table, "idempotency_key", pairs)

    def interactions(self, ids: Sequence[Pair]) -> Mapping[Pair, About]:
        """Those of `ids` that are there and not erased."""
        return _about(self._array(_BY_ID, ids))

    def latest_of_traces(self, traces: Sequence[Pair]) -> Mapping[Pair, About]:
        """The latest interaction of each trace."""
        return _about(self._array(_BY_TRACE, traces))

    def waiting(self, ids: Sequence[Pair], traces: Sequence[Pair]) -> Sequence[Waiting]:
        """Pending feedback on these interactions and traces."""
        found = self._array(_WAITING.format(column="target_interaction_id"), ids)
        if traces:
            found += self._array(_WAITING.format(column="target_trace_id"), traces)
        return [
            Waiting(seq=seq, tenant=tenant, interaction_id=id, trace_id=trace)
            for seq, tenant, id, trace in found
        ]

    def join(self, found: Sequence[tuple[int, About]], now: datetime) -> None:
        """Mark the feedback of each seq as joined."""
        at = _text(now)
        self._cursor.executemany(_JOIN, [(a.task, a.id, at, seq) for seq, a in found])

    def insert(self, table: Table, rows: Sequence[Row]) -> None:
        """Insert rows in powers of two, so that few distinct statements are compiled."""
        start = 0
        while start < len(rows):
            size = min(_MAX_ROWS, 1 << (len(rows) - start).bit_length() - 1)
            part = rows[start : start + size]
            values = [_text(v) if type(v) is datetime else v for row in part for v in row]
            self._cursor.execute(_insert(table, size), values)
            start += size

    def _known(self, table: Table, column: str, pairs: Sequence[Pair]) -> Mapping[Pair, Known]:
        query = _KNOWN.format(
            column=column,
            table=table,
            status="'joined'" if table == "interactions" else "t.status",
        )
        return {
            (tenant, value): Known(id=id, payload_sha256=digest, status=status)
            for tenant, value, id, digest, status in self._array(query, pairs)
        }

    # Any: rows of JSON, unpacked at once by the callers above.
    def _array(self, query: str, pairs: Sequence[Pair]) -> list[Any]:
        self._cursor.execute(query, (msgspec.json.encode(pairs).decode(),))
        row = self._cursor.fetchone()
        assert row is not None  # an aggregate gives one row
        found: list[Any] = msgspec.json.decode(row[0])
        return found


def _about(rows: Sequence[Any]) -> dict[Pair, About]:
    return {(tenant, value): About(id=id, task=task) for tenant, value, id, task in rows}


@cache
def _insert(table: Table, size: int) -> str:
    columns = INTERACTION_COLUMNS if table == "interactions" else FEEDBACK_COLUMNS
    row = f"({', '.join('?' * len(columns))})"
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {', '.join([row] * size)}"


@lru_cache(maxsize=64)  # all rows of a group were received at the same time
def _text(time: datetime) -> str:
    """The text that SQLAlchemy writes for a time in UTC, which sorts as time does."""
    return time.isoformat(" ", "microseconds").removesuffix("+00:00")
