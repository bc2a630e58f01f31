"""The support desk of the demo: its facts, the wordings users ask them in, and the grader.

Orbwick and its products are made up, so no model can know these answers before it was taught.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).parent / "desk"
Act = Literal["act1", "act2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One thing that the desk must know.

    `questions` are what users ask before a round, `held_out` the same in other words, asked only to
    measure. An answer is right when each group of `must` has a spelling in it and nothing of
    `forbid` has.
    """

    id: str
    answer: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    must: tuple[tuple[str, ...], ...]
    forbid: tuple[str, ...]
    supersedes: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """The facts of both acts; `kept` are those of act 1 that act 2 does not replace."""

    act1: tuple[Fact, ...]
    act2: tuple[Fact, ...]

    @property
    def kept(self) -> tuple[Fact, ...]:
        """Facts of act 1 that stay true."""
        replaced = {fact.supersedes for fact in self.act2}
        return tuple(fact for fact in self.act1 if fact.id not in replaced)

    @property
    def changed(self) -> tuple[Fact, ...]:
        """Facts of act 2 that replace one of act 1."""
        return tuple(fact for fact in self.act2 if fact.supersedes)


def load_facts(act: Act) -> tuple[Fact, ...]:
    """The facts of one act, in file order."""
    rows = (json.loads(line) for line in _lines(FOLDER / f"{act}.jsonl"))
    return tuple(
        Fact(
            id=row["id"],
            answer=row["answer"],
            questions=tuple(row["questions"]),
            held_out=tuple(row["held_out"]),
            must=tuple(tuple(group) for group in row["must"]),
            forbid=tuple(row["forbid"]),
            supersedes=row["supersedes"],
        )
        for row in rows
    )


def is_right(answer: str, fact: Fact) -> bool:
    """Whether `answer` states what `fact` demands and nothing that it forbids."""
    text = _plain(answer)
    has_all = all(any(_plain(form) in text for form in group) for group in fact.must)
    return has_all and not is_stale(answer, fact)


def is_stale(answer: str, fact: Fact) -> bool:
    """Whether `answer` still states the policy that `fact` replaced."""
    text = _plain(answer)
    return any(_plain(form) in text for form in fact.forbid)


def _lines(path: Path) -> Sequence[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _plain(text: str) -> str:
    kept = (c if c.isalnum() else " " for c in text.lower())
    return f" {' '.join(''.join(kept).split())} "
