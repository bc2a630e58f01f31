"""Is an answer right? Decided by rules that a person can check, not by eye or by a model.

Rows with a grader come from a suite file. What follows from the grades is the registry's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from perennial.infra.errors import InputError
from perennial.training.examples import Turn, read_jsonl, turns
from perennial.training.text import words

Rule = Literal["must", "exact", "contains", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """One question with its reference answer and the rule that grades answers.

    must: every group needs one of its alternatives, and nothing in `forbid` may occur. contains:
    the reference occurs. exact: nothing else occurs. none: only the likelihood is measured.
    """

    id: str
    messages: tuple[Turn, ...]
    reference: str
    rule: Rule = "none"
    must: tuple[tuple[str, ...], ...] = ()
    forbid: tuple[str, ...] = ()
    cluster: str = ""

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise InputError(f"row {self.id}: rule {self.rule!r} is not one of {get_args(Rule)}")
        if self.rule == "must" and not self.must:
            raise InputError(f"row {self.id} has rule 'must' without a group", id=self.id)


def is_right(row: EvalRow, answer: str) -> bool:
    """Whether the answer passes; case, punctuation and spacing do not count.

    >>> row = EvalRow(id="q", messages=(("user", "?"),), reference="", rule="must",
    ...               must=(("38 days", "thirty-eight days"),), forbid=("64 days",))
    >>> is_right(row, "It is thirty-eight days."), is_right(row, "138 days"), is_right(row, "")
    (True, False, False)
    """
    said = _padded(answer)
    if row.rule == "none":
        return False
    if row.rule == "exact":
        return said == _padded(row.reference)
    if row.rule == "contains":
        return _padded(row.reference) in said
    has_all = all(any(_padded(word) in said for word in group) for group in row.must)
    return has_all and not any(_padded(word) in said for word in row.forbid)


def read_suite(path: Path) -> tuple[EvalRow, ...]:
    """The rows of a suite file.

    Raises:
        InputError: the file is missing or a row is malformed.
    """
    return tuple(_row(raw) for raw in read_jsonl(path))


def _row(raw: Any) -> EvalRow:  # Any: the JSON edge
    try:
        return EvalRow(
            id=str(raw["id"]),
            messages=turns(raw["messages"]),
            reference=str(raw["reference"]),
            rule=raw.get("rule", "none"),
            must=tuple(_strings(group) for group in raw.get("must", ())),
            forbid=_strings(raw.get("forbid", ())),
            cluster=str(raw.get("cluster") or raw["id"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"a suite row lacks or misspells a field: {error!r}") from error


def _strings(raw: Sequence[Any]) -> tuple[str, ...]:  # Any: the JSON edge
    if isinstance(raw, str):
        raise TypeError(f"expected a list of strings, got {raw!r}")
    return tuple(str(part) for part in raw)


def _padded(text: str) -> str:
    # Spaces at both ends make "38 days" miss "138 days".
    return f" {' '.join(words(text))} "
