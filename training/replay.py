"""The replay store: a bounded, fair memory of what earlier rounds taught.

It is a value; every change gives a new one. Rows leave when their round has more than its part of
the capacity, when a newer example contradicts them, and when an event or a subject is erased.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perennial.infra.artifacts import write_atomic
from perennial.infra.errors import InputError
from perennial.training.examples import Example, from_json, read_jsonl
from perennial.training.text import TfIdf, fit_tfidf, normalise


@dataclass(frozen=True, kw_only=True, slots=True)
class Contradiction:
    """When a newer answer replaces an older one to a question in other words.

    Rows with one answer are one statement. Two statements are about the same thing when their
    answers are alike (cosine of TF-IDF at least `min_answer`), their closest questions are (at
    least `min_question`), and both together reach `min_sum`. Measured on the demo's desk with any
    one to three wordings of each side: the four changed facts reach 0.60 or more, any other pair
    with answers alike 0.42 or less.
    """

    min_answer: float = 0.3
    min_question: float = 0.15
    min_sum: float = 0.58


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayStore:
    """Rows of past rounds, at most `capacity` of them; each has its `round_id`."""

    capacity: int
    seed: int
    rows: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        if self.capacity < 0:
            raise InputError(f"replay capacity must be zero or more, got {self.capacity}")
        if any(row.round_id is None for row in self.rows):
            raise InputError("a replay row needs the round it was learned in")

    def add(self, examples: Sequence[Example], round_id: str) -> "ReplayStore":
        """With a round's examples; what they contradict leaves, then each round keeps its part."""
        known = self.supersede(examples)
        ids = {row.id for row in known.rows}
        fresh = tuple(
            replace(example, kind="replay", round_id=round_id)
            for example in examples
            if example.id not in ids
        )
        return replace(self, rows=_bounded((*known.rows, *fresh), self.capacity, self.seed))

    def supersede(
        self, examples: Sequence[Example], rule: Contradiction | None = None
    ) -> "ReplayStore":
        """Without the rows that a newer example contradicts, by equal prompt or by `rule`."""
        gone = {row.id for row in contradicted(self.rows, examples, rule or Contradiction())}
        return replace(self, rows=tuple(row for row in self.rows if row.id not in gone))

    def delete(
        self, *, event_ids: Collection[str] = (), subjects: Collection[str] = ()
    ) -> "ReplayStore":
        """Without any row that one of the events or subjects had a part in."""
        events, people = frozenset(event_ids), frozenset(subjects)
        kept = (
            row
            for row in self.rows
            if not events.intersection(row.event_ids) and row.subject not in people
        )
        return replace(self, rows=tuple(kept))

    def save(self, path: Path) -> None:
        """JSON Lines, replaced as a whole; the first line holds capacity and seed."""
        head = {"capacity": self.capacity, "seed": self.seed}
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
        capacity, seed = int(lines[0]["capacity"]), int(lines[0]["seed"])
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a replay store: {error!r}", path=str(path)) from error
    rows = tuple(from_json(line) for line in lines[1:])
    return ReplayStore(capacity=capacity, seed=seed, rows=rows)


def contradicted(
    old: Sequence[Example], new: Sequence[Example], rule: Contradiction
) -> tuple[Example, ...]:
    """The old rows that a new one answers otherwise; a row that agrees stays."""
    statements, news = _statements(old), _statements(new)
    questions = fit_tfidf([row.question for row in (*old, *new)])
    answers = fit_tfidf([group[0].completion for group in (*statements, *news)])
    gone: list[Example] = []
    for group in statements:
        rivals = [other for other in news if not _agree(group[0], other[0])]
        keys = {row.prompt_key for other in rivals for row in other}
        if any(_is_about_same(group, other, questions, answers, rule) for other in rivals):
            gone += group
        else:
            gone += [row for row in group if row.prompt_key in keys]
    return tuple(gone)


def _statements(rows: Sequence[Example]) -> list[list[Example]]:
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(normalise(row.completion), []).append(row)
    return list(groups.values())


def _agree(left: Example, right: Example) -> bool:
    return normalise(left.completion) == normalise(right.completion)


def _is_about_same(
    old: Sequence[Example],
    new: Sequence[Example],
    questions: TfIdf,
    answers: TfIdf,
    rule: Contradiction,
) -> bool:
    told = answers.similarity(old[0].completion, new[0].completion)
    if told < rule.min_answer:
        return False
    asked = max(questions.similarity(a.question, b.question) for a in old for b in new)
    return asked >= rule.min_question and told + asked >= rule.min_sum


def _bounded(rows: Sequence[Example], capacity: int, seed: int) -> tuple[Example, ...]:
    """Rounds share the capacity evenly; what a small round leaves goes to the others.

    Inside a round the rows with the smallest hash stay: a uniform sample that does not depend on
    the order of arrival (bottom-k sampling, equivalent to a reservoir).
    """
    rounds: dict[str, list[Example]] = {}
    for row in rows:
        rounds.setdefault(row.round_id or "", []).append(row)
    kept: set[str] = set()
    left = capacity
    by_size = sorted(rounds.items(), key=lambda item: (len(item[1]), item[0]))
    for index, (_, members) in enumerate(by_size):
        part = left // (len(by_size) - index)
        chosen = sorted(members, key=lambda row: _rank(row.id, seed))[:part]
        kept.update(row.id for row in chosen)
        left -= len(chosen)
    return tuple(row for row in rows if row.id in kept)


def _rank(row_id: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\n{row_id}".encode()).hexdigest()
