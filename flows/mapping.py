"""One component's values become another's here, and nowhere else. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Literal

from perennial.feedback.records import (
    Action,
    Binary,
    Correction,
    Demonstration,
    Implicit,
    Interaction,
    Judged,
    Message,
    Preference,
    Score,
    Signal,
)
from perennial.infra.settings import CheckSettings, GateSettings, TrainingSettings
from perennial.monitoring.policy import Policy
from perennial.monitoring.windows import TrafficRow
from perennial.registry.gate import GateRules
from perennial.serving.recorder import RecordedAnswer
from perennial.training.compile import CompileLimits, FeedbackRow
from perennial.training.examples import Label
from perennial.training.text import tokens

PROBE_TAG = "probe"
# An edit whose text nobody sent says that something was wrong, and not what.
_LABELS: Mapping[Action, Label] = {
    "copy": "desirable",
    "accept": "desirable",
    "regenerate": "undesirable",
    "abandon": "undesirable",
    "retry": "undesirable",
}


def is_traffic(interaction: Interaction) -> bool:
    """Whether users made it: interactions tagged `probe` measure and are left out."""
    return PROBE_TAG not in interaction.tags


def to_traffic(
    interactions: Iterable[Interaction], judged: Iterable[Judged]
) -> tuple[TrafficRow, ...]:
    """Rows that monitoring looks at: each interaction with what users said of it."""
    thumbs: dict[str, Literal[1, -1]] = {}
    corrected: set[str] = set()
    for item in judged:
        about, signal = item.feedback.interaction_id, item.feedback.signal
        if about is None:
            continue
        if isinstance(signal, Binary):
            thumbs[about] = 1 if signal.value else -1
        elif isinstance(signal, Correction):
            corrected.add(about)
    return tuple(
        TrafficRow(
            interaction_id=row.id,
            prompt=row.messages[-1].content,
            answer=row.completion,
            model_version=row.model_version,
            received_at=row.received_at,
            subject=row.subject,
            session=row.session,
            thumbs=thumbs.get(row.id),
            has_correction=row.id in corrected,
        )
        for row in interactions
        if is_traffic(row)
    )


def to_feedback_rows(judged: Iterable[Judged]) -> tuple[FeedbackRow, ...]:
    """Every signal about traffic, with its conversation; the compiler decides what it teaches."""
    return tuple(row for item in judged if (row := _to_feedback_row(item)) is not None)


def to_interaction(answer: RecordedAnswer) -> Interaction:
    """What the gateway recorded, as the feedback store keeps it."""
    return Interaction(
        id=answer.id,
        tenant=answer.tenant,
        task=answer.task,
        messages=tuple(Message(role=m.role, content=m.content) for m in answer.messages),
        completion=answer.completion,
        model_version=answer.model_version,
        route_role=answer.route_role,
        received_at=answer.received_at,
        subject=answer.subject,
        session=answer.session,
        trace_id=answer.trace_id,
        num_prompt_tokens=answer.num_prompt_tokens,
        num_completion_tokens=answer.num_completion_tokens,
        latency_ms=answer.latency_ms,
        finish_reason=answer.finish_reason,
        tags=answer.tags,
    )


def with_texts_of(answer: RecordedAnswer, item: Interaction) -> RecordedAnswer:
    """`answer` with the texts and names of `item`, which was made of it and redacted."""
    return replace(
        answer,
        messages=tuple(
            replace(old, content=new.content)
            for old, new in zip(answer.messages, item.messages, strict=True)
        ),
        completion=item.completion,
        subject=item.subject,
        session=item.session,
        tags=item.tags,
    )


def to_policy(check: CheckSettings, *, is_forced: bool = False) -> Policy:
    """Settings as the policy of a check; a forced check retrains whatever it finds new."""
    return Policy(
        drift_level=check.level,
        feedback_level=check.level,
        num_permutations=check.permutations,
        min_new_examples=1 if is_forced else check.min_examples,
        min_trainable=1 if is_forced else min(20, check.min_examples),
        max_age=timedelta(seconds=check.max_age_s) if check.max_age_s else None,
        cool_down=timedelta(seconds=0 if is_forced else check.cooldown_s),
        min_current=check.min_rows,
        min_reference=check.min_rows,
    )


def to_rules(gate: GateSettings) -> GateRules:
    """Settings as the rules of the gate."""
    return GateRules(
        min_gain=gate.min_gain,
        retention_margin=gate.margin,
        nll_margin=gate.nll_margin,
        min_rows=gate.min_rows,
    )


def to_limits(training: TrainingSettings) -> CompileLimits:
    """Settings as the bounds of the feedback compiler."""
    return CompileLimits(max_per_subject=training.max_per_subject)


def token_f1(answer: str, reference: str) -> float:
    """Overlap of words in [0, 1]: the harmonic mean of precision and recall, as SQuAD scores it.

    Rajpurkar et al., 2016, arXiv:1606.05250, section 6.1; articles are kept.
    """
    found, wanted = Counter(tokens(answer)), Counter(tokens(reference))
    common = (found & wanted).total()
    if not common:
        return 0.0
    return 2 * common / (found.total() + wanted.total())


def _to_feedback_row(item: Judged) -> FeedbackRow | None:
    feedback, about = item.feedback, item.interaction
    if about and not is_traffic(about):
        return None
    answer = about.completion if about else feedback.target.completion
    row = FeedbackRow(
        event_id=feedback.id,
        subject=feedback.subject or (about.subject if about else None),
        kind=feedback.signal.kind,
        messages=_turns(about.messages if about else feedback.target.messages),
        may_train=feedback.may_train,
        received_at=feedback.received_at,
        answer=answer or "",
    )
    return _with_signal(row, feedback.signal)


def _with_signal(row: FeedbackRow, signal: Signal) -> FeedbackRow:
    """What was said: a wanted text, a better answer, or a label for the answer that was given."""
    match signal:
        case Correction() | Demonstration():
            return replace(row, text=signal.text)
        case Preference():
            return replace(row, text=signal.chosen, answer=signal.rejected)
        case Implicit(action="edit", text=str(text)):
            return replace(row, kind="edit", text=text)
        case Implicit():
            return replace(row, label=_LABELS.get(signal.action))
        case Binary():
            return replace(row, label="desirable" if signal.value else "undesirable")
        case Score():
            return replace(row, label=_label_of_score(signal))
        case _:
            return row


def _label_of_score(score: Score) -> Label | None:
    """The best and the worst third of the scale; what lies between says nothing clear."""
    share = (score.value - score.min) / (score.max - score.min)
    if 1 / 3 < share < 2 / 3:
        return None
    return "desirable" if share > 0.5 else "undesirable"


def _turns(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((message.role, message.content) for message in messages)
