"""The ledger of rounds: who works on one, what its steps found, how it ended.

A lease carries an epoch that grows with every claim. A worker that was paused past its lease and
wakes up holds an old epoch, and whatever it writes is refused. What the steps do is left to flows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from perennial.infra.clock import Clock, new_id
from perennial.infra.db import Database
from perennial.infra.errors import ConflictError, InputError, LeaseLostError, NotFoundError
from perennial.registry.tables import RoundRow, RoundStepRow

Json = dict[str, Any]  # Any: what a step returns is JSON


class RoundState(StrEnum):
    """Where a round is; every state but `open` is final."""

    OPEN = "open"
    PROMOTED = "promoted"
    REJECTED = "rejected"


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One retraining; `number` counts from 1 within its task."""

    id: str
    task: str
    number: int
    reason: str
    inputs_digest: str
    state: RoundState
    reasons: tuple[str, ...]
    opened_at: datetime
    closed_at: datetime | None
    owner: str | None
    lease_until: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """The right to write to a round until another worker claims it."""

    round_id: str
    owner: str
    epoch: int


class Ledger:
    """Rounds, leases and step results in the database."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def open_round(self, task: str, reason: str, inputs_digest: str) -> Round:
        """The round for these inputs, opened now or found again, in whatever state it is."""
        with self._database.write() as session:
            _lock_task(session, task)
            known = session.scalar(
                select(RoundRow).filter_by(task=task, inputs_digest=inputs_digest)
            )
            if known is not None:
                return _to_round(known)
            highest = session.scalar(select(func.max(RoundRow.number)).filter_by(task=task)) or 0
            row = RoundRow(
                id=new_id("rnd"),
                task=task,
                number=highest + 1,
                reason=reason,
                inputs_digest=inputs_digest,
                state=RoundState.OPEN,
                reasons=[],
                opened_at=self._clock(),
                epoch=0,
            )
            session.add(row)
            session.flush()
            return _to_round(row)

    def claim(self, round_id: str, owner: str, ttl_s: float) -> Lease:
        """A lease with a new epoch.

        A claim by the same owner takes over at once: after a restart it is the same worker.

        Raises:
            NotFoundError: there is no such round.
            ConflictError: the round is closed.
            LeaseLostError: another owner's lease has not run out.
        """
        now = self._clock()
        with self._database.write() as session:
            row = _locked(session, round_id)
            _check_open(row)
            if row.lease_until is not None and row.lease_until > now and row.owner != owner:
                raise LeaseLostError(
                    f"{round_id} belongs to {row.owner} until {row.lease_until.isoformat()}",
                    round_id=round_id,
                )
            row.epoch += 1
            row.owner = owner
            row.lease_until = now + timedelta(seconds=_positive(ttl_s))
            return Lease(round_id=round_id, owner=owner, epoch=row.epoch)

    def renew(self, lease: Lease, ttl_s: float) -> None:
        """Extend the lease from now.

        Raises:
            LeaseLostError: another worker has claimed the round, or it was released.
        """
        with self._database.write() as session:
            row = _held(session, lease)
            row.lease_until = self._clock() + timedelta(seconds=_positive(ttl_s))

    def release(self, lease: Lease) -> None:
        """Let the next worker claim at once; nothing happens when the lease was lost before."""
        with self._database.write() as session:
            row = _locked(session, lease.round_id)
            if row.epoch == lease.epoch:
                row.owner = None
                row.lease_until = None

    def finish_step(
        self, lease: Lease, step: str, inputs_digest: str, result: Mapping[str, Any]
    ) -> None:
        """Keep the result of a step; the same result again changes nothing.

        Raises:
            LeaseLostError: another worker has claimed the round.
            ConflictError: the step already has another result for these inputs.
        """
        with self._database.write() as session:
            _held(session, lease)
            known = session.get(RoundStepRow, (lease.round_id, step, inputs_digest))
            if known is not None:
                if known.result != dict(result):
                    raise ConflictError(
                        f"step {step} of {lease.round_id} already has another result", step=step
                    )
                return
            session.add(
                RoundStepRow(
                    round_id=lease.round_id,
                    step=step,
                    inputs_digest=inputs_digest,
                    result=dict(result),
                    epoch=lease.epoch,
                    finished_at=self._clock(),
                )
            )

    def step_result(self, round_id: str, step: str, inputs_digest: str) -> Json | None:
        """What the step found for these inputs, or None when it has not finished."""
        with self._database.read() as session:
            row = session.get(RoundStepRow, (round_id, step, inputs_digest))
            return None if row is None else dict(row.result)

    def last_result(self, round_id: str, step: str) -> Json | None:
        """What the step found last, whatever its inputs, or None when it has not finished."""
        query = select(RoundStepRow).filter_by(round_id=round_id, step=step)
        with self._database.read() as session:
            row = session.scalar(query.order_by(RoundStepRow.finished_at.desc()).limit(1))
            return None if row is None else dict(row.result)

    def steps(self, round_id: str) -> tuple[str, ...]:
        """Names of the finished steps, in the order in which they ended."""
        order = (RoundStepRow.finished_at, RoundStepRow.step)
        query = select(RoundStepRow.step).filter_by(round_id=round_id).order_by(*order)
        with self._database.read() as session:
            return tuple(session.scalars(query))

    def close_round(self, lease: Lease, state: RoundState, reasons: Sequence[str]) -> Round:
        """The round in its final state; closing it again in the same state changes nothing.

        Raises:
            LeaseLostError: another worker has claimed the round.
            ConflictError: it was closed in another state.
        """
        if state is RoundState.OPEN:
            raise InputError("a round is closed in a final state, not open")
        with self._database.write() as session:
            row = _locked(session, lease.round_id)
            if row.state == state:
                return _to_round(row)
            _check_open(row)
            _check_epoch(row, lease)
            row.state = state
            row.reasons = list(reasons)
            row.closed_at = self._clock()
            row.owner = None
            row.lease_until = None
            return _to_round(row)

    def get(self, round_id: str) -> Round:
        """One round.

        Raises:
            NotFoundError: there is no such round.
        """
        with self._database.read() as session:
            return _to_round(_found(session.get(RoundRow, round_id), round_id))

    def current(self, task: str) -> Round | None:
        """The oldest open round of a task, which a restarted worker must finish first."""
        query = select(RoundRow).filter_by(task=task, state=RoundState.OPEN)
        with self._database.read() as session:
            row = session.scalar(query.order_by(RoundRow.number).limit(1))
            return None if row is None else _to_round(row)

    def list_rounds(self, task: str, limit: int = 100) -> tuple[Round, ...]:
        """Rounds of a task, newest first."""
        query = select(RoundRow).filter_by(task=task).order_by(RoundRow.number.desc()).limit(limit)
        with self._database.read() as session:
            return tuple(_to_round(row) for row in session.scalars(query))


def _lock_task(session: Session, task: str) -> None:
    # SQLite has one writer already; on PostgreSQL two openers could draw the same number.
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"rounds:{task}"))))


def _locked(session: Session, round_id: str) -> RoundRow:
    row = session.get(RoundRow, round_id, with_for_update=True)
    return _found(row, round_id)


def _found(row: RoundRow | None, round_id: str) -> RoundRow:
    if row is None:
        raise NotFoundError(f"there is no round {round_id}", round_id=round_id)
    return row


def _held(session: Session, lease: Lease) -> RoundRow:
    row = _locked(session, lease.round_id)
    _check_epoch(row, lease)
    _check_open(row)
    return row


def _check_epoch(row: RoundRow, lease: Lease) -> None:
    if row.epoch != lease.epoch or row.owner != lease.owner:
        raise LeaseLostError(
            f"{row.id} was claimed again: epoch {lease.epoch} of {lease.owner} is over, "
            f"{row.epoch} is current",
            round_id=row.id,
            epoch=lease.epoch,
        )


def _check_open(row: RoundRow) -> None:
    if row.state != RoundState.OPEN:
        raise ConflictError(f"{row.id} is closed as {row.state}", round_id=row.id, state=row.state)


def _positive(ttl_s: float) -> float:
    if ttl_s <= 0:
        raise InputError(f"ttl_s must be positive, got {ttl_s}")
    return ttl_s


def _to_round(row: RoundRow) -> Round:
    return Round(
        id=row.id,
        task=row.task,
        number=row.number,
        reason=row.reason,
        inputs_digest=row.inputs_digest,
        state=RoundState(row.state),
        reasons=tuple(row.reasons),
        opened_at=row.opened_at,
        closed_at=row.closed_at,
        owner=row.owner,
        lease_until=row.lease_until,
    )
