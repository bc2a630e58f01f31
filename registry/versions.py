"""Names, states and ancestry of model versions, as values.

A version is one LoRA adapter that some round made. Its name is never used again. Storing versions
is left to `version_store`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from perennial.infra.errors import ConflictError, InputError, NotFoundError

BASE = "base"

_NAME = re.compile(
    r"(?P<task>[a-z][a-z0-9-]{0,39})-v(?P<number>[1-9][0-9]{0,8})-(?P<sha>[0-9a-f]{8})"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")


class VersionState(StrEnum):
    """How far a version has come."""

    REGISTERED = "registered"
    APPROVED = "approved"
    CHAMPION = "champion"
    REJECTED = "rejected"
    RETIRED = "retired"


_MOVES: Mapping[VersionState, frozenset[VersionState]] = {
    VersionState.REGISTERED: frozenset({VersionState.APPROVED, VersionState.REJECTED}),
    VersionState.APPROVED: frozenset({VersionState.CHAMPION, VersionState.REJECTED}),
    VersionState.CHAMPION: frozenset({VersionState.RETIRED}),
    VersionState.REJECTED: frozenset(),
    # A rollback makes a retired version the champion again.
    VersionState.RETIRED: frozenset({VersionState.CHAMPION}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class NewVersion:
    """An adapter that a round made, before it has a number.

    `parent` is the version whose adapter the training started from, None for the base model.
    Digests are SHA-256 in hex.
    """

    task: str
    adapter_digest: str
    adapter_path: Path
    base_digest: str
    round_id: str
    parent: str | None
    dataset_digest: str

    def __post_init__(self) -> None:
        for label, value in (
            ("adapter_digest", self.adapter_digest),
            ("base_digest", self.base_digest),
            ("dataset_digest", self.dataset_digest),
        ):
            if not _DIGEST.fullmatch(value):
                raise InputError(f"{label} must be a SHA-256 in hex, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """A registered adapter; `name` is `<task>-v<number>-<first 8 of the adapter digest>`."""

    name: str
    task: str
    number: int
    adapter_digest: str
    adapter_path: Path
    base_digest: str
    round_id: str
    parent: str | None
    dataset_digest: str
    state: VersionState
    created_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """A version and what it was trained on top of; `ancestors` from the parent to the oldest."""

    version: str
    ancestors: tuple[str, ...]
    base_digest: str


def version_name(task: str, number: int, adapter_digest: str) -> str:
    """The immutable name, for example `assistant-v3-1f00c0de`.

    Raises:
        InputError: the parts do not make a valid name.
    """
    name = f"{task}-v{number}-{adapter_digest[:8]}"
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is not a version name: <task>-v<N>-<8 hex digits>")
    return name


def task_of(name: str) -> str:
    """The task that a version name belongs to.

    Raises:
        InputError: it is not a version name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"{name!r} is not a version name: <task>-v<N>-<8 hex digits>")
    return match["task"]


def check_move(name: str, state: VersionState, target: VersionState) -> VersionState:
    """`target`, when a version in `state` may go there or is there already.

    Raises:
        ConflictError: the step is not allowed.
    """
    if target != state and target not in _MOVES[state]:
        raise ConflictError(f"{name} is {state} and cannot become {target}", version=name)
    return target


def lineage(name: str, versions: Mapping[str, ModelVersion]) -> Lineage:
    """The ancestry of `name`, nearest first.

    Raises:
        NotFoundError: the version or one of its ancestors is not in `versions`.
        ConflictError: the parents form a circle.
    """
    chain = [name]
    while (parent := _get(chain[-1], versions).parent) is not None:
        if parent in chain:
            raise ConflictError(f"{name} is its own ancestor through {parent}", version=name)
        chain.append(parent)
    return Lineage(
        version=name, ancestors=tuple(chain[1:]), base_digest=_get(name, versions).base_digest
    )


def _get(name: str, versions: Mapping[str, ModelVersion]) -> ModelVersion:
    try:
        return versions[name]
    except KeyError:
        raise NotFoundError(f"there is no version {name}", version=name) from None
