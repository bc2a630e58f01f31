"""A clock that jumps: readers by window and by cursor still see every row once."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from perennial.feedback.records import Correction, Feedback
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.feedback.store import FeedbackStore
from perennial.infra.db import Database, create_all
from tests.faults.ledger import event
from tests.faults.server import build_app

DAY = timedelta(days=1)
START = datetime(2026, 5, 1, 12, tzinfo=UTC)
NUM_ROUNDS = 12
JUMPS = {
    "back": [-DAY] * NUM_ROUNDS,
    "forth": [DAY] * NUM_ROUNDS,
    "back and forth": [DAY, -DAY] * (NUM_ROUNDS // 2),
    "once back, by years": [timedelta(days=-4000), *[timedelta(0)] * (NUM_ROUNDS - 1)],
    "in steps too small to see": [timedelta(0)] * NUM_ROUNDS,
}


class JumpingClock:
    """Stands still, but for its jumps."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/p.db")
    create_all(database)
    yield database
    database.dispose()


@pytest.mark.parametrize("jumps", JUMPS.values(), ids=JUMPS)
def test_windows_and_pages_hold_every_row_once(database: Database, jumps: list[timedelta]) -> None:
    clock = JumpingClock()
    reader = Reader(SqlFeedbackStore(database, clock))
    keys = [f"clock-{n}" for n in range(4 * NUM_ROUNDS)]

    with TestClient(build_app(database, clock)) as client:
        for number, jump in enumerate(jumps):
            for posted in map(event, keys[4 * number : 4 * number + 4]):
                assert client.post(posted.path, json=posted.body).status_code == 201
            reader.look()
            clock.now += jump
            reader.look()
    clock.now = START + 10_000 * DAY
    reader.look()

    assert sorted(reader.in_pages) == sorted(keys)
    assert sorted(reader.in_windows) == sorted(keys)


class Reader:
    """Looks at everything by windows, and at interactions and feedback by pages."""

    def __init__(self, store: FeedbackStore) -> None:
        self.in_windows: list[str] = []
        self.in_pages: list[str] = []
        self._store = store
        self._since = START - 10_000 * DAY
        self._after_interaction = self._after_feedback = 0

    def look(self) -> None:
        until = self._store.horizon()
        if until > self._since:
            rows = self._store.interactions_between("support", self._since, until, limit=1000)
            judged = self._store.feedback_between("support", self._since, until)
            self.in_windows += [row.completion for row in rows]
            self.in_windows += [_text(row.feedback) for row in judged]
            self._since = until
        asked = self._store.list_interactions("default", self._after_interaction, limit=100)
        told = self._store.list_feedback("default", self._after_feedback, limit=100)
        self.in_pages += [row.completion for row in asked.items]
        self.in_pages += [_text(row) for row in told.items]
        self._after_interaction, self._after_feedback = asked.next_after, told.next_after


def _text(feedback: Feedback) -> str:
    assert isinstance(feedback.signal, Correction)
    return feedback.signal.text
