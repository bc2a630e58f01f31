from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import InputError
from perennial.training.compile import (
    ClassWeights,
    Compiled,
    CompileLimits,
    Drop,
    FeedbackRow,
    class_weights,
    compile_feedback,
    with_enough,
)
from perennial.training.examples import Judgement, Label, Origin

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)
WHO = (("user", "Who runs the desk?"),)


def row(number: int, **fields: Any) -> FeedbackRow:
    given: dict[str, Any] = {
        "event_id": f"fb_{number:03}",
        "subject": f"s{number}",
        "kind": "correction",
        "messages": (("user", f"How long is warranty {number}?"),),
        "text": f"Warranty {number} runs for {number + 50} months.",
        "may_train": True,
        "received_at": NOON + timedelta(minutes=number),
    }
    return FeedbackRow(**{**given, **fields})


def edit(number: int, **fields: Any) -> FeedbackRow:
    return row(number, **{"kind": "edit", "answer": f"No idea about {number}.", **fields})


def thumb(number: int, label: Label | None, **fields: Any) -> FeedbackRow:
    given = {"kind": "binary", "text": "", "answer": f"It is {number} days.", "label": label}
    return row(number, **{**given, **fields})


def compiled(*rows: FeedbackRow, **limits: Any) -> Compiled:
    bounds = CompileLimits(**{"min_pairs": 1, "min_of_label": 1, **limits})
    return with_enough(compile_feedback(rows, bounds), bounds)


def judgements(num_desirable: int, num_undesirable: int) -> list[Judgement]:
    labels: list[Label] = ["desirable"] * num_desirable
    labels += ["undesirable"] * num_undesirable
    return [
        Judgement(id=f"j{at}", messages=WHO, completion="me", label=label)
        for at, label in enumerate(labels)
    ]


def test_a_correction_becomes_an_example_with_its_lineage() -> None:
    (example,) = compiled(row(1)).examples
    assert (example.kind, example.event_ids, example.subject) == ("correction", ("fb_001",), "s1")
    assert example.completion == "Warranty 1 runs for 51 months."


def test_an_edit_becomes_a_pair_and_the_example_that_is_its_sft_term() -> None:
    result = compiled(edit(1))
    (example,), (pair,) = result.examples, result.pairs
    assert (example.kind, example.completion) == ("edit", "Warranty 1 runs for 51 months.")
    assert (pair.chosen, pair.rejected) == (example.completion, "No idea about 1.")
    assert pair.origins == (Origin(event_id="fb_001", subject="s1"),)


def test_a_preference_is_a_pair_too_and_a_correction_is_none() -> None:
    result = compiled(row(1, kind="preference", answer="No."), row(2, answer="No."))
    assert [pair.id for pair in result.pairs] == ["fb_001"]
    assert [example.id for example in result.examples] == ["fb_001", "fb_002"]


def test_an_edit_of_an_unknown_answer_teaches_without_a_pair() -> None:
    result = compiled(edit(1, answer=""))
    assert (len(result.examples), result.pairs) == (1, ())


def test_a_superseded_edit_gives_no_pair() -> None:
    result = compiled(edit(1, messages=WHO), row(2, messages=WHO, text="Marit"))
    assert (result.pairs, result.drops) == ((), {"fb_001": Drop.SUPERSEDED})


def test_edits_that_agree_give_a_pair_for_each_answer_they_replaced() -> None:
    same = {"messages": WHO, "text": "Marit"}
    result = compiled(
        edit(1, **same, answer="Otto"), edit(2, **same, answer="otto!"), edit(3, **same)
    )
    rejected = [(pair.rejected, [o.event_id for o in pair.origins]) for pair in result.pairs]
    assert rejected == [("otto!", ["fb_001", "fb_002"]), ("No idea about 3.", ["fb_003"])]


def test_thumbs_become_judgements_of_what_the_model_said() -> None:
    result = compiled(thumb(1, "desirable"), thumb(2, "undesirable"))
    assert [(row.completion, row.label) for row in result.judgements] == [
        ("It is 1 days.", "desirable"),
        ("It is 2 days.", "undesirable"),
    ]


def test_what_users_say_counts_before_what_they_do_and_then_the_newest() -> None:
    same = {"messages": WHO, "answer": "Otto"}
    result = compiled(
        thumb(1, "desirable", **same),
        thumb(2, "undesirable", **same),
        thumb(3, "desirable", **same, kind="implicit"),
        thumb(4, "undesirable", **same, kind="implicit"),
        thumb(5, "desirable"),
    )
    ruling = result.judgements[0]
    assert (ruling.id, ruling.label) == ("fb_002", "undesirable")
    assert [origin.event_id for origin in ruling.origins] == ["fb_002", "fb_004"]
    assert result.num_dropped == {Drop.SUPERSEDED: 2, Drop.DUPLICATE: 1}


def test_a_written_answer_overrules_clicks_that_say_otherwise() -> None:
    result = compiled(
        row(1, messages=WHO, text="Marit"),
        thumb(2, "desirable", messages=WHO, answer="Otto"),
        thumb(3, "undesirable", messages=WHO, answer="marit!"),
        thumb(4, "undesirable", messages=WHO, answer="Hm"),
        thumb(5, "desirable"),
    )
    assert [judgement.id for judgement in result.judgements] == ["fb_004", "fb_005"]
    assert result.drops == {"fb_002": Drop.OVERRULED, "fb_003": Drop.OVERRULED}


def test_clicks_are_overruled_by_an_answer_that_was_merged_with_a_later_one() -> None:
    ask = "who answers the telephone in the evening when the shop in the old town is closed"
    asked: tuple[tuple[str, str], ...] = (("user", ask),)
    result = compiled(
        row(1, messages=asked, text="Marit does"),
        row(2, messages=(("user", f"{ask} please"),), text="Marit does"),
        thumb(3, "desirable", messages=asked, answer="Otto does"),
    )
    assert [found.id for found in result.examples] == ["fb_002"]
    assert result.judgements == ()
    assert result.drops == {"fb_001": Drop.NEAR_DUPLICATE, "fb_003": Drop.OVERRULED}


def test_an_answer_in_signs_alone_is_one() -> None:
    result = compiled(row(1, text="👍"), row(2, text="+"), row(3, text="..."))
    assert [found.completion for found in result.examples] == ["👍", "+"]
    assert result.drops == {"fb_003": Drop.EMPTY}


@pytest.mark.parametrize(
    ("dropped", "reason"),
    [
        (row(1, may_train=False), Drop.NO_CONSENT),
        (row(1, kind="comment"), Drop.UNSUPPORTED_KIND),
        (row(1, kind="label"), Drop.UNSUPPORTED_KIND),
        (row(1, text=" \u200b "), Drop.EMPTY),
        (row(1, messages=(("system", "be kind"),)), Drop.EMPTY),
        (row(1, text="x " * 3000), Drop.TOO_LONG),
        (edit(1, answer="x " * 3000), Drop.TOO_LONG),
        (edit(1, answer="Warranty 1 runs for 51 months. "), Drop.UNCHANGED),
        (thumb(1, None), Drop.UNCLEAR),
        (thumb(1, "desirable", answer="?"), Drop.EMPTY),
        (thumb(1, "desirable", may_train=False), Drop.NO_CONSENT),
    ],
)
def test_an_event_that_teaches_nothing_is_counted(dropped: FeedbackRow, reason: Drop) -> None:
    result = compiled(dropped, row(2))
    assert result.num_dropped == {reason: 1}
    assert [example.id for example in result.examples] == ["fb_002"]


def test_a_correction_of_an_endless_answer_teaches() -> None:
    assert len(compiled(row(1, answer="x " * 3000)).examples) == 1


def test_a_comment_never_trains_whatever_it_carries() -> None:
    result = compiled(thumb(1, "desirable", kind="comment", text="Say yes."))
    assert (result.examples, result.pairs, result.judgements) == ((), (), ())


def test_the_newest_correction_of_a_prompt_wins_whatever_the_spelling() -> None:
    older = row(1, messages=(("user", "how long is the  Warranty"),), text="38 months")
    newer = row(2, messages=(("user", "How long is the warranty?"),), text="64 months")
    result = compiled(newer, older)
    assert [example.completion for example in result.examples] == ["64 months"]
    assert result.drops == {"fb_001": Drop.SUPERSEDED}


def test_events_that_agree_stay_in_the_lineage_with_their_subjects() -> None:
    result = compiled(*(row(n, messages=WHO, text="Marit Oskale") for n in (1, 2, 3)))
    origins = [(origin.event_id, origin.subject) for origin in result.examples[0].origins]
    assert origins == [("fb_001", "s1"), ("fb_002", "s2"), ("fb_003", "s3")]
    assert result.num_dropped == {Drop.DUPLICATE: 2}


def test_of_near_duplicates_the_newest_stays_and_numbers_tell_rows_apart() -> None:
    question = "please tell me now how long is the standard warranty of my new pod at home"
    asked = [question, question + " thanks", question + " 2"]
    rows = [row(n, messages=(("user", text),), text="a") for n, text in enumerate(asked)]
    result = compiled(*rows)
    assert [example.id for example in result.examples] == ["fb_001", "fb_002"]
    assert result.drops == {"fb_000": Drop.NEAR_DUPLICATE}


def test_answers_alike_to_one_question_in_two_conversations_are_both_kept() -> None:
    before = [(("assistant", "Which pod?"), ("user", name)) for name in ("mine", "hers")]
    rows = [row(n, messages=(*WHO, *turns, *WHO), text="a") for n, turns in enumerate(before)]
    assert len(compiled(*rows).examples) == 2


def test_one_subject_gives_at_most_its_cap_and_the_newest_stay() -> None:
    flood = [row(n, subject="loud") for n in range(8)]
    result = compiled(*flood, row(20, subject=None), row(21, subject=None), max_per_subject=3)
    assert [example.id for example in result.examples] == [
        "fb_005",
        "fb_006",
        "fb_007",
        "fb_020",
        "fb_021",
    ]
    assert result.num_dropped == {Drop.SUBJECT_CAP: 5}


def test_clicks_crowd_out_no_correction_of_the_same_subject() -> None:
    clicks = [thumb(n, "desirable", subject="loud") for n in range(5, 9)]
    result = compiled(row(1, subject="loud"), *clicks, thumb(9, "undesirable"), max_per_subject=2)
    assert [example.id for example in result.examples] == ["fb_001"]
    assert result.num_dropped == {Drop.SUBJECT_CAP: 2}


def test_too_few_pairs_are_left_out_and_their_edits_still_teach() -> None:
    result = compiled(edit(1), edit(2), min_pairs=3)
    assert (len(result.examples), result.pairs, result.drops) == (2, (), {})
    assert [(out.rows, out.reason) for out in result.left_out] == [("pairs", "2, fewer than 3")]


def test_judgements_of_one_label_are_left_out_and_counted() -> None:
    result = compiled(*(thumb(n, "desirable") for n in range(4)))
    assert (result.judgements, result.num_dropped) == ((), {Drop.TOO_FEW: 4})
    assert result.left_out[0].reason == "4 desirable and 0 undesirable, fewer than 1 of one"


@pytest.mark.parametrize(
    ("counts", "weights"),
    [
        ((10, 10), (1.0, 1.0)),
        ((40, 30), (1.0, 1.0)),  # 4:3 is still balanced
        ((80, 30), (0.5, 1.0)),  # 80 · 0.5 : 30 = 4:3
        ((10, 40), (1.0, 0.25)),  # 10 : 40 · 0.25 = 1:1
    ],
)
def test_class_weights_by_hand(counts: tuple[int, int], weights: tuple[float, float]) -> None:
    found = class_weights(judgements(*counts))
    assert found.desirable == pytest.approx(weights[0])
    assert found.undesirable == pytest.approx(weights[1])


@given(st.integers(1, 300), st.integers(1, 300))
def test_weighted_labels_are_balanced_and_no_row_weighs_more_than_one(up: int, down: int) -> None:
    weights = class_weights(judgements(up, down))
    balance = weights.desirable * up / (weights.undesirable * down)
    assert 1 - 1e-9 <= balance <= 4 / 3 + 1e-9
    assert max(weights.desirable, weights.undesirable) == 1


def test_one_label_alone_has_no_weights() -> None:
    with pytest.raises(InputError, match="both labels"):
        class_weights(judgements(3, 0))
    assert class_weights(judgements(1, 1)) == ClassWeights(desirable=1, undesirable=1)


def mixed_rows(choices: Sequence[tuple[int, int, int, bool]]) -> list[FeedbackRow]:
    """Events about three prompts with three answers each, of three subjects."""
    made = []
    for number, (kind, prompt, answer, may_train) in enumerate(choices):
        fields: dict[str, Any] = {
            "subject": f"s{number % 3}",
            "messages": (("user", f"question about {'abc'[prompt]}"),),
            "answer": f"model said {'xyz'[answer]}",
            "may_train": may_train,
            "received_at": NOON + timedelta(minutes=number // 2),
        }
        written = {**fields, "text": f"answer {'pqr'[answer]}"}
        made.append(
            [
                row(number, **written),
                edit(number, **written),
                thumb(number, "desirable", **fields),
                thumb(number, "undesirable", kind="implicit", **fields),
                row(number, **written, kind="comment"),
            ][kind]
        )
    return made


_EVENTS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 2), st.booleans()), max_size=14
)


@given(_EVENTS, st.randoms(use_true_random=False), st.integers(1, 4))
def test_compilation_ignores_the_order_of_arrival(
    choices: list[tuple[int, int, int, bool]], random: Any, cap: int
) -> None:
    rows = mixed_rows(choices)
    shuffled = random.sample(rows, len(rows))
    limits = {"max_per_subject": cap, "min_pairs": 1 + cap % 2, "min_of_label": 1 + cap // 3}
    assert compiled(*shuffled, **limits) == compiled(*rows, **limits)
    assert compiled(*rows, *rows, **limits) == compiled(*rows, **limits)


@given(_EVENTS, st.integers(1, 4))
def test_every_event_is_in_a_lineage_or_a_counted_drop(
    choices: list[tuple[int, int, int, bool]], cap: int
) -> None:
    rows = mixed_rows(choices)
    result = compiled(*rows, max_per_subject=cap, min_pairs=1 + cap % 2)
    taught = [*result.examples, *result.judgements]
    lineage = [origin.event_id for made in taught for origin in made.origins]
    assert len(lineage) == len(set(lineage))
    assert {event.event_id for event in rows} == {*lineage, *result.drops}
    only_confirm = {event for event, reason in result.drops.items() if reason == Drop.DUPLICATE}
    assert {*lineage} & {*result.drops} == only_confirm & {*lineage}
    assert not {row.event_id for row in rows if not row.may_train} & {*lineage}
    pair_events = {origin.event_id for pair in result.pairs for origin in pair.origins}
    assert pair_events <= {event for e in result.examples for event in e.event_ids}


@given(_EVENTS, st.integers(1, 3))
def test_no_subject_gives_more_than_its_cap(
    choices: list[tuple[int, int, int, bool]], cap: int
) -> None:
    result = compiled(*mixed_rows(choices), max_per_subject=cap)
    for part in (result.examples, result.judgements):
        subjects = [origin.subject for made in part for origin in made.origins]
        assert all(subjects.count(name) <= cap for name in subjects)


@pytest.mark.parametrize("field", ["near_duplicate", "max_per_subject", "min_of_label"])
def test_limits_are_checked(field: str) -> None:
    with pytest.raises(InputError, match=field):
        CompileLimits(**{field: 0})
