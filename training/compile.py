"""The feedback compiler: what users said becomes rows to train on.

Written answers become examples, edits and preferences pairs as well, thumbs and clicks judgements.
Every event that goes in comes out in the lineage of a row or as a counted drop with its reason.
What replay keeps of earlier rounds is `replay`'s business, what is judged on is `holdout`'s.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Literal, TypeVar

from perennial.infra.errors import InputError
from perennial.training.examples import (
    Example,
    Judgement,
    Kind,
    Label,
    Origin,
    Pair,
    Turn,
    prompt_key,
)
from perennial.training.similar import Said, near_duplicates
from perennial.training.text import clean, normalise

_WRITTEN: Mapping[str, Kind] = {
    "correction": "correction",
    "demonstration": "demonstration",
    "edit": "edit",
    "preference": "preference",
}
_PREFERRED = ("edit", "preference")
_JUDGED = ("binary", "score", "implicit")
# Bounds on λ_D·n_D / (λ_U·n_U): Ethayarajh et al. 2024, "KTO", arXiv:2402.01306.
_LEAST_BALANCE, _MOST_BALANCE = 1.0, 4 / 3

Row = TypeVar("Row", Example, Judgement)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackRow:
    """One signal as the compiler needs it.

    text: the answer that somebody wrote or chose, empty where they only judged. answer: what the
    model said, or the answer that was not chosen; empty where nobody knows. label: what a judgement
    says of `answer`; None where it says nothing clear.
    """

    event_id: str
    subject: str | None
    kind: str
    messages: tuple[Turn, ...]
    may_train: bool
    received_at: datetime
    text: str = ""
    answer: str = ""
    label: Label | None = None


class Drop(StrEnum):
    """Why an event taught nothing."""

    NO_CONSENT = "no_consent"
    UNSUPPORTED_KIND = "unsupported_kind"
    UNCLEAR = "unclear"
    UNCHANGED = "unchanged"
    EMPTY = "empty"
    TOO_LONG = "too_long"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    SUPERSEDED = "superseded"
    OVERRULED = "overruled"
    SUBJECT_CAP = "subject_cap"
    TOO_FEW = "too_few"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileLimits:
    """Bounds of one compilation. A cap is absolute: a share would grow with the attack.

    A subject's written and judging events are capped apart, so that clicks crowd out no correction.
    Fewer pairs, or judgements of either label, than a batch of the usual 8 to 32 are left out.
    """

    max_per_subject: int = 50
    max_prompt_chars: int = 8_000
    max_answer_chars: int = 4_000
    near_duplicate: float = 0.9  # see `similar.near_duplicates`
    min_pairs: int = 16
    min_of_label: int = 16

    def __post_init__(self) -> None:
        counts = ("max_per_subject", "max_prompt_chars", "max_answer_chars", "min_pairs")
        for name in (*counts, "min_of_label"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.near_duplicate <= 1:
            raise InputError(f"near_duplicate must be in (0, 1], got {self.near_duplicate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOutKind:
    """A kind of row that the round trains nothing of, and why."""

    rows: Literal["pairs", "judgements"]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """Rows in order of arrival, and each dropped event with its reason.

    Events of an exact duplicate stay in the lineage of the row that they confirm. The events of a
    pair are in the lineage of an example as well.
    """

    examples: tuple[Example, ...] = ()
    pairs: tuple[Pair, ...] = ()
    judgements: tuple[Judgement, ...] = ()
    drops: Mapping[str, Drop] = field(default_factory=dict)
    left_out: tuple[LeftOutKind, ...] = ()

    @property
    def num_dropped(self) -> Mapping[Drop, int]:
        """How many events were dropped for each reason, the most first."""
        return MappingProxyType(dict(Counter(self.drops.values()).most_common()))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassWeights:
    """Factors of the KTO loss by label, in (0, 1]."""

    desirable: float
    undesirable: float


def compile_feedback(rows: Iterable[FeedbackRow], limits: CompileLimits) -> Compiled:
    """The rows that feedback teaches; equal for any order of `rows`.

    `with_enough` leaves out what is too few, once it is known what is kept apart to judge by.
    """
    drops: dict[str, Drop] = {}
    ordered = sorted({row.event_id: row for row in rows}.values(), key=_age)
    usable = _capped(_usable(ordered, limits, drops), limits, drops)
    written = [row for row in usable if row.kind in _WRITTEN]
    judged = [row for row in usable if row.kind in _JUDGED]
    answers = _newest_answers(written, drops)
    examples = _distinct(answers, limits, drops)
    labels = _not_overruled(_newest_labels(judged, drops), answers, drops)
    judgements = _distinct(labels, limits, drops)
    pairs = _pairs(examples, {row.event_id: row for row in written})
    return Compiled(
        examples=tuple(examples),
        pairs=tuple(pairs),
        judgements=tuple(judgements),
        drops=MappingProxyType(drops),
    )


def without_overruled(compiled: Compiled, past: Sequence[Example]) -> Compiled:
    """Without the judgements that speak against what earlier rounds were taught."""
    drops = dict(compiled.drops)
    judgements = _not_overruled(compiled.judgements, past, drops)
    return replace(compiled, judgements=tuple(judgements), drops=MappingProxyType(drops))


def with_enough(compiled: Compiled, limits: CompileLimits) -> Compiled:
    """Without the kinds of row that there are too few of; an edit still teaches as an example."""
    drops, left_out = dict(compiled.drops), []
    pairs, judgements = compiled.pairs, compiled.judgements
    if pairs and len(pairs) < limits.min_pairs:
        reason = f"{len(pairs)}, fewer than {limits.min_pairs}"
        left_out.append(LeftOutKind(rows="pairs", reason=reason))
        pairs = ()
    labels = Counter(row.label for row in judgements)
    if judgements and min(labels["desirable"], labels["undesirable"]) < limits.min_of_label:
        counts = f"{labels['desirable']} desirable and {labels['undesirable']} undesirable"
        reason = f"{counts}, fewer than {limits.min_of_label} of one"
        left_out.append(LeftOutKind(rows="judgements", reason=reason))
        events = (origin.event_id for row in judgements for origin in row.origins)
        drops.update(dict.fromkeys(events, Drop.TOO_FEW))
        judgements = ()
    return replace(
        compiled,
        pairs=pairs,
        judgements=judgements,
        drops=MappingProxyType(drops),
        left_out=tuple(left_out),
    )


def class_weights(judgements: Sequence[Judgement]) -> ClassWeights:
    """Weights that bring desirable : undesirable into 1:1 to 4:3, whichever bound is nearer.

    The label that there is too much of weighs less, so that no single row weighs more than 1.

    Raises:
        InputError: one of the labels is missing, and KTO would only push one way.
    """
    counts = Counter(row.label for row in judgements)
    if not counts["desirable"] or not counts["undesirable"]:
        raise InputError(f"KTO needs judgements of both labels, got {dict(counts)}")
    balance = counts["desirable"] / counts["undesirable"]
    return ClassWeights(
        desirable=min(1.0, _MOST_BALANCE / balance),
        undesirable=min(1.0, balance / _LEAST_BALANCE),
    )


def _age(row: FeedbackRow) -> tuple[datetime, str]:
    return row.received_at, row.event_id


def _usable(
    rows: Iterable[FeedbackRow], limits: CompileLimits, drops: dict[str, Drop]
) -> list[FeedbackRow]:
    kept = []
    for row in map(_cleaned, rows):
        reason = _refusal(row) or _misfit(row, limits)
        if reason is None:
            kept.append(row)
        else:
            drops[row.event_id] = reason
    return kept


def _cleaned(row: FeedbackRow) -> FeedbackRow:
    messages = tuple((role, clean(content)) for role, content in row.messages)
    return replace(row, messages=messages, text=clean(row.text), answer=clean(row.answer))


def _refusal(row: FeedbackRow) -> Drop | None:
    if not row.may_train:
        return Drop.NO_CONSENT
    if row.kind not in (*_WRITTEN, *_JUDGED):
        return Drop.UNSUPPORTED_KIND
    if row.kind in _JUDGED and row.label is None:
        return Drop.UNCLEAR
    if row.kind in _PREFERRED and row.text == row.answer:
        return Drop.UNCHANGED
    return None


def _misfit(row: FeedbackRow, limits: CompileLimits) -> Drop | None:
    """Why the texts of a row cannot be trained on."""
    taught = row.text if row.kind in _WRITTEN else row.answer
    used = (row.text, row.answer) if row.kind in _PREFERRED else (taught,)
    asked = [content for role, content in row.messages if role == "user"]
    if not normalise(taught) or not any(normalise(content) for content in asked):
        return Drop.EMPTY
    num_chars = sum(len(content) for _, content in row.messages)
    longest = max(map(len, used))
    if num_chars > limits.max_prompt_chars or longest > limits.max_answer_chars:
        return Drop.TOO_LONG
    return None


def _capped(
    rows: Sequence[FeedbackRow], limits: CompileLimits, drops: dict[str, Drop]
) -> list[FeedbackRow]:
    """The newest rows of each subject; rows without a subject count as one subject each."""
    num_of: Counter[tuple[str, bool]] = Counter()
    kept = []
    for row in reversed(rows):
        whose = (row.subject or row.event_id, row.kind in _WRITTEN)
        num_of[whose] += 1
        if num_of[whose] > limits.max_per_subject:
            drops[row.event_id] = Drop.SUBJECT_CAP
        else:
            kept.append(row)
    return kept[::-1]


def _newest_answers(rows: Sequence[FeedbackRow], drops: dict[str, Drop]) -> list[Example]:
    """One example for each prompt, with the newest answer and the events that agree with it."""
    examples = []
    for group in _grouped(rows, lambda row: prompt_key(row.messages)):
        newest = group[-1]
        agreeing = [row for row in group if normalise(row.text) == normalise(newest.text)]
        _drop_others(newest, group, agreeing, drops)
        examples.append(
            Example(
                id=newest.event_id,
                messages=newest.messages,
                completion=newest.text,
                kind=_WRITTEN[newest.kind],
                origins=_origins(agreeing),
            )
        )
    return examples


def _newest_labels(rows: Sequence[FeedbackRow], drops: dict[str, Drop]) -> list[Judgement]:
    """One judgement for each answer to a prompt; what users say counts before what they do."""
    judgements = []
    for group in _grouped(rows, _judged_key):
        ruling = max(group, key=lambda row: (row.kind != "implicit", *_age(row)))
        assert ruling.label is not None  # the others were refused as unclear
        agreeing = [row for row in group if row.label == ruling.label]
        _drop_others(ruling, group, agreeing, drops)
        judgements.append(
            Judgement(
                id=ruling.event_id,
                messages=ruling.messages,
                completion=ruling.answer,
                label=ruling.label,
                origins=_origins(agreeing),
            )
        )
    return judgements


def _not_overruled(
    rows: Sequence[Judgement], examples: Sequence[Example], drops: dict[str, Drop]
) -> list[Judgement]:
    """Without those that praise another answer than somebody wrote for the prompt, or reject it."""
    written = {example.prompt_key: normalise(example.completion) for example in examples}
    kept = []
    for row in rows:
        wanted = written.get(row.prompt_key)
        is_wanted = normalise(row.completion) == wanted
        if wanted is None or is_wanted == (row.label == "desirable"):
            kept.append(row)
        else:
            drops.update((origin.event_id, Drop.OVERRULED) for origin in row.origins)
    return kept


def _judged_key(row: FeedbackRow) -> tuple[str, str]:
    return prompt_key(row.messages), normalise(row.answer)


def _grouped(
    rows: Sequence[FeedbackRow], key: Callable[[FeedbackRow], Hashable]
) -> list[list[FeedbackRow]]:
    """Groups in the order of their last rows."""
    groups: dict[Hashable, list[FeedbackRow]] = {}
    for row in reversed(rows):
        groups.setdefault(key(row), []).append(row)
    return [group[::-1] for group in reversed(groups.values())]


def _drop_others(
    ruling: FeedbackRow,
    group: Iterable[FeedbackRow],
    agreeing: Iterable[FeedbackRow],
    drops: dict[str, Drop],
) -> None:
    drops.update((row.event_id, Drop.SUPERSEDED) for row in group)
    drops.update((row.event_id, Drop.DUPLICATE) for row in agreeing)
    del drops[ruling.event_id]


def _origins(rows: Iterable[FeedbackRow]) -> tuple[Origin, ...]:
    return tuple(Origin(event_id=row.event_id, subject=row.subject) for row in rows)


def _distinct(rows: Sequence[Row], limits: CompileLimits, drops: dict[str, Drop]) -> list[Row]:
    """Of rows that say almost the same the one that was said last, in order of arrival."""
    newest_first = rows[::-1]
    flags = near_duplicates([_said(row) for row in newest_first], limits.near_duplicate)
    kept = []
    for row, is_duplicate in zip(newest_first, flags, strict=True):
        if is_duplicate:
            drops.update((origin.event_id, Drop.NEAR_DUPLICATE) for origin in row.origins)
        else:
            kept.append(row)
    return kept[::-1]


def _said(row: Example | Judgement) -> Said:
    """Alike can only be questions that are asked in the same conversation, and judged alike."""
    asked = max(at for at, (role, _) in enumerate(row.messages) if role == "user")
    around = prompt_key((*row.messages[:asked], *row.messages[asked + 1 :]))
    label = row.label if isinstance(row, Judgement) else ""
    return Said(context=f"{label}\n{around}", asked=row.messages[asked][1], told=row.completion)


def _pairs(examples: Sequence[Example], written: Mapping[str, FeedbackRow]) -> list[Pair]:
    """What examples were preferred to: an edit to what it edited, a choice to the other answer."""
    pairs = []
    for example in examples:
        rows = [written[event_id] for event_id in example.event_ids]
        better = [
            row
            for row in rows
            if row.kind in _PREFERRED and row.answer and row.answer != example.completion
        ]
        for group in _grouped(better, lambda row: normalise(row.answer)):
            pairs.append(
                Pair(
                    id=group[-1].event_id,
                    messages=example.messages,
                    chosen=example.completion,
                    rejected=group[-1].answer,
                    origins=_origins(group),
                )
            )
    return pairs
