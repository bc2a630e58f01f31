from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import InputError
from perennial.training.mix import Batch, Mix, Pick, Shares, Source, make_mix, steps

SIZES = ([40] * 30, [60] * 20, [25] * 40)
WITH_PAIRS = (*SIZES, [90] * 10, [30] * 24)
PREFERENCES = {Source.PAIRS, Source.JUDGEMENTS}
SHARES = Shares(replay=0.25, general=0.2)


def mix(sizes: Sequence[Sequence[int]] = SIZES, shares: Shares = SHARES, **fields: object) -> Mix:
    given: dict[str, object] = {"epochs": 4, "batch_tokens": 400, "mastered": 0.05, "seed": 0}
    by_source = [*sizes, [], []][: len(Source)]
    return make_mix(by_source, shares, **{**given, **fields})  # type: ignore[arg-type]  # test


def planned(of: Mix, loss: Callable[[Pick, int], float] = lambda _, __: 1.0) -> list[Batch]:
    """The batches of a run in which a row has `loss` when it is seen for the n-th time."""
    losses: list[list[float]] = []
    num: dict[Pick, int] = {}
    batches = []
    for step in steps(of, losses):
        batches.append(step.batch)
        for pick in step.batch:
            num[pick] = num.get(pick, 0) + 1
        losses.append([loss(pick, num[pick]) for pick in step.batch])
    return batches


def picks(batches: Sequence[Batch], source: Source) -> list[int]:
    return [pick.index for batch in batches for pick in batch if pick.source == source]


def tokens(
    batches: Sequence[Batch], source: Source, sizes: Sequence[Sequence[int]] = SIZES
) -> int:  # fmt: skip
    return sum(sizes[source][index] for index in picks(batches, source))


def learned_at_third_sight(pick: Pick, num: int) -> float:
    return 0.01 if pick.source == Source.NEW and num >= 3 else 1.0


def test_shares_are_of_tokens() -> None:
    batches = planned(mix())
    total = sum(tokens(batches, source) for source in Source)
    assert tokens(batches, Source.NEW) == 4 * 1200
    assert tokens(batches, Source.REPLAY) / total == pytest.approx(0.25, abs=0.01)
    assert tokens(batches, Source.GENERAL) / total == pytest.approx(0.20, abs=0.01)


def test_every_batch_mixes_the_sources() -> None:
    full = [batch for batch in planned(mix()) if len(batch) > 6]
    assert all({pick.source for pick in batch} == {*Source} - PREFERENCES for batch in full)


def test_the_order_follows_from_the_seed() -> None:
    assert planned(mix()) == planned(mix())
    assert planned(mix()) != planned(mix(seed=1))


def test_replayed_rows_repeat_only_after_all_were_seen() -> None:
    assert sorted(picks(planned(mix()), Source.REPLAY)[:20]) == list(range(20))
    assert sorted(picks(planned(mix()), Source.GENERAL)[:40]) == list(range(40))


def test_no_row_is_seen_twice_in_an_epoch() -> None:
    batches = planned(mix(sizes=([40] * 30, [60], [25]), epochs=3))
    assert picks(batches, Source.REPLAY) == [0] * 3
    assert picks(batches, Source.GENERAL) == [0] * 3


def test_replayed_rows_take_turns_whatever_they_have_lost() -> None:
    late = picks(planned(mix(epochs=9), lambda pick, _: 1.0 + pick.index), Source.REPLAY)
    assert {late.count(index) for index in range(20)} <= {len(late) // 20, len(late) // 20 + 1}


def test_a_mastered_row_rests_and_replay_has_its_tokens() -> None:
    sizes = (SIZES[0], [60] * 40, SIZES[2])
    of = mix(sizes=sizes, epochs=5)
    usual, rested = planned(of), planned(of, learned_at_third_sight)
    assert len(picks(rested, Source.NEW)) == 4 * 30
    assert (
        tokens(rested, Source.REPLAY, sizes)
        == tokens(usual, Source.REPLAY, sizes) + 1200
        == 5 * 540 + 1200
    )
    assert tokens(rested, Source.GENERAL) == tokens(usual, Source.GENERAL)


def test_a_row_that_stays_mastered_rests_longer_each_time() -> None:
    rested = planned(mix(epochs=10), learned_at_third_sight)
    # Seen in epochs 0, 1, 2, then in 4 and in 7.
    assert picks(rested, Source.NEW).count(0) == 5


def test_a_row_that_was_forgotten_is_seen_in_every_epoch_again() -> None:
    batches = planned(mix(epochs=6), lambda _, num: 0.01 if num == 2 else 1.0)
    assert picks(batches, Source.NEW).count(0) == 5


def test_nothing_rests_without_replay_or_at_a_threshold_of_zero() -> None:
    for of in (mix(sizes=(SIZES[0], [], SIZES[2])), mix(mastered=0.0)):
        assert tokens(planned(of, lambda _, __: 0.0), Source.NEW) == 4 * 1200


def test_pairs_and_judgements_never_rest() -> None:
    batches = planned(mix(sizes=WITH_PAIRS), lambda _, __: 0.0)
    assert tokens(batches, Source.PAIRS, WITH_PAIRS) == 4 * 900
    assert tokens(batches, Source.JUDGEMENTS, WITH_PAIRS) == 4 * 720


def test_only_drawable_rows_are_drawn() -> None:
    of = mix(sizes=(SIZES[0], [60] * 400, [25] * 4000))
    drawn = {pick for batch in planned(of, learned_at_third_sight) for pick in batch}
    assert drawn <= of.drawable
    assert sum(pick.source == Source.REPLAY for pick in of.drawable) <= 4 * (546 + 1200) / 60 + 1
    assert sum(pick.source == Source.GENERAL for pick in of.drawable) <= 4 * 437 / 25 + 1


def test_without_replay_its_share_goes_to_the_others() -> None:
    batches = planned(mix(sizes=(SIZES[0], [], SIZES[2]), epochs=2))
    total = tokens(batches, Source.NEW) + tokens(batches, Source.GENERAL)
    assert tokens(batches, Source.GENERAL) / total == pytest.approx(0.2, abs=0.02)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(50, 300))
def test_no_batch_is_over_budget_and_each_new_row_is_seen_once(
    sizes: list[int], budget: int
) -> None:
    nothing = Shares(replay=0, general=0)
    batches = planned(mix(sizes=(sizes, [], []), shares=nothing, epochs=1, batch_tokens=budget))
    assert sorted(pick.index for batch in batches for pick in batch) == list(range(len(sizes)))
    assert all(len(b) == 1 or sum(sizes[p.index] for p in b) <= budget for b in batches)


def test_nothing_new_is_refused() -> None:
    with pytest.raises(InputError, match="no new row"):
        mix(sizes=([], [3], []))


def test_pairs_and_judgements_are_new_rows_too() -> None:
    batches = planned(mix(sizes=WITH_PAIRS, epochs=3))
    spent = [tokens(batches, source, WITH_PAIRS) for source in Source]
    assert spent[Source.NEW] == 3 * 1200
    assert spent[Source.REPLAY] == 3 * 20 * 60  # each row once an epoch: less than its share
    assert spent[Source.GENERAL] == 3 * 40 * 25
    assert spent[Source.PAIRS :] == [3 * 900, 3 * 720]


def test_a_round_of_judgements_alone_can_be_planned() -> None:
    shares = Shares(replay=0.2, general=0.2)
    of = mix(sizes=([], [], [9] * 4, [], [9] * 20), shares=shares, epochs=1, batch_tokens=90)
    assert sorted(picks(planned(of), Source.JUDGEMENTS)) == list(range(20))


@given(st.integers(0, 3), st.integers(0, 60))
def test_a_run_that_goes_on_finds_the_batches_it_left(seed: int, done: int) -> None:
    def loss(pick: Pick) -> float:
        return ((pick.index * 7 + pick.source) % 5) / 40

    of = mix(sizes=WITH_PAIRS, seed=seed)
    whole = planned(of, lambda pick, _: loss(pick))
    losses = [[loss(pick) for pick in batch] for batch in whole]
    later = []
    for step in steps(of, known := losses[:done]):
        assert step.step == len(known) + 1
        later.append(step.batch)
        known.append(losses[len(known)])
    assert later == whole[done:]
