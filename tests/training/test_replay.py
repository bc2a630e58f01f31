from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import InputError
from perennial.training.examples import Example, Origin
from perennial.training.replay import ReplayStore, fair_parts, load_replay
from tests.training.builders import example


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 40))
def test_capacity_holds_and_rounds_share_it(sizes: list[int], capacity: int) -> None:
    store = ReplayStore(capacity=capacity)
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


def test_inside_a_stratum_every_row_is_as_likely_to_stay() -> None:
    # One topic: every question has the same words.
    asked = (("user", "where is it"),)
    counts = [0] * 20
    for draw in range(400):
        rows = [example(n, id=f"{draw}-{n}", messages=asked) for n in range(20)]
        for row in ReplayStore(capacity=5).add(rows, "r1").rows:
            counts[int(row.id.partition("-")[2])] += 1
    # Each row is kept with chance 1/4: 100 of 400. Pearson's statistic of the counts, scaled by
    # 1 - 1/4 because a sample is drawn without replacement, has 19 degrees of freedom: its 99.9%
    # quantile is 43.8.
    pearson = sum((count - 100) ** 2 / 100 for count in counts) / 0.75 * 19 / 20
    assert sum(counts) == 5 * 400
    assert pearson < 43.8


def test_a_sample_that_prefers_early_rows_would_be_seen() -> None:
    counts = [110] * 10 + [90] * 10
    assert sum((count - 100) ** 2 / 100 for count in counts) / 0.75 * 19 / 20 < 43.8
    counts = [125] * 10 + [75] * 10
    assert sum((count - 100) ** 2 / 100 for count in counts) / 0.75 * 19 / 20 > 43.8


def test_a_rare_topic_is_not_crowded_out() -> None:
    pods = [f"how do I water basil in pod {chr(97 + n)}" for n in range(20)]
    asked = [f"{question} {chr(97 + m)}" for question in pods for m in range(5)]
    asked += ["when is my refund paid out", "is a refund paid in cash"]
    for draw in range(5):
        rows = [
            example(n, id=f"{draw}-{n}", messages=(("user", text),), completion=f"answer {n}")
            for n, text in enumerate(asked)
        ]
        kept = {row.id for row in ReplayStore(capacity=30).add(rows, "r1").rows}
        assert kept >= {f"{draw}-100", f"{draw}-101"}


@given(st.dictionaries(st.text("abc", max_size=3), st.integers(0, 40)), st.integers(0, 90))
def test_fair_parts_fill_the_capacity_and_only_small_strata_get_less(
    sizes: dict[str, int], capacity: int
) -> None:
    parts = fair_parts(sizes, capacity)
    assert sum(parts.values()) == min(capacity, sum(sizes.values()))
    assert all(parts[name] <= size for name, size in sizes.items())
    short = [part for name, part in parts.items() if part < sizes[name]]
    assert all(part <= min(short) + 1 for part in parts.values() if short)


def spoken(number: int, round_id: str, who: list[int]) -> Example:
    """A row that one or more subjects agreed on."""
    origins = [Origin(event_id=f"{round_id}-fb{number}-{n}", subject=f"s{n}") for n in who]
    return example(
        number,
        id=f"{round_id}-{number}",
        messages=(("user", f"{round_id} asks {number}"),),
        origins=tuple(origins),
    )


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 30), st.integers(0, 9))
def test_a_store_that_shrinks_keeps_what_a_small_one_would_have(
    sizes: list[int], capacity: int, part: int
) -> None:
    large = ReplayStore(capacity=capacity)
    for number, size in enumerate(sizes):
        large = large.add([spoken(n, f"r{number}", [0]) for n in range(size)], f"r{number}")
    small = large.resized(part)
    assert len(small.rows) == min(part, len(large.rows))
    assert {row.id for row in small.rows} <= {row.id for row in large.rows}
    assert small.resized(part) == small
    if len(sizes) == 1 and capacity >= part:
        rows = [spoken(n, "r0", [0]) for n in range(sizes[0])]
        assert small == ReplayStore(capacity=part).add(rows, "r0")


@given(st.data(), st.integers(0, 12))
def test_the_store_does_not_follow_from_the_order(data: st.DataObject, capacity: int) -> None:
    rows = [spoken(n, "r1", [0]) for n in range(12)]
    store = ReplayStore(capacity=capacity)
    once, again = store.add(rows, "r1"), store.add(data.draw(st.permutations(rows)), "r1")
    assert {row.id for row in once.rows} == {row.id for row in again.rows}
    assert once.add(rows, "r1") == once


@given(st.permutations(range(6)))
def test_the_order_of_new_rows_does_not_change_what_they_supersede(order: list[int]) -> None:
    old = [spoken(n, "r1", [n]) for n in range(6)]
    new = [
        example(n, id=f"new-{n}", messages=old[n].messages, completion=f"now {n % 2}")
        for n in range(3)
    ]
    new += [example(n, id=f"new-{n}", messages=old[n].messages) for n in range(3, 6)]
    store = ReplayStore(capacity=9).add(old, "r1")
    left = {row.id for row in store.supersede([new[n] for n in order]).rows}
    assert left == {"r1-3", "r1-4", "r1-5"}


def test_a_superseded_row_leaves_before_the_new_ones_are_kept() -> None:
    old = example(1, id="old", completion="38 days")
    new = example(1, id="new", completion="Quite another text")
    store = ReplayStore(capacity=9).add([old], "r1").add([new], "r2")
    assert [row.id for row in store.rows] == ["new"]


def test_a_file_gives_back_the_same_store(tmp_path: Path) -> None:
    store = ReplayStore(capacity=50).add([example(n) for n in range(5)], "r1")
    store.save(tmp_path / "replay.jsonl")
    assert load_replay(tmp_path / "replay.jsonl") == store


def test_a_store_keeps_the_rows_that_stores_on_disk_have_kept() -> None:
    rows = [example(n, id=str(n), messages=(("user", "where is it"),)) for n in range(12)]
    kept = ReplayStore(capacity=4).add(rows, "r1").rows
    assert [row.id for row in kept] == ["1", "4", "8", "9"]


def test_a_file_that_names_a_seed_is_read(tmp_path: Path) -> None:
    (tmp_path / "replay.jsonl").write_text('{"capacity": 7, "seed": 0}\n')
    assert load_replay(tmp_path / "replay.jsonl") == ReplayStore(capacity=7)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "replay.jsonl").write_text('{"capacity": "many"}\n')
    with pytest.raises(InputError, match="not a replay store"):
        load_replay(tmp_path / "replay.jsonl")


def test_an_equal_prompt_with_another_answer_is_superseded() -> None:
    old = example(1, completion="38 days", round_id="r1", kind="replay")
    store = ReplayStore(capacity=9, rows=(old,))
    assert store.supersede([example(1, completion="Quite another text")]).rows == ()
    assert store.supersede([example(1, completion="38  Days!")]).rows == (old,)
