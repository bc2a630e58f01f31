import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import InputError
from perennial.training.examples import Example
from perennial.training.replay import Contradiction, ReplayStore, contradicted, load_replay
from tests.training.builders import example

DESK = Path(__file__).parents[2] / "flows" / "desk"


def rows_of(round_id: str, num: int) -> list[Example]:
    return [
        example(n, id=f"{round_id}-{n}", messages=(("user", f"{round_id} {n}"),))
        for n in range(num)
    ]


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


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 40), st.integers(0, 5))
def test_capacity_holds_and_rounds_share_it(sizes: list[int], capacity: int, seed: int) -> None:
    store = ReplayStore(capacity=capacity, seed=seed)
    whole = []
    for number, size in enumerate(sizes):
        rows = [example(n, id=f"{number}-{n}", completion=f"{number} x {n}") for n in range(size)]
        rows = [
            Example(
                id=row.id,
                messages=(("user", f"topic{number}word{n}"),),
                completion=row.completion,
                kind="correction",
            )
            for n, row in enumerate(rows)
        ]
        store = store.add(rows, f"r{number}")
        whole += rows
    assert len(store.rows) <= capacity
    kept = [sum(row.round_id == f"r{n}" for row in store.rows) for n in range(len(sizes))]
    if sum(sizes) <= capacity:
        assert kept == sizes
    fair = capacity // len(sizes)
    latest = kept[-1]
    assert latest >= min(sizes[-1], fair)


def test_the_sample_is_uniform_over_a_round() -> None:
    counts = [0] * 20
    for seed in range(400):
        store = ReplayStore(capacity=5, seed=seed).add(rows_of("r1", 20), "r1")
        for row in store.rows:
            counts[int(row.id.removeprefix("r1-"))] += 1
    # Each row is kept with chance 1/4: 100 of 400, standard deviation 8.7.
    assert min(counts) > 60
    assert max(counts) < 140


def test_an_erased_event_or_subject_leaves() -> None:
    store = ReplayStore(capacity=50, seed=0).add([example(n) for n in range(9)], "r1")
    assert {row.subject for row in store.delete(subjects=["s1"]).rows} == {"s0", "s2"}
    assert "correction-4" not in {row.id for row in store.delete(event_ids=["fb_4"]).rows}


def test_a_file_gives_back_the_same_store(tmp_path: Path) -> None:
    store = ReplayStore(capacity=50, seed=3).add([example(n) for n in range(5)], "r1")
    store.save(tmp_path / "replay.jsonl")
    assert load_replay(tmp_path / "replay.jsonl") == store


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "replay.jsonl").write_text('{"capacity": "many"}\n')
    with pytest.raises(InputError, match="not a replay store"):
        load_replay(tmp_path / "replay.jsonl")


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


def test_an_equal_prompt_with_another_answer_is_superseded() -> None:
    old = example(1, completion="38 days", round_id="r1", kind="replay")
    store = ReplayStore(capacity=9, seed=0, rows=(old,))
    assert store.supersede([example(1, completion="Quite another text")]).rows == ()
    assert store.supersede([example(1, completion="38  Days!")]).rows == (old,)
