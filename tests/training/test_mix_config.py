import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import ConfigError, InputError
from perennial.training import config as configs
from perennial.training.config import TrainConfig
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


def test_a_config_survives_json_and_changes_its_fingerprint() -> None:
    config = TrainConfig(rank=8, lr=5e-4)
    assert configs.from_json(config.to_json()) == config
    assert config.fingerprint != TrainConfig(rank=8, lr=6e-4).fingerprint


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rnak": 4}, "unknown training setting 'rnak'"),
        ({"rank": "4"}, "rank must be int"),
        ({"rank": True}, "rank must be int"),
        ({"rank": 0}, "rank must be positive, got 0"),
        ({"targets": "everything"}, "targets must be one of"),
        ({"replay_share": 0.6, "general_share": 0.5}, "below 1 together"),
        ({"lr": float("nan")}, "lr must be positive"),
    ],
)
def test_a_wrong_setting_is_named(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.from_json(raw)
