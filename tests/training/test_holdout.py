import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import InputError
from perennial.training.examples import Example, Pair
from perennial.training.holdout import not_judged, split_holdout


def _examples(num_facts: int, num_wordings: int) -> list[Example]:
    return [
        Example(
            id=f"ex-{fact}-{wording}",
            messages=(("user", f"question {fact} in wording {wording}"),),
            completion=f"answer {fact}",
            kind="correction",
        )
        for fact in range(num_facts)
        for wording in range(num_wordings)
    ]


def test_judged_answers_are_still_taught_by_other_wordings() -> None:
    parts = split_holdout(_examples(28, 3), 0.2)

    taught = {example.completion for example in parts.train}
    assert len(parts.judge) == 17
    assert {example.completion for example in parts.judge} <= taught


def test_answers_with_many_wordings_are_judged_first() -> None:
    rows = [*_examples(3, 3), *[e for e in _examples(9, 1) if int(e.id.split("-")[1]) > 2]]

    parts = split_holdout(rows, 0.2)

    assert {example.completion for example in parts.judge} <= {f"answer {i}" for i in range(3)}


@given(st.integers(0, 12), st.integers(1, 4), st.floats(0.01, 0.99))
def test_parts_are_disjoint_complete_and_do_not_depend_on_order(
    num_facts: int, num_wordings: int, share: float
) -> None:
    rows = _examples(num_facts, num_wordings)

    parts, again = split_holdout(rows, share), split_holdout(rows[::-1], share)

    assert {e.id for e in parts.train} | {e.id for e in parts.judge} == {e.id for e in rows}
    assert len(parts.train) + len(parts.judge) == len(rows)
    assert {e.id for e in parts.judge} == {e.id for e in again.judge}


def test_another_draw_keeps_other_rows_apart() -> None:
    rows = _examples(40, 1)

    drawn = [split_holdout(rows, 0.2, draw=f"rnd_{n}").judge for n in range(12)]

    assert {len(judge) for judge in drawn} == {8}
    assert len({row.id for judge in drawn for row in judge}) > 30


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="inside"):
        split_holdout(_examples(2, 3), share)


def test_what_is_judged_by_is_not_asked_in_training() -> None:
    (judged, other), asked = _examples(1, 2), (("user", "Question 0, in wording 0!"),)
    pairs = [
        Pair(id="p1", messages=asked, chosen="a", rejected="b"),
        Pair(id="p2", messages=(("system", "be kind"), *asked), chosen="a", rejected="b"),
        Pair(id="p3", messages=other.messages, chosen="a", rejected="b"),
    ]

    assert [pair.id for pair in not_judged(pairs, [judged])] == ["p2", "p3"]
