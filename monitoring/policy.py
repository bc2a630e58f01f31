"""Decides from the evidence of a check whether to retrain, and says why in words.

Input drift alone asks for an evaluation: users may ask new things that the model answers well. It
is drift together with unhappy users, or unhappier users, or enough to learn from, or age, that
starts a round. Measuring is left to `drift` and `feedback_rates`, acting to `flows`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from enum import StrEnum

from perennial.infra.errors import ConfigError, InputError
from perennial.monitoring.drift import DriftScore
from perennial.monitoring.feedback_rates import FeedbackRates, RateRise


class ReasonCode(StrEnum):
    """Stable names of the reasons; the sentence beside each carries the numbers."""

    DRIFT = "drift"
    FEEDBACK_DROP = "feedback_drop"
    ENOUGH_FEEDBACK = "enough_feedback"
    SCHEDULE = "schedule"
    COOL_DOWN = "cool_down"
    NOTHING_NEW = "nothing_new"
    DRIFT_WITHOUT_RISK = "drift_without_risk"
    WINDOW_TOO_SMALL = "window_too_small"
    NO_REFERENCE = "no_reference"
    QUIET = "quiet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """One reason: a code for machines and a sentence for people."""

    code: ReasonCode
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """When a model counts as stale.

    Attributes:
        drift_level: drift is p ≤ this.
        num_permutations: B of the drift test; the smallest p it can give is 1/(B+1).
        feedback_level: a rise in thumbs-down or corrections is p ≤ half of this (two rates are
            tested, so the false-alarm rate of both together stays below it).
        min_increase: and the rate has risen by at least this share.
        risk_rate: quality is at risk when at least this share of users is unhappy (lower 95%
            bound), or when feedback has dropped.
        min_new_examples: this many new examples start a round by themselves.
        min_trainable: fewer than this cannot be trained on, whatever else is the case.
        max_age: retrain after this time although nothing else asks for it; None for never.
        cool_down: no round sooner than this after the last.
        min_current: a smaller current window is not tested.
        min_reference: nor is one against a smaller reference.
    """

    drift_level: float = 0.01
    num_permutations: int = 999
    feedback_level: float = 0.01
    min_increase: float = 0.05
    risk_rate: float = 0.10
    min_new_examples: int = 100
    min_trainable: int = 20
    max_age: timedelta | None = timedelta(days=30)
    cool_down: timedelta = timedelta(hours=6)
    min_current: int = 50
    min_reference: int = 50

    def __post_init__(self) -> None:
        for name in ("drift_level", "feedback_level", "risk_rate", "min_increase"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{field.name} must be positive, got {value}")
            if isinstance(value, timedelta) and value < timedelta():
                raise ConfigError(f"{field.name} must not be negative, got {value}")
        if self.drift_level * (self.num_permutations + 1) < 1:
            raise ConfigError(
                f"{self.num_permutations} permutations cannot reach p <= {self.drift_level}; "
                f"set num_permutations to at least {int(1 / max(self.drift_level, 1e-9))}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckEvidence:
    """What one check measured.

    Attributes:
        num_new_examples: trainable examples that no round has used.
        drift: None when a window was too small or there is no reference.
        current: feedback of the current window.
        thumbs_down_rise: None like `drift`.
        correction_rise: None like `drift`.
    """

    num_current: int
    num_reference: int
    num_new_examples: int
    drift: DriftScore | None
    current: FeedbackRates
    thumbs_down_rise: RateRise | None
    correction_rise: RateRise | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrain:
    """Start a round, for every reason given."""

    reasons: tuple[Reason, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """Leave the model as it is.

    Attributes:
        reasons: why.
        suppressed: what would have started a round if nothing had stood against it.
    """

    reasons: tuple[Reason, ...]
    suppressed: tuple[Reason, ...] = ()

    @property
    def asks_for_evaluation(self) -> bool:
        """Whether traffic has changed while users seem content: measure before you train."""
        return any(reason.code is ReasonCode.DRIFT_WITHOUT_RISK for reason in self.reasons)


Decision = Retrain | Hold


def decide(
    evidence: CheckEvidence, policy: Policy, *, now: datetime, last_trained_at: datetime | None
) -> Decision:
    """Retrain when something asks for it and nothing stands against it."""
    if now.tzinfo is None or (last_trained_at is not None and last_trained_at.tzinfo is None):
        raise InputError("now and last_trained_at must be aware")
    age = None if last_trained_at is None else now - last_trained_at
    drop = _feedback_drop(evidence, policy)
    triggers = _kept(
        drift := _drift(evidence, policy, is_drop=drop is not None),
        drop,
        _enough_feedback(evidence, policy),
        _schedule(age, policy),
    )
    blocks = _kept(_cool_down(age, policy), _nothing_new(evidence, policy))
    if triggers and not blocks:
        return Retrain(reasons=triggers)
    notes = _kept(
        None if drift else _drift_without_risk(evidence, policy), _too_small(evidence, policy)
    )
    return Hold(reasons=blocks + notes or (_quiet(evidence),), suppressed=triggers)


def _kept(*reasons: Reason | None) -> tuple[Reason, ...]:
    return tuple(reason for reason in reasons if reason is not None)


def _has_drifted(evidence: CheckEvidence, policy: Policy) -> bool:
    return evidence.drift is not None and evidence.drift.p_value <= policy.drift_level


def _drift(evidence: CheckEvidence, policy: Policy, *, is_drop: bool) -> Reason | None:
    unhappy = evidence.current.unhappy
    if not _has_drifted(evidence, policy) or not (is_drop or unhappy.low >= policy.risk_rate):
        return None
    return Reason(
        code=ReasonCode.DRIFT,
        text=f"{_drift_text(evidence, policy)}, and {unhappy.num_events} of {unhappy.num_rows} "
        f"users were unhappy (at least {unhappy.low:.0%})",
    )


def _drift_without_risk(evidence: CheckEvidence, policy: Policy) -> Reason | None:
    if not _has_drifted(evidence, policy):
        return None
    unhappy = evidence.current.unhappy
    return Reason(
        code=ReasonCode.DRIFT_WITHOUT_RISK,
        text=f"{_drift_text(evidence, policy)}, but only {unhappy.num_events} of "
        f"{unhappy.num_rows} users were unhappy: evaluate the live model on the new traffic",
    )


def _drift_text(evidence: CheckEvidence, policy: Policy) -> str:
    drift = evidence.drift
    assert drift is not None  # _has_drifted said so
    return (
        f"prompts differ from the reference (p = {drift.p_value:.4f} ≤ {policy.drift_level}; "
        f"distance {drift.distance:.3f}, {drift.null_distance:.3f} by chance)"
    )


def _feedback_drop(evidence: CheckEvidence, policy: Policy) -> Reason | None:
    named = (
        ("thumbs-down", evidence.thumbs_down_rise),
        ("correction", evidence.correction_rise),
    )
    texts = [
        f"the {name} rate rose from {rise.reference.value:.0%} to {rise.current.value:.0%} "
        f"(p = {rise.p_value:.4f} ≤ {policy.feedback_level / 2})"
        for name, rise in named
        if rise is not None
        and rise.p_value <= policy.feedback_level / 2
        and rise.increase >= policy.min_increase
    ]
    return Reason(code=ReasonCode.FEEDBACK_DROP, text="; ".join(texts)) if texts else None


def _enough_feedback(evidence: CheckEvidence, policy: Policy) -> Reason | None:
    if evidence.num_new_examples < policy.min_new_examples:
        return None
    return Reason(
        code=ReasonCode.ENOUGH_FEEDBACK,
        text=f"{evidence.num_new_examples} new examples, {policy.min_new_examples} are enough",
    )


def _schedule(age: timedelta | None, policy: Policy) -> Reason | None:
    if age is None or policy.max_age is None or age < policy.max_age:
        return None
    return Reason(
        code=ReasonCode.SCHEDULE,
        text=f"last trained {_span(age)} ago, {_span(policy.max_age)} is the limit",
    )


def _cool_down(age: timedelta | None, policy: Policy) -> Reason | None:
    if age is None or age >= policy.cool_down:
        return None
    return Reason(
        code=ReasonCode.COOL_DOWN,
        text=f"last trained {_span(age)} ago, the cool-down is {_span(policy.cool_down)}",
    )


def _nothing_new(evidence: CheckEvidence, policy: Policy) -> Reason | None:
    if evidence.num_new_examples >= policy.min_trainable:
        return None
    return Reason(
        code=ReasonCode.NOTHING_NEW,
        text=f"{evidence.num_new_examples} new examples, a round needs {policy.min_trainable}",
    )


def _too_small(evidence: CheckEvidence, policy: Policy) -> Reason | None:
    if evidence.num_current < policy.min_current:
        return Reason(
            code=ReasonCode.WINDOW_TOO_SMALL,
            text=f"the window has {evidence.num_current} of {policy.min_current} rows",
        )
    if evidence.num_reference == 0:
        return Reason(
            code=ReasonCode.NO_REFERENCE, text="there is no earlier traffic to compare with"
        )
    if evidence.num_reference < policy.min_reference:
        return Reason(
            code=ReasonCode.WINDOW_TOO_SMALL,
            text=f"the reference has {evidence.num_reference} of {policy.min_reference} rows",
        )
    return None


def _quiet(evidence: CheckEvidence) -> Reason:
    drift = "" if evidence.drift is None else f" (drift p = {evidence.drift.p_value:.4f})"
    return Reason(code=ReasonCode.QUIET, text=f"traffic and feedback look as before{drift}")


def _span(time: timedelta) -> str:
    return str(timedelta(seconds=round(time.total_seconds())))


def codes(reasons: Iterable[Reason]) -> tuple[ReasonCode, ...]:
    """The codes alone, for logs and comparisons."""
    return tuple(reason.code for reason in reasons)
