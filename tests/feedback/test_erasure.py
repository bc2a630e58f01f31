"""Erasure empties what a person said and was told, and no retry brings it back."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from sqlalchemy import select

from perennial.feedback.records import Correction, Feedback, Interaction, Target
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.feedback.tables import FeedbackRow, InteractionRow
from perennial.infra.db import Database
from perennial.infra.errors import NotFoundError
from tests.feedback.writing import put, put_keyed

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
FAR_AHEAD = datetime(2100, 1, 1, tzinfo=UTC)
SECRET = "Ada lives in Paris"


@pytest.fixture
def erased(
    store: SqlFeedbackStore,
    make_interaction: Callable[..., Interaction],
    make_feedback: Callable[..., Feedback],
) -> tuple[Interaction, Feedback]:
    """One person's conversation, a stranger's correction of it, and somebody else's, erased."""
    about = make_interaction(subject="ada", completion=SECRET, tags={"note": SECRET})
    said = make_feedback(
        target=Target(interaction_id=about.id), signal=Correction(text=SECRET), subject="judge"
    )
    put_keyed(store, about, "k")
    put(store, said)
    put(store, make_feedback(subject="ada", signal=Correction(text=SECRET)))
    put(store, make_interaction(subject="bob", completion="stays"))

    assert store.erase_subject("acme", "ada") == 3
    return about, said


def test_nothing_of_it_is_left_in_the_rows(
    database: Database, erased: tuple[Interaction, Feedback]
) -> None:
    with database.read() as session:
        rows = session.execute(select(InteractionRow.__table__)).all()
        rows += session.execute(select(FeedbackRow.__table__)).all()

    assert SECRET not in repr(rows)
    assert "'ada'" not in repr(rows)
    assert "stays" in repr(rows)


def test_erased_rows_are_in_no_answer_list_or_window(
    store: SqlFeedbackStore, erased: tuple[Interaction, Feedback]
) -> None:
    about, said = erased
    with pytest.raises(NotFoundError):
        store.get_interaction("acme", about.id)
    with pytest.raises(NotFoundError):
        store.get_feedback("acme", said.id)

    (left,) = store.list_interactions("acme", 0, 10).items
    assert left.completion == "stays"
    assert store.interactions_between("support", LONG_AGO, FAR_AHEAD, 10) == (left,)
    assert store.list_feedback("acme", 0, 10).items == ()
    assert store.feedback_between("support", LONG_AGO, FAR_AHEAD) == ()


def test_late_retry_does_not_bring_it_back(
    store: SqlFeedbackStore, erased: tuple[Interaction, Feedback]
) -> None:
    about, said = erased

    assert put_keyed(store, about, "k").is_replay
    assert put(store, said).is_replay
    with pytest.raises(NotFoundError):
        store.get_interaction("acme", about.id)


def test_pending_feedback_that_was_erased_is_never_joined(
    store: SqlFeedbackStore,
    make_interaction: Callable[..., Interaction],
    make_feedback: Callable[..., Feedback],
) -> None:
    about = make_interaction()
    put(store, make_feedback(subject="ada", target=Target(interaction_id=about.id)))
    store.erase_subject("acme", "ada")

    put(store, about)

    assert store.join_pending() == 0
    assert store.feedback_between("support", LONG_AGO, FAR_AHEAD) == ()


def test_feedback_on_an_erased_answer_waits_for_ever(
    store: SqlFeedbackStore,
    make_feedback: Callable[..., Feedback],
    erased: tuple[Interaction, Feedback],
) -> None:
    late = make_feedback(target=Target(interaction_id=erased[0].id))

    assert put(store, late).status == "pending"
    assert store.join_pending() == 0
    (found,) = store.list_feedback("acme", 0, 10).items
    assert (found.id, found.task, found.status) == (late.id, None, "pending")


def test_another_tenants_subject_of_that_name_stays(
    store: SqlFeedbackStore, make_interaction: Callable[..., Interaction]
) -> None:
    put(store, make_interaction(tenant="bolt", subject="ada"))

    assert store.erase_subject("acme", "ada") == 0
    assert len(store.list_interactions("bolt", 0, 10).items) == 1


def test_erasing_twice_changes_nothing(
    store: SqlFeedbackStore, erased: tuple[Interaction, Feedback]
) -> None:
    assert store.erase_subject("acme", "ada") == 0


def test_the_store_names_the_feedback_that_was_erased(
    store: SqlFeedbackStore,
    make_feedback: Callable[..., Feedback],
    erased: tuple[Interaction, Feedback],
) -> None:
    put(store, make_feedback(subject="bob", signal=Correction(text="stays")))
    found = store.erased_feedback()
    assert erased[1].id in found
    assert len(found) == 2


def test_the_store_knows_when_a_row_was_last_erased(
    store: SqlFeedbackStore, make_interaction: Callable[..., Interaction]
) -> None:
    put(store, make_interaction(subject="eve"))
    assert store.last_erased_at() is None

    before = store.horizon()
    store.erase_subject("acme", "eve")

    found = store.last_erased_at()
    assert found is not None
    assert before < found < store.horizon()
