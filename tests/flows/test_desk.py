"""Facts about the demo support desk: sizes, wording distance, gradable answers.

Reads the JSON Lines under `flows/desk/` as they are; how they are trained on and graded is tested
elsewhere.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perennial.training.general import PACKAGED_PROBE, PACKAGED_REPLAY, load_general
from tests.wording import content_words, jaccard, normal

DESK = Path(__file__).resolve().parents[2] / "flows" / "desk"
MAX_HELD_OUT_OVERLAP = 0.7
FACT_KEYS = {
    "id",
    "topic",
    "answer",
    "questions",
    "held_out",
    "must",
    "forbid",
    "supersedes",
}

# Rows are parsed JSON: the vendor edge where Any is allowed.
Row = dict[str, Any]


def _rows(name: str) -> list[Row]:
    lines = (DESK / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _contains(text: str, value: str) -> bool:
    return f" {normal(value)} " in f" {normal(text)} "


def _satisfies(text: str, fact: Row) -> bool:
    has_all = all(any(_contains(text, value) for value in group) for group in fact["must"])
    return has_all and not any(_contains(text, value) for value in fact["forbid"])


def _values(fact: Row) -> Iterator[str]:
    for group in fact["must"]:
        yield from group


ACT1 = _rows("act1.jsonl")
ACT2 = _rows("act2.jsonl")
FACTS = ACT1 + ACT2
TRAINING = [question for fact in FACTS for question in fact["questions"]]
HELD_OUT = [question for fact in FACTS for question in fact["held_out"]]

each_fact = pytest.mark.parametrize("fact", FACTS, ids=[fact["id"] for fact in FACTS])


def test_act1_has_28_facts_and_act2_has_12_new_and_4_changed() -> None:
    assert len(ACT1) == 28
    assert sum(fact["supersedes"] is None for fact in ACT2) == 12
    assert sum(fact["supersedes"] is not None for fact in ACT2) == 4


def test_the_acts_hold_at_least_120_training_questions() -> None:
    assert len(TRAINING) >= 120


def test_fact_ids_are_unique() -> None:
    assert len({fact["id"] for fact in FACTS}) == len(FACTS)


def test_no_question_occurs_twice_in_either_act() -> None:
    questions = [normal(question) for question in TRAINING + HELD_OUT]
    assert sorted(questions) == sorted(set(questions))


def test_answers_are_unique() -> None:
    assert len({normal(fact["answer"]) for fact in FACTS}) == len(FACTS)


@each_fact
def test_fact_has_exactly_the_agreed_fields_and_numbers_of_questions(fact: Row) -> None:
    assert set(fact) == FACT_KEYS
    assert len(fact["questions"]) == 3
    assert len(fact["held_out"]) == (3 if fact["supersedes"] else 2)


@each_fact
def test_must_is_a_list_of_nonempty_groups_of_nonempty_strings(fact: Row) -> None:
    assert isinstance(fact["must"], list)
    assert fact["must"]
    for group in fact["must"]:
        assert isinstance(group, list)
        assert group
        assert all(isinstance(value, str) and normal(value) for value in group)
    assert isinstance(fact["forbid"], list)
    assert all(isinstance(value, str) and normal(value) for value in fact["forbid"])


@each_fact
def test_questions_and_answer_are_short(fact: Row) -> None:
    for question in fact["questions"] + fact["held_out"]:
        assert 6 <= len(question.split()) <= 14, question
    assert 8 <= len(fact["answer"].split()) <= 18
    assert re.fullmatch(r"[^.!?]+\.", fact["answer"]), "one sentence"


@each_fact
def test_answer_satisfies_its_own_grader(fact: Row) -> None:
    assert _satisfies(fact["answer"], fact)


@each_fact
def test_answer_satisfies_no_other_grader(fact: Row) -> None:
    passed = [
        other["id"] for other in FACTS if other is not fact and _satisfies(fact["answer"], other)
    ]
    assert passed == []


@each_fact
def test_no_question_gives_a_graded_value_away(fact: Row) -> None:
    leaks = [
        (value, question)
        for value in [*_values(fact), *fact["forbid"]]
        for question in TRAINING + HELD_OUT
        if _contains(question, value)
    ]
    assert leaks == []


@each_fact
def test_held_out_questions_differ_from_every_training_question(fact: Row) -> None:
    too_near = [
        (held_out, question)
        for held_out in fact["held_out"]
        for question in TRAINING
        if jaccard(content_words(held_out), content_words(question)) > MAX_HELD_OUT_OVERLAP
    ]
    assert too_near == []


def test_superseding_facts_replace_one_whole_policy_of_act1() -> None:
    by_id = {fact["id"]: fact for fact in ACT1}
    replaced = [fact["supersedes"] for fact in ACT2 if fact["supersedes"]]
    assert set(replaced) <= set(by_id)
    assert len(set(replaced)) == len(replaced)
    assert {by_id[old]["topic"] for old in replaced} == {"returns"}
    assert set(replaced) == {fact["id"] for fact in ACT1 if fact["topic"] == "returns"}


def test_superseding_facts_forbid_every_old_value_and_reject_the_old_answer() -> None:
    by_id = {fact["id"]: fact for fact in ACT1}
    for fact in ACT2:
        if not fact["supersedes"]:
            assert fact["forbid"] == []
            continue
        old = by_id[fact["supersedes"]]
        assert set(_values(old)) <= set(fact["forbid"])
        assert not _satisfies(f"{fact['answer']} {old['answer']}", fact)


def test_act1_supersedes_and_forbids_nothing() -> None:
    assert all(fact["supersedes"] is None and fact["forbid"] == [] for fact in ACT1)


def test_packaged_general_rows_never_mention_the_desk() -> None:
    rows = [*load_general(PACKAGED_REPLAY), *load_general(PACKAGED_PROBE)]
    text = " ".join(prompt + " " + answer for prompt, answer in rows)
    names = ["Orbwick", "Tarnlet", *(value for fact in FACTS for value in _values(fact))]
    assert [name for name in names if _contains(text, name)] == []
