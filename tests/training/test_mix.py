import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import InputError
from perennial.training.mix import Batch, Shares, plan_batches

SIZES = ([40] * 30, [60] * 20, [25] * 40)


def planned(**fields: object) -> tuple[Batch, ...]:
    given: dict[str, object] = {"epochs": 4, "batch_tokens": 400, "seed": 0}
    return plan_batches(SIZES, Shares(replay=0.25, general=0.2), **{**given, **fields})  # type: ignore[arg-type]  # test


def tokens(batches: tuple[Batch, ...], source: int) -> int:
    picks = [pick for batch in batches for pick in batch if pick.source == source]
    return sum(SIZES[source][pick.index] for pick in picks)


def test_shares_are_of_tokens() -> None:
    batches = planned()
    total = sum(tokens(batches, source) for source in range(3))
    assert tokens(batches, 0) == 4 * 1200
    assert tokens(batches, 1) / total == pytest.approx(0.25, abs=0.01)
    assert tokens(batches, 2) / total == pytest.approx(0.20, abs=0.01)


def test_every_batch_mixes_the_sources() -> None:
    full = [batch for batch in planned() if len(batch) > 6]
    assert all({pick.source for pick in batch} == {0, 1, 2} for batch in full)


def test_the_order_follows_from_the_seed() -> None:
    assert planned() == planned()
    assert planned() != planned(seed=1)


def test_replayed_rows_repeat_only_after_all_were_seen() -> None:
    seen = [pick.index for batch in planned() for pick in batch if pick.source == 1]
    assert sorted(seen[:20]) == list(range(20))


def test_without_replay_its_share_goes_to_the_others() -> None:
    batches = plan_batches(
        (SIZES[0], [], SIZES[2]),
        Shares(replay=0.25, general=0.2),
        epochs=2,
        batch_tokens=400,
        seed=0,
    )
    total = tokens(batches, 0) + tokens(batches, 2)
    assert tokens(batches, 2) / total == pytest.approx(0.2, abs=0.02)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(50, 300))
def test_no_batch_is_over_budget_and_each_new_row_is_seen_once(
    sizes: list[int], budget: int
) -> None:
    shares = Shares(replay=0, general=0)
    batches = plan_batches((sizes, [], []), shares, epochs=1, batch_tokens=budget, seed=0)
    assert sorted(pick.index for batch in batches for pick in batch) == list(range(len(sizes)))
    assert all(len(b) == 1 or sum(sizes[p.index] for p in b) <= budget for b in batches)


def test_nothing_new_is_refused() -> None:
    with pytest.raises(InputError, match="no new row"):
        plan_batches(([], [3], []), Shares(replay=0.2, general=0), epochs=1, batch_tokens=9, seed=0)


WITH_PAIRS = (*SIZES, [90] * 10, [30] * 24)


def with_pairs(**fields: object) -> tuple[Batch, ...]:
    given: dict[str, object] = {"epochs": 3, "batch_tokens": 400, "seed": 0}
    return plan_batches(WITH_PAIRS, Shares(replay=0.25, general=0.2), **{**given, **fields})  # type: ignore[arg-type]  # test


def test_pairs_and_judgements_are_new_rows_too() -> None:
    picks = [pick for batch in with_pairs() for pick in batch]
    spent = [sum(WITH_PAIRS[p.source][p.index] for p in picks if p.source == s) for s in range(5)]
    assert [spent[source] for source in (0, 3, 4)] == [3 * 1200, 3 * 900, 3 * 720]
    assert spent[1] / sum(spent) == pytest.approx(0.25, abs=0.01)
    assert spent[2] / sum(spent) == pytest.approx(0.20, abs=0.01)


def test_a_round_of_judgements_alone_can_be_planned() -> None:
    shares = Shares(replay=0.2, general=0.2)
    batches = plan_batches(
        ([], [], [9] * 4, [], [9] * 20), shares, epochs=1, batch_tokens=90, seed=0
    )
    assert sorted(p.index for b in batches for p in b if p.source == 4) == list(range(20))


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
def test_a_run_that_goes_on_finds_the_batches_it_left(seed: int, done: int, more: int) -> None:
    short, long = with_pairs(epochs=done, seed=seed), with_pairs(epochs=done + more, seed=seed)
    assert long[: len(short)] == short
