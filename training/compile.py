"""The feedback compiler: corrections and demonstrations become training examples.

Every row that goes in comes out as an example, as an event of a merged one, or as a counted drop
with its reason. What replay keeps of earlier rounds is `replay`'s business.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType

from perennial.infra.errors import InputError
from perennial.training.examples import Example, Kind, Turn, prompt_key
from perennial.training.text import clean, jaccard, normalise, words

_KINDS: Mapping[str, Kind] = {"correction": "correction", "demonstration": "demonstration"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackRow:
    """One signal as the compiler needs it: what was asked, and what the answer should be."""

    event_id: str
    interaction_id: str | None
    subject: str | None
    kind: str
    messages: tuple[Turn, ...]
    text: str
    may_train: bool
    received_at: datetime


class Drop(StrEnum):
    """Why a row taught nothing."""

    NO_CONSENT = "no_consent"
    UNSUPPORTED_KIND = "unsupported_kind"
    EMPTY = "empty"
    TOO_LONG = "too_long"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    SUPERSEDED = "superseded"
    SUBJECT_CAP = "subject_cap"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileLimits:
    """Bounds of one compilation. A cap is absolute: a share would grow with the attack."""

    max_per_subject: int = 50
    max_prompt_chars: int = 8_000
    max_answer_chars: int = 4_000
    near_duplicate: float = 0.9  # Jaccard similarity of the words of prompt and answer

    def __post_init__(self) -> None:
        if min(self.max_per_subject, self.max_prompt_chars, self.max_answer_chars) < 1:
            raise InputError("compile limits must be positive")
        if not 0 < self.near_duplicate <= 1:
            raise InputError(f"near_duplicate must be in (0, 1], got {self.near_duplicate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """Examples in order of arrival, and each dropped event with its reason.

    Events of an exact duplicate stay in the lineage of the example that they confirm.
    """

    examples: tuple[Example, ...]
    drops: Mapping[str, Drop] = field(default_factory=dict)

    @property
    def num_dropped(self) -> Mapping[Drop, int]:
        """How many rows were dropped for each reason."""
        return MappingProxyType(dict(Counter(self.drops.values())))


def compile_feedback(rows: Sequence[FeedbackRow], limits: CompileLimits) -> Compiled:
    """The examples that `rows` teach; equal for any order of `rows`."""
    drops: dict[str, Drop] = {}
    kept: list[FeedbackRow] = []
    ordered = sorted(rows, key=lambda row: (row.received_at, row.event_id))
    for row in (_cleaned(row) for row in ordered):
        reason = _refusal(row, limits)
        if reason is None:
            kept.append(row)
        else:
            drops[row.event_id] = reason
    merged = _newest_per_prompt(_capped(kept, limits, drops), drops)
    distinct = _without_near_duplicates(merged, limits, drops)
    return Compiled(examples=tuple(distinct), drops=MappingProxyType(drops))


def _cleaned(row: FeedbackRow) -> FeedbackRow:
    messages = tuple((role, clean(content)) for role, content in row.messages)
    return replace(row, messages=messages, text=clean(row.text))


def _refusal(row: FeedbackRow, limits: CompileLimits) -> Drop | None:
    if not row.may_train:
        return Drop.NO_CONSENT
    if row.kind not in _KINDS:
        return Drop.UNSUPPORTED_KIND
    if not words(row.text) or not any(
        role == "user" and words(text) for role, text in row.messages
    ):
        return Drop.EMPTY
    num_chars = sum(len(content) for _, content in row.messages)
    if num_chars > limits.max_prompt_chars or len(row.text) > limits.max_answer_chars:
        return Drop.TOO_LONG
    return None


def _capped(
    rows: Sequence[FeedbackRow], limits: CompileLimits, drops: dict[str, Drop]
) -> list[FeedbackRow]:
    """The newest rows of each subject; rows without a subject count as one subject each."""
    num_of: Counter[str] = Counter()
    kept = []
    for row in reversed(rows):
        num_of[row.subject or row.event_id] += 1
        if num_of[row.subject or row.event_id] > limits.max_per_subject:
            drops[row.event_id] = Drop.SUBJECT_CAP
        else:
            kept.append(row)
    return kept[::-1]


def _newest_per_prompt(rows: Sequence[FeedbackRow], drops: dict[str, Drop]) -> list[Example]:
    """One example for each prompt, with the newest answer and the events that agree with it."""
    groups: dict[str, list[FeedbackRow]] = {}
    for row in rows:
        groups.setdefault(prompt_key(row.messages), []).append(row)
    examples = []
    for group in groups.values():
        newest = group[-1]
        agreeing = [row for row in group if normalise(row.text) == normalise(newest.text)]
        for row in group[:-1]:
            drops[row.event_id] = Drop.DUPLICATE if row in agreeing else Drop.SUPERSEDED
        examples.append(_example(newest, agreeing))
    return sorted(examples, key=lambda example: example.id)


def _example(row: FeedbackRow, agreeing: Sequence[FeedbackRow]) -> Example:
    return Example(
        id=row.event_id,
        messages=row.messages,
        completion=row.text,
        kind=_KINDS[row.kind],
        event_ids=tuple(other.event_id for other in agreeing),
        subject=row.subject,
    )


def _without_near_duplicates(
    examples: Sequence[Example], limits: CompileLimits, drops: dict[str, Drop]
) -> list[Example]:
    """Drop an example that says the same as an earlier one in almost the same words.

    Prompt and answer must both be alike: questions that differ in one word may need two answers.
    """
    kept: list[tuple[Example, frozenset[str], frozenset[str]]] = []
    for example in examples:
        asked = frozenset(words(example.prompt_key))
        told = frozenset(words(example.completion))
        if any(
            jaccard(asked, other_asked) >= limits.near_duplicate
            and jaccard(told, other_told) >= limits.near_duplicate
            and _numbers(example) == _numbers(other)
            for other, other_asked, other_told in kept
        ):
            drops.update(dict.fromkeys(example.event_ids, Drop.NEAR_DUPLICATE))
        else:
            kept.append((example, asked, told))
    return [example for example, _, _ in kept]


def _numbers(example: Example) -> frozenset[str]:
    """Words with a digit: "within 30 days" and "within 14 days" are never duplicates."""
    text = f"{example.prompt_key} {example.completion}"
    return frozenset(word for word in words(text) if any(char.isdigit() for char in word))
