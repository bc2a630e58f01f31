from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest

from perennial.infra.errors import ConflictError, InputError, NotFoundError
from perennial.registry.versions import (
    ModelVersion,
    NewVersion,
    VersionState,
    check_move,
    lineage,
    task_of,
    version_name,
)


def version(name: str, parent: str | None) -> ModelVersion:
    return ModelVersion(
        name=name, task="t", number=1, adapter_digest="a" * 64, adapter_path=Path("a"),
        base_digest="b" * 64, round_id="r", parent=parent, dataset_digest="d" * 64,
        state=VersionState.REGISTERED, created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip


def test_a_name_holds_task_number_and_digest() -> None:
    name = version_name("support-desk", 12, "0a1b2c3d" + "e" * 56)
    assert name == "support-desk-v12-0a1b2c3d"
    assert task_of(name) == "support-desk"


@pytest.mark.parametrize("task", ["", "Support", "a b", "../x", "a" * 60])
def test_an_odd_task_makes_no_name(task: str) -> None:
    with pytest.raises(InputError, match="not a version name"):
        version_name(task, 1, "a" * 64)


@pytest.mark.parametrize("name", ["base", "support-v0-0a1b2c3d", "support-v1-xyz"])
def test_an_odd_name_has_no_task(name: str) -> None:
    with pytest.raises(InputError, match="not a version name"):
        task_of(name)


def test_the_states_go_forward_and_a_retired_version_can_return() -> None:
    path = ["registered", "approved", "champion", "retired", "champion"]
    for state, target in pairwise(path):
        check_move("v", VersionState(state), VersionState(target))


@pytest.mark.parametrize(
    ("state", "target"),
    [("registered", "champion"), ("rejected", "approved"), ("champion", "rejected"),
     ("retired", "approved")],
)  # fmt: skip
def test_other_steps_are_refused(state: str, target: str) -> None:
    with pytest.raises(ConflictError, match="cannot become"):
        check_move("v", VersionState(state), VersionState(target))


def test_lineage_goes_back_to_the_first_parent() -> None:
    known = {n: version(n, p) for n, p in (("c", "b"), ("b", "a"), ("a", None))}
    assert lineage("c", known).ancestors == ("b", "a")
    assert lineage("a", known).ancestors == ()


def test_lineage_refuses_circles_and_gaps() -> None:
    with pytest.raises(ConflictError, match="ancestor"):
        lineage("a", {"a": version("a", "b"), "b": version("b", "a")})
    with pytest.raises(NotFoundError):
        lineage("a", {"a": version("a", "b")})


def test_a_digest_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="adapter_digest"):
        NewVersion(task="t", adapter_digest="abc", adapter_path=Path("a"), base_digest="b" * 64,
                   round_id="r", parent=None, dataset_digest="d" * 64)  # fmt: skip
