"""Look at traffic, draw the report, decide: the flow `detect`."""

from datetime import UTC, datetime
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from perennial.flows.mapping import to_feedback_rows, to_limits, to_policy, to_traffic
from perennial.flows.steps import digest, transient_task
from perennial.flows.wiring import Deps, connect
from perennial.monitoring.check import CheckResult, check
from perennial.monitoring.check_store import StoredCheck
from perennial.monitoring.windows import Split, WindowRules, split
from perennial.registry.rounds import RoundState
from perennial.registry.versions import ModelVersion
from perennial.training.compile import compile_feedback

BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)


@flow(name="detect")
def detect(task_name: str) -> str:
    """Check the traffic of a task and say what the policy makes of it."""
    with connect() as deps:
        stored = check_traffic(deps, task_name, is_forced=False)
        return f"{stored.decision}: {'; '.join(reason.text for reason in stored.reasons)}"


@transient_task("check")
def check_traffic(deps: Deps, task_name: str, *, is_forced: bool) -> StoredCheck:
    """The check of the traffic since the champion's round began, with its report on disk."""
    result = measure(deps, task_name, is_forced=is_forced)
    folder = deps.settings.home / "checks" / report_name(task_name, result)
    from perennial.monitoring.report import HTML, write_report  # Evidently: seconds to import

    write_report(result, folder)
    stored = deps.checks.add(task_name, result, report_path=folder / HTML)
    create_markdown_artifact(key="check", markdown=summary(stored), description="Last check")
    return stored


def measure(deps: Deps, task_name: str, *, is_forced: bool) -> CheckResult:
    """The check of the traffic as it stands.

    What a candidate has learned is not new, but to a forced check: it may be tried again.
    """
    now, since = deps.feedback.horizon(), cutoff(deps, live_version(deps, task_name))
    policy = to_policy(deps.settings.check, is_forced=is_forced)
    unseen = since if is_forced else unseen_since(deps, task_name, since)
    judged = deps.feedback.feedback_between(task_name, unseen, now)
    new = compile_feedback(to_feedback_rows(judged), to_limits(deps.settings.training))
    return check(
        _windows(deps, task_name, since, now),
        policy,
        num_new_examples=len(new.examples),
        now=now,
        last_trained_at=_last_trained_at(deps, task_name),
    )


def unseen_since(deps: Deps, task_name: str, since: datetime) -> datetime:
    """When the newest round that had a candidate began, or `since`, whichever is later.

    Without it a rejected candidate would be followed by its like, on the same rows.
    """
    rounds = deps.ledger.list_rounds(task_name)
    begun = (row.opened_at for row in rounds if "register" in deps.ledger.steps(row.id))
    return max(since, next(begun, since))


def report_name(task_name: str, result: CheckResult) -> str:
    """The name of a check's report; checks that see and decide the same share one."""
    told = {
        "rows": result.inputs_digest,
        "evidence": repr(result.evidence),
        "decision": repr(result.decision),
    }
    return f"{task_name}-{digest(told)[:16]}"


def cutoff(deps: Deps, champion: ModelVersion | None) -> datetime:
    """When the champion's round began: what came later, it has not learned from."""
    return BEGINNING if champion is None else deps.ledger.get(champion.round_id).opened_at


def live_version(deps: Deps, task_name: str) -> ModelVersion | None:
    """The live version; None is the base model."""
    champion = deps.champions.current(task_name)
    return None if champion is None else deps.versions.get(champion.version)


def summary(stored: StoredCheck) -> str:
    """The check in Markdown, for the Prefect page."""
    reasons = "\n".join(f"- {reason.text}" for reason in stored.reasons)
    return (
        f"## {stored.decision}\n\n{reasons}\n\n"
        f"{stored.num_current} interactions against {stored.num_reference}, "
        f"{stored.num_new_examples} new examples.\n\nReport: `{stored.report_path}`\n"
    )


def _windows(deps: Deps, task_name: str, since: datetime, now: datetime) -> Split:
    limit = deps.settings.check.max_rows
    parts: list[Any] = []  # Any: interactions of both windows
    for start, end in ((BEGINNING, since), (since, now)):
        parts += deps.feedback.interactions_between(task_name, start, end, limit)
    judged = deps.feedback.feedback_between(task_name, BEGINNING, now)
    return split(
        to_traffic(parts, judged),
        since=BEGINNING,
        reference_until=since,
        until=now,
        rules=WindowRules(max_rows=limit),
    )


def _last_trained_at(deps: Deps, task_name: str) -> datetime | None:
    closed = (
        row.closed_at
        for row in deps.ledger.list_rounds(task_name)
        if row.state is not RoundState.OPEN
    )
    return max((at for at in closed if at is not None), default=None)
