from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.feedback.records import (
    Binary,
    Comment,
    Correction,
    Demonstration,
    Feedback,
    Implicit,
    Interaction,
    Judged,
    Label,
    Message,
    Preference,
    Score,
    Signal,
    Target,
)
from perennial.flows.mapping import to_feedback_rows, to_traffic, token_f1
from perennial.training.compile import CompileLimits, Drop, compile_feedback

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


def _judged(signal: Signal, interaction: Interaction, *, may_train: bool = True) -> Judged:
    feedback = Feedback(
        id=f"fb_{type(signal).__name__}",
        tenant="default",
        target=Target(interaction_id=interaction.id),
        signal=signal,
        source_kind="end_user",
        received_at=AT,
        status="joined",
        interaction_id=interaction.id,
        may_train=may_train,
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


@pytest.mark.parametrize(
    ("signal", "kind", "text", "answer", "label"),
    [
        (Correction(text="two"), "correction", "two", "one day", None),
        (Demonstration(text="two"), "demonstration", "two", "one day", None),
        (Implicit(action="edit", text="two"), "edit", "two", "one day", None),
        (Preference(chosen="two", rejected="three"), "preference", "two", "three", None),
        (Binary(value=True), "binary", "", "one day", "desirable"),
        (Binary(value=False), "binary", "", "one day", "undesirable"),
        (Score(value=5, min=1, max=5), "score", "", "one day", "desirable"),
        (Score(value=3, min=1, max=5), "score", "", "one day", None),
        (Score(value=2, min=1, max=5), "score", "", "one day", "undesirable"),
        (Implicit(action="copy"), "implicit", "", "one day", "desirable"),
        (Implicit(action="accept"), "implicit", "", "one day", "desirable"),
        (Implicit(action="regenerate"), "implicit", "", "one day", "undesirable"),
        (Implicit(action="abandon"), "implicit", "", "one day", "undesirable"),
        (Implicit(action="retry"), "implicit", "", "one day", "undesirable"),
        (Implicit(action="edit"), "implicit", "", "one day", None),
        (Comment(text="hm"), "comment", "", "one day", None),
        (Label(value="rude"), "label", "", "one day", None),
    ],
)
def test_each_signal_says_what_is_wanted_or_how_the_answer_was(
    signal: Signal, kind: str, text: str, answer: str, label: str | None
) -> None:
    (row,) = to_feedback_rows([_judged(signal, _interaction())])

    assert (row.kind, row.text, row.answer, row.label) == (kind, text, answer, label)
    assert row.subject == "user-1"


def test_comments_and_labels_never_train() -> None:
    judged = [_judged(signal, _interaction()) for signal in (Comment(text="hm"), Label(value="a"))]

    compiled = compile_feedback(to_feedback_rows(judged), CompileLimits())

    assert (compiled.examples, compiled.pairs, compiled.judgements) == ((), (), ())
    assert compiled.num_dropped == {Drop.UNSUPPORTED_KIND: 2}


@pytest.mark.parametrize("signal", [Correction(text="two"), Binary(value=True)])
def test_what_may_not_be_trained_on_is_dropped(signal: Signal) -> None:
    (row,) = to_feedback_rows([_judged(signal, _interaction(), may_train=False)])

    assert not row.may_train
    compiled = compile_feedback([row], CompileLimits())
    assert compiled.num_dropped == {Drop.NO_CONSENT: 1}


def test_an_edit_of_an_answer_given_inline_makes_a_pair() -> None:
    feedback = Feedback(
        id="fb_1",
        tenant="default",
        task="support",
        target=Target(messages=(Message(role="user", content="how long?"),), completion="one day"),
        signal=Implicit(action="edit", text="two days"),
        source_kind="end_user",
        received_at=AT,
    )

    rows = to_feedback_rows([Judged(feedback=feedback, interaction=None)])
    compiled = compile_feedback(rows, CompileLimits(min_pairs=1))

    assert [(p.chosen, p.rejected) for p in compiled.pairs] == [("two days", "one day")]
    assert [e.completion for e in compiled.examples] == ["two days"]


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("It is 38 days.", "it is 38 days", 1.0),
        ("no idea", "it is 38 days", 0.0),
        ("", "it is 38 days", 0.0),
        ("38 days", "it is 38 days", 2 / 3),  # precision 1, recall 1/2
        ("days days days days", "it is 38 days", 0.25),
        ("दिन", "दान", 0.0),
        ("👍", "👍", 1.0),
    ],
)
def test_token_f1_by_hand(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


@given(st.text(), st.text())
def test_token_f1_is_a_symmetric_share(one: str, other: str) -> None:
    assert 0 <= token_f1(one, other) <= 1
    assert token_f1(one, other) == token_f1(other, one)
