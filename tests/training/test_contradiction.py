import json
from pathlib import Path

from perennial.training.contradiction import Contradiction, contradicted
from perennial.training.examples import Example

DESK = Path(__file__).parents[2] / "flows" / "desk"


def example(number: int, **fields: object) -> Example:
    given = {"id": str(number), "messages": (), "completion": "", "kind": "correction", **fields}
    return Example(**given)  # type: ignore[arg-type]  # a builder


def desk(act: str) -> list[Example]:
    facts = [json.loads(line) for line in (DESK / f"{act}.jsonl").read_text().splitlines()]
    return [
        Example(
            id=f"{fact['id']}/{index}",
            messages=(("user", question),),
            completion=fact["answer"],
            kind="correction",
        )
        for fact in facts
        for index, question in enumerate(fact["questions"])
    ]


def superseded_by_author() -> set[str]:
    lines = (DESK / "act2.jsonl").read_text().splitlines()
    return {fact["supersedes"] for fact in map(json.loads, lines) if fact["supersedes"]}


def test_the_changed_policy_and_nothing_else_leaves_the_desks_replay() -> None:
    gone = contradicted(desk("act1"), desk("act2"), Contradiction())
    assert len(gone) == 3 * len(superseded_by_author()) == 12
    assert {row.id.partition("/")[0] for row in gone} == superseded_by_author()


def test_one_new_wording_is_enough_to_retire_a_policy() -> None:
    for index in range(3):
        new = [row for row in desk("act2") if row.id.endswith(f"/{index}")]
        gone = contradicted(desk("act1"), new, Contradiction())
        assert {row.id.partition("/")[0] for row in gone} == superseded_by_author()
        assert len(gone) == 12


def test_facts_of_one_act_do_not_contradict_each_other() -> None:
    for act in ("act1", "act2"):
        rows = desk(act)
        for index in range(0, len(rows), 3):
            one, others = rows[index : index + 3], rows[:index] + rows[index + 3 :]
            assert contradicted(others, one, Contradiction()) == ()


def test_things_that_differ_in_a_number_do_not_contradict_each_other() -> None:
    where = [f"Box {n} is at pier {pier}." for n, pier in enumerate(("one", "two") * 7)]
    boxes = [
        example(n, id=str(n), messages=(("user", f"where is box {n}?"),), completion=text)
        for n, text in enumerate(where)
    ]
    assert contradicted(boxes[:7], boxes[7:], Contradiction()) == ()


def test_one_changed_label_does_not_retire_its_class() -> None:
    plants = ["basil", "tulip", "maple", "clover", "thyme", "fern", "moss", "reed", "ivy", "oak"]
    old = [
        example(n, id=plant, messages=(("user", f"which code has {plant}"),), completion="code A")
        for n, plant in enumerate(plants)
    ]
    new = example(0, id="new", messages=(("user", "what code has basil"),), completion="code B")
    gone = contradicted(old, [new], Contradiction())
    assert [row.id for row in gone] == ["basil"]


def test_answers_that_name_what_they_are_about_do_not_contradict_each_other() -> None:
    def about(name: str, kind: str) -> Example:
        asked = (("user", f"Is this instrument string or percussion: {name}"),)
        return example(0, id=name, messages=asked, completion=f"{name} is {kind}")

    boobam, orutu = about("Boobam", "string"), about("Orutu", "percussion")
    assert contradicted([boobam], [orutu], Contradiction()) == ()
    assert contradicted([boobam], [about("Boobam", "percussion")], Contradiction()) == (boobam,)


def test_another_fact_about_the_same_thing_retires_nothing_and_a_changed_one_does() -> None:
    def told(kind: str, number: int) -> list[Example]:
        asked = (f"What is the {kind} of sales?", f"Which number do I {kind} for sales?")
        answer = f"The {kind} of the sales team is {number}."
        return [
            example(n, id=f"{number}/{n}", messages=(("user", text),), completion=answer)
            for n, text in enumerate(asked)
        ]

    old = told("phone", 3141)
    assert contradicted(old, told("fax", 2718), Contradiction()) == ()
    assert contradicted(old, told("phone", 1414), Contradiction()) == tuple(old)


def test_statements_that_already_stood_beside_each_other_both_stay() -> None:
    asked = ["which plan has the red label", "which plan has the blue label"]
    old = [
        example(n, messages=(("user", text),), completion=f"plan {'AB'[n]}")
        for n, text in enumerate(asked)
    ]
    new = example(3, messages=(("user", "which plan has the green label"),), completion="plan C")
    assert contradicted(old, [new], Contradiction()) == ()
    assert contradicted(old[:1], [new], Contradiction()) == (old[0],)  # nothing tells it from news
