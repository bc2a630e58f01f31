from collections.abc import Callable

import pytest
from msgspec.structs import replace

from perennial.feedback.records import (
    MAX_TAG_VALUE_CHARS,
    MAX_TEXT_CHARS,
    Binary,
    Comment,
    Correction,
    Demonstration,
    Feedback,
    Implicit,
    Interaction,
    Label,
    Message,
    Preference,
    Score,
    Signal,
    Target,
)
from perennial.feedback.redact import (
    pseudonym,
    redact,
    redact_feedback,
    redact_for,
    redact_interaction,
    redact_nothing,
)

MAIL = "bob@example.com"
MakeInteraction = Callable[..., Interaction]
MakeFeedback = Callable[..., Feedback]


def test_each_text_of_an_interaction_is_redacted_and_counted(
    make_interaction: MakeInteraction,
) -> None:
    item = make_interaction(
        messages=(
            Message(role="system", content="Be kind."),
            Message(role="user", content=f"I am {MAIL}, +49 30 1234567"),
        ),
        completion=f"Hello {MAIL}",
        tags={"from": "203.0.113.7", "channel": "web"},
    )

    redacted = redact_interaction(item, redact)

    assert redacted.record == replace(
        item,
        messages=(
            Message(role="system", content="Be kind."),
            Message(role="user", content="I am [EMAIL], [PHONE]"),
        ),
        completion="Hello [EMAIL]",
        tags={"from": "[IP]", "channel": "web"},
    )
    assert redacted.counts == {"EMAIL": 2, "PHONE": 1, "IP": 1}


def test_ids_task_and_versions_stay(make_interaction: MakeInteraction) -> None:
    item = make_interaction(
        id="203.0.113.7",
        task="mail bob@example.com",
        model_version="2001:db8::1",
        trace_id=MAIL,
        finish_reason="+49 30 1234567",
        tags={MAIL: "tag"},
    )

    assert redact_interaction(item, redact).record is item


def test_pseudonyms_of_people_stay(make_interaction: MakeInteraction) -> None:
    item = make_interaction(
        subject="user-4829103847", session="550e8400-e29b-41d4-a716-446655440000"
    )

    assert redact_interaction(item, redact).record is item


def test_an_address_as_subject_becomes_the_same_pseudonym_everywhere(
    make_interaction: MakeInteraction, make_feedback: MakeFeedback
) -> None:
    interaction = redact_interaction(make_interaction(subject=MAIL, session=MAIL), redact)
    feedback = redact_feedback(make_feedback(subject=MAIL, source_id=MAIL), redact)

    name = pseudonym("acme", MAIL)
    assert (interaction.record.subject, interaction.record.session) == (name, name)
    assert (feedback.record.subject, feedback.record.source_id) == (name, name)
    assert interaction.counts == feedback.counts == {"EMAIL": 2}


def test_pseudonyms_differ_by_person_and_tenant_and_are_not_redacted_again() -> None:
    names = {pseudonym(t, n) for t in ("acme", "other") for n in (MAIL, "eve@example.com")}

    assert len(names) == 4
    assert {redact(name).text for name in names} == names


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        (Label(value=MAIL), Label(value="[EMAIL]")),
        (Correction(text=MAIL), Correction(text="[EMAIL]")),
        (Demonstration(text=MAIL), Demonstration(text="[EMAIL]")),
        (Comment(text=MAIL), Comment(text="[EMAIL]")),
        (Preference(chosen=MAIL, rejected="x"), Preference(chosen="[EMAIL]", rejected="x")),
        (Preference(chosen="x", rejected=MAIL), Preference(chosen="x", rejected="[EMAIL]")),
        (Implicit(action="edit", text=MAIL), Implicit(action="edit", text="[EMAIL]")),
    ],
)
def test_each_text_of_a_signal_is_redacted(
    make_feedback: MakeFeedback, signal: Signal, expected: Signal
) -> None:
    redacted = redact_feedback(make_feedback(signal=signal), redact)

    assert redacted.record == make_feedback(id=redacted.record.id, signal=expected)
    assert redacted.counts == {"EMAIL": 1}


@pytest.mark.parametrize(
    "signal",
    [
        Binary(value=True),
        Score(value=1, min=0, max=5),
        Implicit(action="copy"),
        Label(value="spam"),
    ],
)
def test_a_signal_without_text_stays(make_feedback: MakeFeedback, signal: Signal) -> None:
    item = make_feedback(signal=signal)

    assert redact_feedback(item, redact).record is item


def test_an_inline_target_is_redacted(make_feedback: MakeFeedback) -> None:
    def target(text: str) -> Target:
        return Target(messages=(Message(role="user", content=text),), completion=text)

    item = make_feedback(target=target(MAIL), task="t", tags={"by": MAIL})

    redacted = redact_feedback(item, redact)

    assert redacted.record == replace(item, target=target("[EMAIL]"), tags={"by": "[EMAIL]"})
    assert redacted.counts == {"EMAIL": 3}


def test_placeholders_never_make_a_record_too_long(make_interaction: MakeInteraction) -> None:
    short = "a@b.co "  # one character shorter than its placeholder
    item = make_interaction(
        completion=(short * MAX_TEXT_CHARS)[:MAX_TEXT_CHARS],
        tags={"t": (short * MAX_TAG_VALUE_CHARS)[:MAX_TAG_VALUE_CHARS]},
    )

    record = redact_interaction(item, redact).record

    assert len(record.completion) == MAX_TEXT_CHARS
    assert len(record.tags["t"]) == MAX_TAG_VALUE_CHARS


def test_redaction_is_off_for_the_tenants_named(make_feedback: MakeFeedback) -> None:
    item = make_feedback(signal=Comment(text=MAIL))

    assert redact_for({"acme"})(item) == redact_nothing(item)
    assert redact_for({"other"})(item) == redact_feedback(item, redact)
