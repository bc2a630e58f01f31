"""The replay store: a bounded, fair memory of what earlier rounds taught.

It is a value; every change gives a new one. Rows leave when their round or topic has more than its
part of the capacity, and when a newer example contradicts them. Pairs and judgements are
not kept: what an edit taught stays as its example. Erasure is left to flows, which reach all files.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perennial.infra.artifacts import write_atomic
from perennial.infra.errors import InputError
from perennial.training.contradiction import contradicted
from perennial.training.examples import Example, from_json, read_jsonl
from perennial.training.topics import topics


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayStore:
    """Rows of past rounds, at most `capacity` of them; each has its `round_id`."""

    capacity: int
    rows: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        if self.capacity < 0:
            raise InputError(f"replay capacity must be zero or more, got {self.capacity}")
        if any(row.round_id is None for row in self.rows):
            raise InputError("a replay row needs the round it was learned in")

    def add(self, examples: Sequence[Example], round_id: str) -> "ReplayStore":
        """With a round's examples, without what they contradict; each stratum keeps its part."""
        known = self.supersede(examples)
        ids = {row.id for row in known.rows}
        named = zip(examples, topics([row.question for row in examples]), strict=True)
        fresh = tuple(
            replace(example, kind="replay", round_id=round_id, topic=topic)
            for example, topic in named
            if example.id not in ids
        )
        return replace(self, rows=_bounded((*known.rows, *fresh), self.capacity))

    def supersede(self, examples: Sequence[Example]) -> "ReplayStore":
        """Without the rows that a newer example contradicts."""
        gone = {item.old.id for item in contradicted(self.rows, examples)}
        return replace(self, rows=tuple(row for row in self.rows if row.id not in gone))

    def resized(self, capacity: int) -> "ReplayStore":
        """With another capacity; what no longer fits leaves as if it had never fitted."""
        rows = _bounded(self.rows, capacity)
        return replace(self, capacity=capacity, rows=rows)

    def save(self, path: Path) -> None:
        """JSON Lines, replaced as a whole; the first line holds the capacity."""
        head = {"capacity": self.capacity}
        lines = [head, *(row.to_json() for row in self.rows)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(path, text.encode())


def load_replay(path: Path) -> ReplayStore:
    """The store in a file.

    Raises:
        InputError: the file cannot be read or is not a replay store.
    """
    lines = read_jsonl(path)
    try:
        capacity = int(lines[0]["capacity"])
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a replay store: {error!r}", path=str(path)) from error
    rows = tuple(from_json(line) for line in lines[1:])
    return ReplayStore(capacity=capacity, rows=rows)


def _bounded(rows: Sequence[Example], capacity: int) -> tuple[Example, ...]:
    """Rounds share the capacity evenly, and so do the topics inside a round.

    Inside a topic the rows with the smallest hash stay: bottom-k sampling, in distribution what
    Vitter's reservoir (1985, algorithm R) keeps. Unlike it, it needs no count of what it has seen,
    keeps the same rows in any order of arrival, and a round that is added again changes nothing.
    """
    kept: set[str] = set()
    rounds = _split(rows, lambda row: row.round_id or "")
    for round_id, num in fair_parts(_sizes(rounds), capacity).items():
        by_topic = _split(rounds[round_id], lambda row: row.topic)
        for topic, part in fair_parts(_sizes(by_topic), num).items():
            chosen = sorted(by_topic[topic], key=lambda row: _rank(row.id))[:part]
            kept.update(row.id for row in chosen)
    return tuple(row for row in rows if row.id in kept)


def fair_parts(sizes: Mapping[str, int], capacity: int) -> dict[str, int]:
    """Even parts of `capacity`; what a small stratum leaves goes to the larger ones."""
    parts: dict[str, int] = {}
    by_size = sorted(sizes, key=lambda name: (sizes[name], name))
    for index, name in enumerate(by_size):
        parts[name] = min(sizes[name], capacity // (len(by_size) - index))
        capacity -= parts[name]
    return parts


def _split(rows: Sequence[Example], key: Callable[[Example], str]) -> dict[str, list[Example]]:
    strata: dict[str, list[Example]] = {}
    for row in rows:
        strata.setdefault(key(row), []).append(row)
    return strata


def _sizes(strata: Mapping[str, Sequence[Example]]) -> dict[str, int]:
    return {name: len(rows) for name, rows in strata.items()}


def _rank(row_id: str) -> str:
    # Another prefix would draw anew what stores on disk have kept.
    return hashlib.sha256(f"0\n{row_id}".encode()).hexdigest()
