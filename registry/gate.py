"""The gate: may the candidate replace the champion, and why.

Both answered the same rows in the same run; scores of another day are never compared. Scoring is
left to training, promoting to `champion`. The candidate must win on the target suite and must not
be worse on any other by more than a margin; whoever ties stays outside.
"""

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from perennial.infra.errors import InputError
from perennial.registry.stats import (
    ClusterTotals,
    Interval,
    cautious_interval,
    cluster_totals,
    sign_flip_p,
    wilson,
)


class SuiteKind(StrEnum):
    """What a suite measures."""

    TARGET = "target"  # scores in [0, 1]; the candidate must be better
    RETENTION = "retention"  # scores in [0, 1]; the candidate must not be worse
    FORBID = "forbid"  # 1 is an answer that must not be given, such as an old policy
    NLL = "nll"  # nats per token; the candidate must not rise


@dataclass(frozen=True, kw_only=True, slots=True)
class RowScore:
    """One model's score on one row; None when the row errored.

    Rows of one `cluster` (a subject, a question asked in several ways) count as one observation.
    """

    row_id: str
    cluster: str
    score: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """The rows of one suite, scored for both models."""

    name: str
    kind: SuiteKind
    candidate: tuple[RowScore, ...]
    champion: tuple[RowScore, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateEvidence:
    """Everything that the gate looks at.

    `champion` is the version that was scored, `champion_now` the one live at the verdict (None is
    the base model). `attempt` counts candidates judged on these target rows, this one included.
    """

    task: str
    candidate: str
    champion: str | None
    champion_now: str | None
    suites: tuple[Suite, ...]
    attempt: int = 1

    def __post_init__(self) -> None:
        if self.attempt < 1:
            raise InputError(f"attempt must be at least 1, got {self.attempt}")
        names = Counter(suite.name for suite in self.suites)
        if twice := sorted(name for name, count in names.items() if count > 1):
            raise InputError(f"suites must have different names, twice: {', '.join(twice)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRules:
    """What must be shown; margins are in points of score, `nll_margin` in nats per token."""

    min_gain: float = 0.05
    retention_margin: float = 0.05
    forbid_margin: float = 0.05
    nll_margin: float = 0.10
    min_rows: int = 10
    level: float = 0.05
    num_resamples: int = 9999

    def __post_init__(self) -> None:
        if not 0 < self.level < 0.5:
            raise InputError(f"level must be in (0, 0.5), got {self.level}")
        if self.min_rows < 2:
            raise InputError(f"min_rows must be at least 2, got {self.min_rows}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """One finding: a stable code, a sentence for a person, and the numbers in it."""

    code: str
    is_met: bool
    sentence: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Both means on one suite and the difference, candidate minus champion.

    `difference` holds the bounds that the gate used, each one-sided at its level; `before` and
    `after` are 95% intervals of the single means (no width for NLL).
    """

    suite: str
    kind: SuiteKind
    num_rows: int
    num_clusters: int
    num_errors: int
    before: Interval
    after: Interval
    difference: Interval
    is_met: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Promote:
    """The candidate may go live."""

    reasons: tuple[Reason, ...]
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """The candidate stays out; the reasons that are not met say why."""

    reasons: tuple[Reason, ...]
    comparisons: tuple[Comparison, ...]


Verdict = Promote | Reject


def judge(evidence: GateEvidence, rules: GateRules) -> Verdict:
    """Promote if every demand is met, else Reject; both with every reason. Deterministic."""
    reasons = [_same_champion(evidence)]
    comparisons = []
    if not any(suite.kind is SuiteKind.TARGET for suite in evidence.suites):
        reasons.append(Reason(code="no_target", is_met=False, sentence="There is no target suite."))
    for suite in evidence.suites:
        reason, comparison = _judge_suite(suite, rules, evidence.attempt)
        reasons.append(reason)
        if comparison is not None:
            comparisons.append(comparison)
    verdict = Promote if all(reason.is_met for reason in reasons) else Reject
    return verdict(reasons=tuple(reasons), comparisons=tuple(comparisons))


def level_at(attempt: int, level: float = 0.05) -> float:
    """The level of the k-th attempt, level/(k(k+1)): over all attempts they add up to `level`."""
    return level / (attempt * (attempt + 1))


def _same_champion(evidence: GateEvidence) -> Reason:
    scored, now = evidence.champion or "the base model", evidence.champion_now or "the base model"
    if evidence.champion == evidence.champion_now:
        return Reason(
            code="champion_unchanged", is_met=True, sentence=f"Scored against {scored}, still live."
        )
    return Reason(
        code="champion_moved",
        is_met=False,
        sentence=f"Scored against {scored}, but {now} is live now: evaluate again.",
    )


def _judge_suite(suite: Suite, rules: GateRules, attempt: int) -> tuple[Reason, Comparison | None]:
    if (refusal := _cannot_compare(suite, rules)) is not None:
        return refusal, None
    before, after, clusters = _aligned(suite)
    totals = cluster_totals([a - b for a, b in zip(after, before, strict=True)], clusters)
    reason, difference = (
        _superior(suite, totals, rules, attempt)
        if suite.kind is SuiteKind.TARGET
        else _not_worse(suite, totals, rules)
    )
    return reason, Comparison(
        suite=suite.name,
        kind=suite.kind,
        num_rows=len(before),
        num_clusters=totals.sums_G.size,
        num_errors=sum(row.score is None for row in (*suite.candidate, *suite.champion)),
        before=_mean(suite.kind, before),
        after=_mean(suite.kind, after),
        difference=difference,
        is_met=reason.is_met,
    )


def _cannot_compare(suite: Suite, rules: GateRules) -> Reason | None:
    candidate = Counter(row.row_id for row in suite.candidate)
    champion = Counter(row.row_id for row in suite.champion)
    odd = (candidate - champion) + (champion - candidate)
    repeated = max([*candidate.values(), *champion.values()], default=1) > 1
    if odd or repeated:
        return _fail(
            "rows_differ",
            f"{suite.name}: both models must be scored once on each of the same rows; "
            f"{odd.total()} rows are on one side only{', some are repeated' if repeated else ''}.",
            num_odd=odd.total(),
        )
    num_rows = len(suite.candidate)
    if num_rows < rules.min_rows:
        return _fail(
            "insufficient",
            f"{suite.name}: {num_rows} rows are insufficient, {rules.min_rows} are needed.",
            num_rows=num_rows,
            min_rows=rules.min_rows,
        )
    return _bad_scores(suite)


def _bad_scores(suite: Suite) -> Reason | None:
    scores = [row.score for row in (*suite.candidate, *suite.champion)]
    num_errors = sum(score is None for score in scores)
    if suite.kind is SuiteKind.NLL and num_errors:
        # A loss has no worst value that could stand in for the missing one.
        return _fail(
            "incomplete",
            f"{suite.name}: {num_errors} rows could not be scored.",
            num_errors=num_errors,
        )
    highest = math.inf if suite.kind is SuiteKind.NLL else 1.0
    num_bad = sum(
        s is not None and not (0 <= s <= highest and math.isfinite(s)) for s in scores
    )  # NaN fails every comparison and is counted here
    if num_bad:
        return _fail(
            "score_invalid", f"{suite.name}: {num_bad} scores are out of range.", num_bad=num_bad
        )
    return None


def _aligned(suite: Suite) -> tuple[list[float], list[float], list[str]]:
    """Champion scores, candidate scores and clusters by row id.

    An errored row counts against the candidate on either side: its own error is a failure, and a
    champion that could not be scored is credited with success.
    """
    worst, best = (1.0, 0.0) if suite.kind is SuiteKind.FORBID else (0.0, 1.0)
    champion = {row.row_id: row for row in suite.champion}
    rows = sorted(suite.candidate, key=lambda row: row.row_id)
    before = [champion[row.row_id].score for row in rows]
    return (
        [best if score is None else score for score in before],
        [worst if row.score is None else row.score for row in rows],
        [row.cluster for row in rows],
    )


def _superior(
    suite: Suite, totals: ClusterTotals, rules: GateRules, attempt: int
) -> tuple[Reason, Interval]:
    level = level_at(attempt, rules.level)
    rng = _generator(suite)
    p = sign_flip_p(totals, rng, max(rules.num_resamples, math.ceil(20 / level)))
    interval = _interval(totals, rng, rules, pseudo=1.0)
    num_clusters = totals.sums_G.size
    numbers = {
        "gain": totals.mean,
        "min_gain": rules.min_gain,
        "p": p,
        "level": level,
        "attempt": float(attempt),
        "num_clusters": float(num_clusters),
    }
    if 2.0**-num_clusters > level:
        sentence = f"{num_clusters} independent clusters cannot reach level {level:.4f}"
        return _fail("insufficient", f"{suite.name}: {sentence}.", **numbers), interval
    shown = f"{suite.name}: gain {totals.mean:+.1%}, p = {p:.2g} at level {level:.2g}"
    if p > level:
        return _fail("not_superior", f"{shown}: this can be chance.", **numbers), interval
    if totals.mean < rules.min_gain:
        text = f"{shown}, below the least useful gain of {rules.min_gain:.1%}."
        return _fail("gain_too_small", text, **numbers), interval
    return Reason(
        code="superior", is_met=True, sentence=f"{shown}: shown to be better.", numbers=numbers
    ), interval


def _not_worse(suite: Suite, totals: ClusterTotals, rules: GateRules) -> tuple[Reason, Interval]:
    is_nll = suite.kind is SuiteKind.NLL
    interval = _interval(totals, _generator(suite), rules, pseudo=0.0 if is_nll else 1.0)
    margin = {
        SuiteKind.RETENTION: rules.retention_margin,
        SuiteKind.FORBID: rules.forbid_margin,
        SuiteKind.NLL: rules.nll_margin,
    }[suite.kind]
    # Turned so that a rise of `harm` is bad for every kind.
    harm = -interval.low if suite.kind is SuiteKind.RETENTION else interval.high
    is_met = harm < margin
    shown = f"{totals.mean:+.3f} nats/token" if is_nll else f"{totals.mean:+.1%}"
    bound, limit = (f"{harm:.3f}", f"{margin:.3f}") if is_nll else (f"{harm:.1%}", f"{margin:.1%}")
    verb = "is below" if is_met else "is not below"
    sentence = (
        f"{suite.name}: change {shown}; at {1 - rules.level:.0%} confidence the harm is at most "
        f"{bound}, which {verb} the margin of {limit}."
    )
    numbers = {"change": totals.mean, "harm_bound": harm, "margin": margin}
    code = {
        SuiteKind.RETENTION: ("retained", "not_retained"),
        SuiteKind.FORBID: ("forbidden_rare", "forbidden_rises"),
        SuiteKind.NLL: ("nll_kept", "nll_rises"),
    }[suite.kind][not is_met]
    return Reason(code=code, is_met=is_met, sentence=sentence, numbers=numbers), interval


def _interval(
    totals: ClusterTotals, rng: np.random.Generator, rules: GateRules, pseudo: float
) -> Interval:
    return cautious_interval(
        totals,
        rng,
        level=1 - 2 * rules.level,
        num_resamples=rules.num_resamples,
        pseudo=pseudo,
    )


def _mean(kind: SuiteKind, scores: Sequence[float]) -> Interval:
    if kind is SuiteKind.NLL:
        mean = math.fsum(scores) / len(scores)
        return Interval(estimate=mean, low=mean, high=mean)
    return wilson(min(math.fsum(scores), len(scores)), len(scores))


def _generator(suite: Suite) -> np.random.Generator:
    """The same draws for the same rows, so that a verdict can be computed again."""
    return np.random.default_rng(zlib.crc32(f"{suite.name}:{len(suite.candidate)}".encode()))


def _fail(code: str, sentence: str, **numbers: float) -> Reason:
    return Reason(code=code, is_met=False, sentence=sentence, numbers=numbers)
