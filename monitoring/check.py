"""One check of live traffic, as a pure function: windows in, evidence and decision out.

Drawing it is left to `report`, keeping it to `check_store`, fetching rows and starting a round to
`flows`.
"""

from dataclasses import asdict, dataclass
from datetime import datetime

from perennial.monitoring.drift import DriftScore, WordShift, text_drift, word_shifts
from perennial.monitoring.feedback_rates import FeedbackRates, RateRise, feedback_rates, rate_rise
from perennial.monitoring.policy import CheckEvidence, Decision, Policy, Reason, Retrain, decide
from perennial.monitoring.windows import Split, Window

# What a JSON document holds: scores are written for machines and shown to people.
Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

_NUM_SHIFTS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """Everything one check saw and concluded.

    Attributes:
        reference_feedback: None without a reference.
        shifts: the words whose share changed most; empty without a reference.
        inputs_digest: SHA-256 of the rows seen; with the policy it fixes the result.
    """

    split: Split
    policy: Policy
    evidence: CheckEvidence
    reference_feedback: FeedbackRates | None
    shifts: tuple[WordShift, ...]
    decision: Decision
    inputs_digest: str
    checked_at: datetime


def check(
    windows: Split,
    policy: Policy,
    *,
    num_new_examples: int,
    now: datetime,
    last_trained_at: datetime | None,
) -> CheckResult:
    """The evidence in `windows` and what `policy` makes of it.

    The permutations are seeded by the rows themselves: checking the same rows again gives the same
    p-value, and no seed can be chosen until the answer pleases.
    """
    reference = windows.reference
    digest = windows.digest
    evidence = _measure(windows, policy, digest, num_new_examples)
    return CheckResult(
        split=windows,
        policy=policy,
        evidence=evidence,
        reference_feedback=feedback_rates(reference.rows) if reference else None,
        shifts=(
            word_shifts(reference.prompts, windows.current.prompts, limit=_NUM_SHIFTS)
            if reference
            else ()
        ),
        decision=decide(evidence, policy, now=now, last_trained_at=last_trained_at),
        inputs_digest=digest,
        checked_at=now,
    )


def scores(result: CheckResult) -> dict[str, Json]:
    """The check as a JSON document: windows, counts, p-values, rates, decision, reasons."""
    evidence, decision = result.evidence, result.decision
    suppressed = () if isinstance(decision, Retrain) else decision.suppressed
    reference = result.split.reference
    return {
        "checked_at": result.checked_at.isoformat(),
        "inputs_digest": result.inputs_digest,
        "current": _window_scores(result.split.current, evidence.current),
        "reference": (
            _window_scores(reference, result.reference_feedback)
            if reference and result.reference_feedback
            else None
        ),
        "num_new_examples": evidence.num_new_examples,
        "drift": asdict(evidence.drift) if evidence.drift else None,
        "thumbs_down_rise_p": _p_value(evidence.thumbs_down_rise),
        "correction_rise_p": _p_value(evidence.correction_rise),
        "word_shifts": [asdict(shift) for shift in result.shifts],
        "decision": decision_name(decision),
        "reasons": reasons_json(decision.reasons),
        "suppressed": reasons_json(suppressed),
    }


def decision_name(decision: Decision) -> str:
    """`retrain` or `hold`."""
    return type(decision).__name__.lower()


def reasons_json(reasons: tuple[Reason, ...]) -> list[Json]:
    """Reasons as `{code, text}` objects."""
    return [{"code": reason.code.value, "text": reason.text} for reason in reasons]


def _measure(windows: Split, policy: Policy, digest: str, num_new_examples: int) -> CheckEvidence:
    reference, current = windows.reference, windows.current
    now = feedback_rates(current.rows)
    comparable = (
        reference
        if reference
        and len(reference.rows) >= policy.min_reference
        and len(current.rows) >= policy.min_current
        else None
    )
    before = feedback_rates(comparable.rows) if comparable else None
    return CheckEvidence(
        num_current=len(current.rows),
        num_reference=len(reference.rows) if reference else 0,
        num_new_examples=num_new_examples,
        drift=_drift(comparable, current, policy, digest) if comparable else None,
        current=now,
        thumbs_down_rise=rate_rise(before.thumbs_down, now.thumbs_down) if before else None,
        correction_rise=rate_rise(before.correction, now.correction) if before else None,
    )


def _drift(reference: Window, current: Window, policy: Policy, digest: str) -> DriftScore:
    return text_drift(
        reference.prompts,
        current.prompts,
        num_permutations=policy.num_permutations,
        seed=int(digest[:16], 16),
    )


def _p_value(rise: RateRise | None) -> float | None:
    return None if rise is None else rise.p_value


def _window_scores(window: Window, feedback: FeedbackRates) -> dict[str, Json]:
    return {
        "since": window.since.isoformat(),
        "until": window.until.isoformat(),
        "num_rows": len(window.rows),
        "dropped": {reason.value: num for reason, num in window.dropped.items()},
        "feedback": asdict(feedback),
    }
