import pytest

from perennial.infra.errors import ConflictError, NotFoundError
from perennial.registry.approvals import ApprovalState
from perennial.registry.versions import VersionState
from tests.registry.builders import World


def asked(world: World) -> str:
    name = world.version(1, is_approved=False).name
    world.approvals.request(name, expected=None, evidence_digest="e" * 64)
    return name


def test_a_question_is_asked_once_and_waits(world: World) -> None:
    name = asked(world)
    world.approvals.request(name, expected=None, evidence_digest="e" * 64)
    assert [a.version for a in world.approvals.pending("support")] == [name]
    with pytest.raises(ConflictError, match="other evidence"):
        world.approvals.request(name, expected=None, evidence_digest="f" * 64)


def test_an_approval_is_kept_with_who_and_where(world: World) -> None:
    name = asked(world)
    first = world.approvals.approve(name, by="ada", channel="mlflow")
    assert (first.state, first.decided_by, first.channel) == (
        ApprovalState.APPROVED,
        "ada",
        "mlflow",
    )
    assert world.approvals.approve(name, by="bob", channel="cli") == first
    assert world.approvals.pending("support") == ()
    assert world.versions.get(name).state is VersionState.APPROVED
    with pytest.raises(ConflictError, match="approved by ada"):
        world.approvals.reject(name, by="bob", channel="cli", reason="no")


def test_a_rejection_is_final(world: World) -> None:
    name = asked(world)
    rejected = world.approvals.reject(name, by="ada", channel="cli", reason="rude")
    assert rejected.note == "rude"
    assert world.approvals.get(name) == rejected
    with pytest.raises(ConflictError, match="rejected by ada"):
        world.approvals.approve(name, by="bob", channel="cli")
    with pytest.raises(ConflictError, match="not approved"):
        world.promote(name)


def test_nobody_can_answer_what_was_not_asked(sqlite_world: World) -> None:
    with pytest.raises(NotFoundError, match="nobody was asked"):
        sqlite_world.approvals.approve("support-v1-00000000", by="ada", channel="cli")
