"""Is an answer right? Decided by rules that a person can check, not by eye or by a model.

Rows with a rule come from a suite file; `grade` scores an answer against references in [0, 1]. What
follows from the grades is the registry's business.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from perennial.infra.errors import InputError
from perennial.training.examples import Turn, read_jsonl, turns
from perennial.training.text import normalise, words

Rule = Literal["must", "exact", "contains", "none"]
Grader = Literal["exact", "contains", "rouge_l", "json_fields"]

_SHORT = 4  # words; a longer reference has many right wordings


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
    """Whether the answer passes; case, punctuation and spacing do not count, signs do.

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


def grade(grader: Grader, answer: str, references: Sequence[str]) -> float:
    """The best score of the answer against any reference, in [0, 1].

    exact: equal but for case, spacing and punctuation at the ends. contains: the reference occurs
    as whole words. rouge_l: overlap in order. json_fields: share of fields that are equal.
    """
    return max(_SCORES[grader](answer, reference) for reference in references)


def has_stale(answer: str, forbid: Sequence[str]) -> bool:
    """Whether the answer holds one of the forbidden ones as whole words."""
    return any(_contains(answer, old) > 0 for old in forbid)


def default_grader(taught: Sequence[str], references: Sequence[str]) -> Grader:
    """What answers like these are graded by.

    JSON objects by their fields, long references by ROUGE-L, short ones exactly; short references
    to longer taught answers must be contained.
    """
    if all(_fields(text) is not None for text in references):
        return "json_fields"
    if max(len(words(text)) for text in references) > _SHORT:
        return "rouge_l"
    return "contains" if max(len(words(text)) for text in taught) > _SHORT else "exact"


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, section 3), without stemming.

    >>> round(rouge_l("the cat sat on the mat", "the cat is on the mat"), 3)
    0.833
    """
    said, wanted = words(answer), words(reference)
    if not said or not wanted:
        return 0.0
    lengths = [0] * (len(wanted) + 1)
    for word in said:
        before = 0
        for at, other in enumerate(wanted, start=1):
            longest = before + 1 if word == other else max(lengths[at], lengths[at - 1])
            before, lengths[at] = lengths[at], longest
    return 2 * lengths[-1] / (len(said) + len(wanted))


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


def _exact(answer: str, reference: str) -> float:
    return float(_bare(answer) == _bare(reference))


def _contains(answer: str, reference: str) -> float:
    return float(_padded(reference) in _padded(answer))


def _json_fields(answer: str, reference: str) -> float:
    """Equal fields over all fields that either has; 0 where the answer holds no object."""
    said, wanted = _fields(answer), _fields(reference)
    if said is None or wanted is None:
        return 0.0
    names = said.keys() | wanted.keys()
    equal = sum(
        name in said and name in wanted and _bare(str(said[name])) == _bare(str(wanted[name]))
        for name in names
    )
    return equal / len(names) if names else 1.0


_SCORES = {
    "exact": _exact,
    "contains": _contains,
    "rouge_l": rouge_l,
    "json_fields": _json_fields,
}


def _fields(text: str) -> dict[str, Any] | None:  # Any: the JSON edge
    """The first JSON object in the text."""
    start = text.find("{")
    if start < 0:
        return None
    try:
        found = json.JSONDecoder().raw_decode(text[start:])[0]
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _bare(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`")


def _padded(text: str) -> str:
    # Spaces at both ends make "38 days" miss "138 days".
    return f" {normalise(text)} "
