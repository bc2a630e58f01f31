import pytest

from perennial.infra.errors import ConflictError, NotFoundError
from perennial.registry.evaluations import Evaluation, EvaluationStore
from perennial.registry.version_store import Member
from perennial.registry.versions import VersionState
from tests.registry.builders import World


def member(event_id: str, subject: str | None) -> Member:
    return Member(event_id=event_id, subject=subject)


def test_registering_twice_is_one_version(world: World) -> None:
    first = world.version(1, is_approved=False)
    assert world.version(1, is_approved=False) == first
    second = world.version(2)
    assert (first.number, second.number) == (1, 2)
    assert first.name == f"support-v1-{first.adapter_digest[:8]}"
    assert [v.name for v in world.versions.list_versions("support")] == [second.name, first.name]


def test_an_unknown_parent_is_refused(world: World) -> None:
    with pytest.raises(NotFoundError):
        world.version(1, parent="support-v7-00000000")


def test_a_rejected_version_stays_rejected(world: World) -> None:
    name = world.version(1, is_approved=False).name
    assert world.versions.reject(name).state is VersionState.REJECTED
    assert world.versions.reject(name).state is VersionState.REJECTED
    with pytest.raises(ConflictError):
        world.versions.approve(name)


def test_membership_is_closed_over_parents(world: World) -> None:
    one = world.version(1, members=[member("fb_1", "ada"), member("fb_2", None)]).name
    two = world.version(2, parent=one, members=[member("fb_3", "bob")]).name
    three = world.version(3, parent=two, members=[member("fb_1", "ada")]).name
    apart = world.version(4, members=[member("fb_4", "eve")]).name
    store = world.versions
    assert store.lineage(three).ancestors == (two, one)
    assert store.versions_trained_on(subject="ada") == (one, two, three)
    assert store.versions_trained_on(subject="bob") == (two, three)
    assert store.versions_trained_on(event_id="fb_2") == (one, two, three)
    assert store.versions_trained_on(event_id="fb_4") == (apart,)
    assert store.versions_trained_on(subject="nobody") == ()
    assert [m.event_id for m in store.members(two)] == ["fb_1", "fb_2", "fb_3"]


def test_membership_is_asked_for_one_thing(sqlite_world: World) -> None:
    with pytest.raises(ValueError, match="either a subject or an event"):
        sqlite_world.versions.versions_trained_on()


def test_evaluations_are_kept_once_and_read_back(world: World) -> None:
    store = EvaluationStore(world.database, world.clock)
    rows = [
        Evaluation(round_id="r", suite="target", version=version, row_id=f"q{n}", cluster="c",
                   score=float(n), nll=1.5, answer="two\x00 years")
        for version in ("base", "support-v1-0a1b2c3d")
        for n in (0, 1)
    ]  # fmt: skip
    assert store.add(rows) == 4
    assert store.add(rows) == 0
    found = store.rows("r", version="base")
    assert [(e.row_id, e.score, e.answer) for e in found] == [
        ("q0", 0.0, "two� years"),
        ("q1", 1.0, "two� years"),
    ]
    assert store.rows("r", suite="kept") == ()


def test_another_score_for_the_same_row_is_refused_whole(world: World) -> None:
    store = EvaluationStore(world.database, world.clock)
    row = Evaluation(round_id="r", suite="s", version="base", row_id="q", cluster="c", score=1.0)
    store.add([row])
    other = Evaluation(round_id="r", suite="s", version="base", row_id="q", cluster="c", error="x")
    new = Evaluation(round_id="r", suite="s", version="base", row_id="a", cluster="c", score=1.0)
    with pytest.raises(ConflictError, match="another result"):
        store.add([new, other])
    assert store.rows("r") == (row,)
