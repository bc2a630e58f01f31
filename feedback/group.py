"""Stores a group of submissions inside one transaction, whatever the database.

Known ids and keys are looked up, new rows inserted, feedback joined with interactions both ways: a
handful of statements for the whole group. The statements are left to `sqlite_rows` and
`postgres_rows`, the transaction to `sql_store`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, Protocol

from perennial.feedback.records import Feedback, Interaction, Status
from perennial.feedback.rows import Row, feedback_values, interaction_values
from perennial.feedback.store import About, Outcome, Stored, Submission
from perennial.infra.errors import ConflictError

Table = Literal["interactions", "feedback"]
Pair = tuple[str, str]
"""A tenant and a value of its own: an id, an idempotency key, a trace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A row that is there already; a digest of None fits every payload."""

    id: str
    payload_sha256: str | None
    status: Status


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A pending feedback whose target has come."""

    seq: int
    tenant: str
    interaction_id: str | None
    trace_id: str | None


class GroupRows(Protocol):
    """The statements that a group needs, in the transaction that is open."""

    def begin(self) -> datetime | None:
        """Take the writers' turn; when the last row was received."""

    def known_by_id(self, table: Table, pairs: Sequence[Pair]) -> Mapping[Pair, Known]:
        """Those of `pairs` (tenant, id) that are there."""

    def known_by_key(self, table: Table, pairs: Sequence[Pair]) -> Mapping[Pair, Known]:
        """Those of `pairs` (tenant, key) that are there."""

    def interactions(self, ids: Sequence[Pair]) -> Mapping[Pair, About]:
        """Those of `ids` (tenant, id) that are there and not erased."""

    def latest_of_traces(self, traces: Sequence[Pair]) -> Mapping[Pair, About]:
        """The latest interaction of each of `traces` (tenant, trace_id)."""

    def waiting(self, ids: Sequence[Pair], traces: Sequence[Pair]) -> Sequence[Waiting]:
        """Pending feedback on these interactions and traces."""

    def join(self, found: Sequence[tuple[int, About]], now: datetime) -> None:
        """Mark the feedback of each seq as joined with its interaction."""

    def insert(self, table: Table, rows: Sequence[Row]) -> None:
        """Insert rows, in this order."""


def write_group(
    rows: GroupRows, submissions: Sequence[Submission], now: datetime
) -> tuple[Outcome, ...]:
    """What became of each; every new row is stamped with `now`."""
    outcomes: dict[int, Outcome] = {}
    parts: dict[Table, dict[int, Submission]] = {"interactions": {}, "feedback": {}}
    for index, each in enumerate(submissions):
        part = parts["interactions" if isinstance(each.item, Interaction) else "feedback"]
        part[index] = each
    for table, part in parts.items():  # feedback may be about an interaction of this group
        outcomes |= _store(rows, table, part, now) if part else {}
    return tuple(outcomes[index] for index in range(len(submissions)))


def _store(
    rows: GroupRows, table: Table, part: Mapping[int, Submission], now: datetime
) -> dict[int, Outcome]:
    backwards = list(reversed(list(part.items())))
    first_of_id = {(s.item.tenant, s.item.id): i for i, s in backwards if not s.is_new_id}
    first_of_key = {(s.item.tenant, s.key): i for i, s in backwards if s.key}
    known_ids = rows.known_by_id(table, list(first_of_id)) if first_of_id else {}
    known_keys = rows.known_by_key(table, list(first_of_key)) if first_of_key else {}
    new: dict[int, Submission] = {}
    twins: dict[int, int] = {}
    outcomes: dict[int, Outcome] = {}
    for index, each in part.items():
        id, key = (each.item.tenant, each.item.id), (each.item.tenant, each.key or "")
        first = min(first_of_key.get(key, index), first_of_id.get(id, index))
        known = known_keys.get(key) or known_ids.get(id)
        if known is not None:
            outcomes[index] = _again(known, each, is_by_key=key in known_keys)
        elif first in new:
            twins[index] = first
        else:
            new[index] = each
    insert = _insert_interactions if table == "interactions" else _insert_feedback
    stored = dict(zip(new, insert(rows, list(new.values()), now), strict=True)) if new else {}
    for index, first in twins.items():
        outcomes[index] = _twin(stored[first], new[first], part[index])
    return {**outcomes, **stored}


def _insert_interactions(rows: GroupRows, new: Sequence[Submission], now: datetime) -> list[Stored]:
    rows.insert("interactions", [interaction_values(each, now) for each in new])
    _join_waiting(rows, [s.item for s in new if isinstance(s.item, Interaction)], now)
    return [Stored(id=each.item.id, is_replay=False, status="joined") for each in new]


def _join_waiting(rows: GroupRows, new: Sequence[Interaction], now: datetime) -> None:
    by_id = {(item.tenant, item.id): item for item in new}
    by_trace = {(i.tenant, i.trace_id): i for i in reversed(new) if i.trace_id}
    found = []
    for each in rows.waiting(list(by_id), list(by_trace)):
        item = by_id.get((each.tenant, each.interaction_id or ""))
        item = item or by_trace[each.tenant, each.trace_id or ""]
        found.append((each.seq, About(id=item.id, task=item.task)))
    if found:
        rows.join(found, now)


def _insert_feedback(rows: GroupRows, new: Sequence[Submission], now: datetime) -> list[Stored]:
    items = [s.item for s in new if isinstance(s.item, Feedback)]
    found = _about(rows, items)
    rows.insert("feedback", [feedback_values(s, a, now) for s, a in zip(new, found, strict=True)])
    return [
        Stored(
            id=item.id,
            is_replay=False,
            status="joined" if about or item.target.is_inline else "pending",
        )
        for item, about in zip(items, found, strict=True)
    ]


def _about(rows: GroupRows, new: Sequence[Feedback]) -> list[About | None]:
    """The interaction of each feedback, where it is known."""
    ids = {(f.tenant, f.target.interaction_id) for f in new if f.target.interaction_id}
    traces = {(f.tenant, f.target.trace_id) for f in new if f.target.trace_id}
    by_id = rows.interactions(list(ids)) if ids else {}
    by_trace = rows.latest_of_traces(list(traces)) if traces else {}
    return [
        by_id.get((f.tenant, f.target.interaction_id or ""))
        or by_trace.get((f.tenant, f.target.trace_id or ""))
        for f in new
    ]


def _again(known: Known, submission: Submission, *, is_by_key: bool) -> Outcome:
    if known.payload_sha256 in (None, submission.payload_sha256):
        return Stored(id=known.id, is_replay=True, status=known.status)
    return _conflict(submission, is_by_key=is_by_key)


def _twin(first: Stored, winner: Submission, submission: Submission) -> Outcome:
    if winner.payload_sha256 == submission.payload_sha256:
        return replace(first, is_replay=True)
    is_by_key = submission.key is not None and submission.key == winner.key
    return _conflict(submission, is_by_key=is_by_key)


def _conflict(submission: Submission, *, is_by_key: bool) -> ConflictError:
    if is_by_key:
        return ConflictError("this idempotency key was used before with another payload")
    return ConflictError(f"the id {submission.item.id} was used before with another payload")
