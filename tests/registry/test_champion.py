import multiprocessing
import os
import signal
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.errors import ConflictError, NotFoundError
from perennial.registry.champion import ChampionStore
from perennial.registry.reconcile import reconcile
from perennial.registry.versions import VersionState
from tests.registry.builders import START, Clock, World


class Shown:
    """Aliases as a plain mapping, for what does not need a server."""

    def __init__(self) -> None:
        self.champion: str | None = None

    def set_aliases(self, task: str, champion: str | None, previous: str | None) -> tuple[()]:
        self.champion = champion
        return ()


def test_the_base_model_is_live_at_first(world: World) -> None:
    assert world.champions.current("support") is None
    assert world.champions.previous("support") is None
    assert world.champions.history("support") == ()


def test_a_promotion_changes_champion_log_states_and_outbox(world: World) -> None:
    one, two = world.version(1), world.version(2)
    world.promote(one.name)
    world.clock.move(60)
    world.promote(two.name, one.name)
    live = world.champions.current("support")
    assert live is not None
    assert (live.version, live.row_version) == (two.name, 2)
    assert (live.adapter_digest, live.adapter_path) == (two.adapter_digest, two.adapter_path)
    assert [c.version for c in world.champions.history("support")] == [two.name, one.name]
    assert world.champions.previous("support") == one.name
    assert world.versions.get(one.name).state is VersionState.RETIRED
    assert world.outbox.newest_pending("support") == 2


def test_promote_rejects_a_stale_champion_and_changes_nothing(world: World) -> None:
    one, two = world.version(1), world.version(2)
    world.promote(one.name)
    with pytest.raises(ConflictError, match="is live for support: evaluate again"):
        world.promote(two.name, expected=None)
    assert len(world.champions.history("support")) == 1
    assert world.versions.get(two.name).state is VersionState.APPROVED


def test_the_same_decision_counts_once(world: World) -> None:
    one, two = world.version(1), world.version(2)
    first = world.promote(one.name)
    assert world.promote(one.name) == first
    world.promote(two.name, one.name)
    assert world.promote(one.name) == first
    live = world.champions.current("support")
    assert live is not None
    assert live.version == two.name
    with pytest.raises(ConflictError, match="was a promote of"):
        world.champions.promote(
            "support", two.name, decision_id=f"promote-{one.name}", expected=two.name,
            decided_by="test", evidence_digest="e" * 64, reasons=(),
        )  # fmt: skip


def test_only_an_approved_version_of_the_task_is_promoted(world: World) -> None:
    with pytest.raises(ConflictError, match="not approved"):
        world.promote(world.version(1, is_approved=False).name)
    with pytest.raises(ConflictError, match="of billing, not of support"):
        world.promote(world.version(2, task="billing").name)
    with pytest.raises(NotFoundError):
        world.promote("support-v9-00000000")


def test_rollback_goes_back_one_promotion_at_a_time_to_the_base(world: World) -> None:
    one, two = world.version(1), world.version(2)
    world.promote(one.name)
    world.promote(two.name, one.name)
    back = world.champions.rollback("support", decision_id="b1", decided_by="ada", reason="slow")
    again = world.champions.rollback("support", decision_id="b1", decided_by="ada", reason="slow")
    assert (back.version, back.previous, back.reasons) == (one.name, two.name, ("slow",))
    assert again == back
    base = world.champions.rollback("support", decision_id="b2", decided_by="ada", reason="slow")
    assert base.version is None
    assert world.champions.current("support") is None
    with pytest.raises(NotFoundError, match="nothing to go back to"):
        world.champions.rollback("support", decision_id="b3", decided_by="ada", reason="slow")


def test_what_was_live_when_is_answered_from_the_log(world: World) -> None:
    one, two = world.version(1), world.version(2)
    world.clock.move(10)
    world.promote(one.name)
    moment = world.clock.move(10)
    world.clock.move(10)
    world.promote(two.name, one.name)
    assert world.champions.live_at("support", START) is None
    assert world.champions.live_at("support", moment) == one.name
    assert world.champions.live_at("support", world.clock.now) == two.name


def test_tasks_do_not_touch_each_other(world: World) -> None:
    world.promote(world.version(1).name)
    other = world.version(2, task="billing")
    world.promote(other.name, task="billing")
    assert [c.version for c in world.champions.history("billing")] == [other.name]


def _race(url: str, version: str, barrier: Barrier, won: "multiprocessing.Queue[str]") -> None:
    database = Database(url)
    store = ChampionStore(database, utc_now)
    store.current("support")
    barrier.wait()
    try:
        store.promote(
            "support", version, decision_id=version, expected=None, decided_by="race",
            evidence_digest="e" * 64, reasons=(),
        )  # fmt: skip
    except ConflictError:
        return
    finally:
        database.dispose()
    won.put(version)


def test_of_two_racing_promoters_exactly_one_wins(database: Database, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    world = World(database, Clock(), tmp_path)
    url = database.engine.url.render_as_string(hide_password=False)
    for repeat in range(20):
        task = "support"
        names = [world.version(10 * repeat + n).name for n in (1, 2)]
        database.dispose()
        barrier, won = context.Barrier(2), context.Queue()
        racers = [context.Process(target=_race, args=(url, name, barrier, won)) for name in names]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(60)
            assert racer.exitcode == 0
        winner = won.get(timeout=5)
        assert won.empty()
        live = world.champions.current(task)
        assert live is not None
        assert live.version == winner
        world.champions.rollback(task, decision_id=f"b{repeat}", decided_by="t", reason="next")


def _promote_and_die(url: str, version: str) -> None:
    store = ChampionStore(Database(url), utc_now)
    store.promote(
        "support", version, decision_id="d1", expected=None, decided_by="t",
        evidence_digest="e" * 64, reasons=(),
    )  # fmt: skip
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_after_promoting_the_alias_follows_at_the_next_start(
    database: Database, tmp_path: Path
) -> None:
    world = World(database, Clock(), tmp_path)
    version = world.version(1)
    url = database.engine.url.render_as_string(hide_password=False)
    database.dispose()
    child = multiprocessing.get_context("fork").Process(
        target=_promote_and_die, args=(url, version.name)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert world.outbox.newest_pending("support") is not None
    shown = Shown()
    reconcile("support", world.champions, world.outbox, shown)
    assert shown.champion == version.name
    assert world.outbox.newest_pending("support") is None
