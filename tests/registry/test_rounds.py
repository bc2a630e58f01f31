import pytest

from perennial.infra.errors import ConflictError, InputError, LeaseLostError, NotFoundError
from perennial.registry.rounds import Lease, RoundState
from tests.registry.builders import World


def opened(world: World) -> str:
    return world.ledger.open_round("support", "drift", "a" * 64).id


def test_opening_twice_for_the_same_inputs_is_one_round(world: World) -> None:
    first = world.ledger.open_round("support", "drift", "a" * 64)
    assert world.ledger.open_round("support", "drift", "a" * 64) == first
    second = world.ledger.open_round("support", "drift", "b" * 64)
    assert (first.number, second.number) == (1, 2)
    assert [r.id for r in world.ledger.list_rounds("support")] == [second.id, first.id]
    assert world.ledger.list_rounds("other") == ()


def test_a_live_lease_keeps_others_out_until_it_runs_out(world: World) -> None:
    round_id = opened(world)
    first = world.ledger.claim(round_id, "ada", ttl_s=60)
    world.clock.move(59)
    with pytest.raises(LeaseLostError, match="belongs to ada"):
        world.ledger.claim(round_id, "bob", ttl_s=60)
    world.clock.move(1)
    assert world.ledger.claim(round_id, "bob", ttl_s=60).epoch > first.epoch


def test_a_worker_that_wakes_up_late_cannot_write(world: World) -> None:
    round_id = opened(world)
    late = world.ledger.claim(round_id, "ada", ttl_s=60)
    world.clock.move(61)
    world.ledger.claim(round_id, "bob", ttl_s=60)
    with pytest.raises(LeaseLostError):
        world.ledger.finish_step(late, "train", "x" * 64, {})
    with pytest.raises(LeaseLostError):
        world.ledger.renew(late, ttl_s=60)
    with pytest.raises(LeaseLostError):
        world.ledger.close_round(late, RoundState.PROMOTED, ())
    assert world.ledger.step_result(round_id, "train", "x" * 64) is None


def test_the_same_owner_claims_again_at_once_and_its_old_lease_is_over(world: World) -> None:
    round_id = opened(world)
    old = world.ledger.claim(round_id, "ada", ttl_s=60)
    world.ledger.claim(round_id, "ada", ttl_s=60)
    with pytest.raises(LeaseLostError):
        world.ledger.finish_step(old, "train", "x" * 64, {})


def test_renewing_keeps_a_lease_and_releasing_ends_it(world: World) -> None:
    round_id = opened(world)
    lease = world.ledger.claim(round_id, "ada", ttl_s=60)
    world.clock.move(50)
    world.ledger.renew(lease, ttl_s=60)
    world.clock.move(50)
    with pytest.raises(LeaseLostError):
        world.ledger.claim(round_id, "bob", ttl_s=60)
    world.ledger.release(lease)
    world.ledger.claim(round_id, "bob", ttl_s=60)
    world.ledger.release(lease)
    assert world.ledger.get(round_id).owner == "bob"


def test_a_step_result_is_found_by_its_inputs_only(world: World) -> None:
    round_id = opened(world)
    lease = world.ledger.claim(round_id, "ada", ttl_s=60)
    world.ledger.finish_step(lease, "curate", "x" * 64, {"rows": 3, "ids": ["a", "ü"]})
    world.ledger.finish_step(lease, "curate", "x" * 64, {"rows": 3, "ids": ["a", "ü"]})
    assert world.ledger.step_result(round_id, "curate", "x" * 64) == {"rows": 3, "ids": ["a", "ü"]}
    assert world.ledger.step_result(round_id, "curate", "y" * 64) is None
    assert world.ledger.steps(round_id) == ("curate",)
    with pytest.raises(ConflictError, match="another result"):
        world.ledger.finish_step(lease, "curate", "x" * 64, {"rows": 4})


def test_a_closed_round_keeps_its_state_and_reasons(world: World) -> None:
    round_id = opened(world)
    assert world.ledger.current("support") is not None
    lease = world.ledger.claim(round_id, "ada", ttl_s=60)
    closed = world.ledger.close_round(lease, RoundState.REJECTED, ("no gain",))
    assert (closed.state, closed.reasons) == (RoundState.REJECTED, ("no gain",))
    assert world.ledger.close_round(lease, RoundState.REJECTED, ("again",)) == closed
    assert world.ledger.current("support") is None
    with pytest.raises(ConflictError, match="closed as rejected"):
        world.ledger.close_round(lease, RoundState.PROMOTED, ())
    with pytest.raises(ConflictError, match="closed"):
        world.ledger.claim(round_id, "bob", ttl_s=60)


def test_bad_calls_are_refused(sqlite_world: World) -> None:
    ledger = sqlite_world.ledger
    with pytest.raises(NotFoundError):
        ledger.claim("rnd_none", "ada", ttl_s=60)
    with pytest.raises(NotFoundError):
        ledger.get("rnd_none")
    round_id = opened(sqlite_world)
    with pytest.raises(InputError, match="positive"):
        ledger.claim(round_id, "ada", ttl_s=0)
    with pytest.raises(InputError, match="final state"):
        ledger.close_round(Lease(round_id=round_id, owner="ada", epoch=1), RoundState.OPEN, ())
