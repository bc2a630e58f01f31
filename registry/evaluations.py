"""Scores of single rows, kept so that every published figure can be computed again.

A round scores candidate and champion on the same rows; each (round, suite, model, row) is one row
here. Scoring is left to training, the verdict to `gate`.
"""

from collections.abc import Iterable, Set
from dataclasses import dataclass

from sqlalchemy import select

from perennial.infra.clock import Clock
from perennial.infra.db import Database
from perennial.infra.errors import ConflictError
from perennial.registry.tables import EvaluationRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One model's result on one row; `version` is `base` for the base model.

    `score` is in [0, 1], `nll` in nats per token; both are None when the row errored.
    """

    round_id: str
    suite: str
    version: str
    row_id: str
    cluster: str
    score: float | None = None
    nll: float | None = None
    answer: str | None = None
    error: str | None = None


class EvaluationStore:
    """Adds and reads evaluations, and empties their answers."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def add(self, evaluations: Iterable[Evaluation]) -> int:
        """How many of the rows were new; a row that is there with the same values is skipped.

        Raises:
            ConflictError: a row is there with other values; nothing is stored.
        """
        rows = list(evaluations)
        num_new = 0
        with self._database.write() as session:
            for item in rows:
                key = (item.round_id, item.suite, item.version, item.row_id)
                known = session.get(EvaluationRow, key)
                if known is not None and _to_value(known) != _to_value(_to_row(item, self._clock)):
                    raise ConflictError(f"{'/'.join(key)} was scored before with another result")
                if known is None:
                    session.add(_to_row(item, self._clock))
                    num_new += 1
        return num_new

    def rows(
        self, round_id: str, *, suite: str | None = None, version: str | None = None
    ) -> tuple[Evaluation, ...]:
        """Evaluations of a round, by suite, version and row id."""
        wanted = {"round_id": round_id, "suite": suite, "version": version}
        filters = {key: value for key, value in wanted.items() if value is not None}
        order = (EvaluationRow.suite, EvaluationRow.version, EvaluationRow.row_id)
        with self._database.read() as session:
            found = session.scalars(select(EvaluationRow).filter_by(**filters).order_by(*order))
            return tuple(_to_value(row) for row in found)

    def erase_answers(self, round_id: str, *, but: Set[str]) -> int:
        """How many answers of a round were emptied: of all rows but those with the ids `but`.

        Scores stay, and with them the figures.
        """
        with self._database.write() as session:
            told = select(EvaluationRow).filter_by(round_id=round_id)
            rows = session.scalars(told.where(EvaluationRow.answer.is_not(None)))
            gone = [row for row in rows if row.row_id not in but]
            for row in gone:
                row.answer = None
            return len(gone)


def _to_row(item: Evaluation, clock: Clock) -> EvaluationRow:
    return EvaluationRow(
        round_id=item.round_id,
        suite=item.suite,
        version=item.version,
        row_id=item.row_id,
        cluster=item.cluster,
        score=item.score,
        nll=item.nll,
        answer=_storable(item.answer),
        error=_storable(item.error),
        scored_at=clock(),
    )


def _to_value(row: EvaluationRow) -> Evaluation:
    return Evaluation(
        round_id=row.round_id,
        suite=row.suite,
        version=row.version,
        row_id=row.row_id,
        cluster=row.cluster,
        score=row.score,
        nll=row.nll,
        answer=row.answer,
        error=row.error,
    )


def _storable(text: str | None) -> str | None:
    # PostgreSQL refuses NUL, and a model may emit one.
    return None if text is None else text.replace("\x00", "�")
