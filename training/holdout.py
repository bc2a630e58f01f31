"""Which new examples are kept apart to judge by. Pure and deterministic.

A row that is judged by is never trained on, in this round or a later one; what is done with the
scores is the registry's business.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from perennial.infra.errors import InputError
from perennial.training.examples import Example, Row
from perennial.training.text import normalise

_ENOUGH = 3  # wordings of one answer, so that two still teach what the third is judged by


@dataclass(frozen=True, kw_only=True, slots=True)
class Holdout:
    """Two disjoint parts of the examples, each in the order given."""

    train: tuple[Example, ...]
    judge: tuple[Example, ...]


def split_holdout(examples: Sequence[Example], share: float, draw: str = "") -> Holdout:
    """About `share` of the rows to judge by, at most one for each wanted answer.

    Rows are ranked by the digest of draw and id, so that nobody can choose. Answers with three or
    more wordings come first: a row whose answer nothing else teaches measures guessing.

    Args:
        examples: any number of rows.
        share: in (0, 1).
        draw: another one chooses other rows.

    Raises:
        InputError: `share` is not inside (0, 1).
    """
    if not 0 < share < 1:
        raise InputError(f"share must be inside (0, 1), got {share}")
    counts = Counter(normalise(example.completion) for example in examples)
    wanted = round(share * len(examples))
    ranked = sorted(
        examples,
        key=lambda e: (counts[normalise(e.completion)] < _ENOUGH, _rank(f"{draw}{e.id}")),
    )
    taken: dict[str, str] = {}
    for example in ranked:
        if len(taken) == wanted:
            break
        taken.setdefault(normalise(example.completion), example.id)
    judged = set(taken.values())
    return Holdout(
        train=tuple(e for e in examples if e.id not in judged),
        judge=tuple(e for e in examples if e.id in judged),
    )


def not_judged(rows: Sequence[Row], judge: Sequence[Example]) -> tuple[Row, ...]:
    """The rows whose question, in the same conversation, nothing is judged by."""
    keys = {example.prompt_key for example in judge}
    return tuple(row for row in rows if row.prompt_key not in keys)


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
