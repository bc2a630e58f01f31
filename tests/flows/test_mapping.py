from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.feedback.records import (
    Binary,
    Comment,
    Correction,
    Feedback,
    Interaction,
    Judged,
    Message,
    Signal,
    Target,
)
from perennial.flows.mapping import to_feedback_rows, to_traffic, token_f1

AT = datetime(2026, 1, 1, tzinfo=UTC)


def _interaction(name: str = "int_1", **tags: str) -> Interaction:
    return Interaction(
        id=name,
        tenant="default",
        task="support",
        messages=(Message(role="user", content="how long?"),),
        completion="one day",
        model_version="base",
        route_role="base",
        received_at=AT,
        subject="user-1",
        tags=tags,
    )


def _judged(signal: Signal, interaction: Interaction) -> Judged:
    feedback = Feedback(
        id=f"fb_{type(signal).__name__}",
        tenant="default",
        target=Target(interaction_id=interaction.id),
        signal=signal,
        source_kind="end_user",
        received_at=AT,
        status="joined",
        interaction_id=interaction.id,
    )
    return Judged(feedback=feedback, interaction=interaction)


def test_traffic_carries_what_users_said() -> None:
    interaction = _interaction()
    judged = [
        _judged(Binary(value=False), interaction),
        _judged(Correction(text="two days"), interaction),
    ]

    (row,) = to_traffic([interaction], judged)

    assert (row.thumbs, row.has_correction, row.prompt) == (-1, True, "how long?")


def test_probes_enter_neither_windows_nor_training() -> None:
    probe = _interaction(probe="act1")

    assert to_traffic([probe], []) == ()
    assert to_feedback_rows([_judged(Correction(text="two days"), probe)]) == ()


def test_only_corrections_and_demonstrations_train() -> None:
    interaction = _interaction()
    signals: tuple[Signal, ...] = (Binary(value=True), Comment(text="hm"), Correction(text="two"))

    rows = to_feedback_rows(_judged(signal, interaction) for signal in signals)

    assert [(row.kind, row.text, row.subject) for row in rows] == [("correction", "two", "user-1")]


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("It is 38 days.", "it is 38 days", 1.0),
        ("no idea", "it is 38 days", 0.0),
        ("", "it is 38 days", 0.0),
        ("38 days", "it is 38 days", 2 / 3),  # precision 1, recall 1/2
        ("days days days days", "it is 38 days", 0.25),
    ],
)
def test_token_f1_by_hand(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


@given(st.text(), st.text())
def test_token_f1_is_a_symmetric_share(one: str, other: str) -> None:
    assert 0 <= token_f1(one, other) <= 1
    assert token_f1(one, other) == token_f1(other, one)
