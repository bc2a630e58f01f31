import json
from collections.abc import Sequence
from pathlib import Path

from perennial.training.contradiction import contradicted
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


def gone_from(old: Sequence[Example], new: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(item.old for item in contradicted(old, new))


def superseded_by_author() -> set[str]:
    lines = (DESK / "act2.jsonl").read_text().splitlines()
    return {fact["supersedes"] for fact in map(json.loads, lines) if fact["supersedes"]}


def test_the_changed_policy_and_nothing_else_leaves_the_desks_replay() -> None:
    gone = gone_from(desk("act1"), desk("act2"))
    assert len(gone) == 3 * len(superseded_by_author()) == 12
    assert {row.id.partition("/")[0] for row in gone} == superseded_by_author()


def test_one_new_wording_is_enough_to_retire_a_policy() -> None:
    for index in range(3):
        new = [row for row in desk("act2") if row.id.endswith(f"/{index}")]
        gone = gone_from(desk("act1"), new)
        assert {row.id.partition("/")[0] for row in gone} == superseded_by_author()
        assert len(gone) == 12


def test_facts_of_one_act_do_not_contradict_each_other() -> None:
    for act in ("act1", "act2"):
        rows = desk(act)
        for index in range(0, len(rows), 3):
            one, others = rows[index : index + 3], rows[:index] + rows[index + 3 :]
            assert gone_from(others, one) == ()


def test_things_that_differ_in_a_number_do_not_contradict_each_other() -> None:
    where = [f"Box {n} is at pier {pier}." for n, pier in enumerate(("one", "two") * 7)]
    boxes = [
        example(n, id=str(n), messages=(("user", f"where is box {n}?"),), completion=text)
        for n, text in enumerate(where)
    ]
    assert gone_from(boxes[:7], boxes[7:]) == ()


def test_one_changed_label_does_not_retire_its_class() -> None:
    plants = ["basil", "tulip", "maple", "clover", "thyme", "fern", "moss", "reed", "ivy", "oak"]
    old = [
        example(n, id=plant, messages=(("user", f"which code has {plant}"),), completion="code A")
        for n, plant in enumerate(plants)
    ]
    new = example(0, id="new", messages=(("user", "what code has basil"),), completion="code B")
    gone = gone_from(old, [new])
    assert [row.id for row in gone] == ["basil"]


def test_answers_that_name_what_they_are_about_do_not_contradict_each_other() -> None:
    def about(name: str, kind: str) -> Example:
        asked = (("user", f"Is this instrument string or percussion: {name}"),)
        return example(0, id=name, messages=asked, completion=f"{name} is {kind}")

    boobam, orutu = about("Boobam", "string"), about("Orutu", "percussion")
    assert gone_from([boobam], [orutu]) == ()
    assert gone_from([boobam], [about("Boobam", "percussion")]) == (boobam,)


def test_another_fact_about_the_same_thing_retires_nothing_and_a_changed_one_does() -> None:
    def told(kind: str, number: int) -> list[Example]:
        asked = (f"What is the {kind} of sales?", f"Which number do I {kind} for sales?")
        answer = f"The {kind} of the sales team is {number}."
        return [
            example(n, id=f"{number}/{n}", messages=(("user", text),), completion=answer)
            for n, text in enumerate(asked)
        ]

    old = told("phone", 3141)
    assert gone_from(old, told("fax", 2718)) == ()
    assert gone_from(old, told("phone", 1414)) == tuple(old)


def test_statements_that_already_stood_beside_each_other_both_stay() -> None:
    asked = ["which plan has the red label", "which plan has the blue label"]
    old = [
        example(n, messages=(("user", text),), completion=f"plan {'AB'[n]}")
        for n, text in enumerate(asked)
    ]
    new = example(3, messages=(("user", "which plan has the green label"),), completion="plan C")
    assert gone_from(old, [new]) == ()
    assert gone_from(old[:1], [new]) == (old[0],)  # nothing tells it from news


def test_a_forgotten_row_names_what_says_otherwise_and_not_what_says_the_same() -> None:
    def told(name: str, asked: str, answer: str) -> Example:
        return example(0, id=name, messages=(("user", asked),), completion=answer)

    old = told("old", "where is the spare key kept", "The spare key is in the red drawer.")
    same = told("same", "where is the spare key", "The spare key is in the red drawer.")
    other = told("other", "where is the spare key kept", "Ask the porter.")

    (found,) = contradicted([old], [same, other])

    assert (found.old, found.by) == (old, other)


def test_a_changed_policy_is_forgotten_for_the_one_that_its_author_replaced_it_by() -> None:
    lines = (DESK / "act2.jsonl").read_text().splitlines()
    author = {fact["supersedes"]: fact["id"] for fact in map(json.loads, lines)}
    for item in contradicted(desk("act1"), desk("act2")):
        old, by = (row.id.partition("/")[0] for row in (item.old, item.by))
        assert author[old] == by


def test_other_things_told_in_one_form_stay_in_scripts_without_spaces() -> None:
    told = {
        "销售部的传真号码是多少？": "销售部的传真号码是12。",
        "市场部的电话号码是多少？": "市场部的电话号码是34。",
        "図書館は何時に閉まりますか？": "図書館は5時に閉まります。",
        "食堂は何時に閉まりますか？": "食堂は8時に閉まります。",
    }
    rows = [
        Example(id=asked, messages=(("user", asked),), completion=answer, kind="correction")
        for asked, answer in told.items()
    ]

    assert gone_from(rows[::2], rows[1::2]) == ()
