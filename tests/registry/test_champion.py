import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from perennial.infra.db import Database
from perennial.infra.errors import ConflictError, NotFoundError
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


@contextmanager
def promoter(database: Database, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """A process of its own that promotes each version written to it."""
    url = database.engine.url.render_as_string(hide_password=False)
    script = Path(__file__).with_name("promoter.py")
    with subprocess.Popen(
        [sys.executable, str(script), url, *options], stdin=PIPE, stdout=PIPE, text=True
    ) as process:
        assert said(process) == "ready"
        yield process


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: "subprocess.Popen[str]", version: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{version}\n")
    process.stdin.flush()


def test_of_two_racing_promoters_exactly_one_wins(database: Database, tmp_path: Path) -> None:
    world = World(database, Clock(), tmp_path)
    with promoter(database) as ada, promoter(database) as bob:
        for repeat in range(20):
            names = [world.version(10 * repeat + n).name for n in (1, 2)]
            tell(ada, names[0])
            tell(bob, names[1])
            outcome = {names[0]: said(ada), names[1]: said(bob)}
            assert sorted(outcome.values()) == ["lost", "won"]
            live = world.champions.current("support")
            assert live is not None
            assert outcome[live.version] == "won"
            world.champions.rollback(
                "support", decision_id=f"b{repeat}", decided_by="t", reason="next"
            )


def test_killed_after_promoting_the_alias_follows_at_the_next_start(world: World) -> None:
    version = world.version(1)
    with promoter(world.database, "die") as process:
        tell(process, version.name)
        assert process.wait(60) == -signal.SIGKILL
    assert world.outbox.newest_pending("support") is not None
    shown = Shown()
    reconcile("support", world.champions, world.outbox, shown)
    assert shown.champion == version.name
    assert world.outbox.newest_pending("support") is None
