"""From a verdict to what is live: approval → promote → MLflow's aliases → serving has switched."""

import threading
import time

import httpx
from prefect import flow

from perennial.flows.evidence import champion_of
from perennial.flows.processes import Json
from perennial.flows.steps import Steps, digest, leased, transient_task
from perennial.flows.wiring import Deps, connect
from perennial.infra.errors import ConflictError, LeaseLostError, PerennialError
from perennial.infra.settings import ApprovalSettings
from perennial.registry.approvals import Approval, ApprovalState
from perennial.registry.reconcile import reconcile
from perennial.registry.rounds import Round, RoundState
from perennial.registry.versions import ModelVersion

_POLL_S = 2.0
_SWITCH_S = 60.0


@flow(name="release")
def release(task_name: str) -> str:
    """Take up approvals of the open round, promote, and put right what MLflow shows."""
    with connect() as deps:
        current = deps.ledger.current(task_name)
        state = "no open round"
        if current is not None and "register" in deps.ledger.steps(current.id):
            try:
                state = release_round(deps, current, deps.settings.approval)
            except LeaseLostError as error:
                return str(error)
        show_in_mlflow(deps, task_name)
        return state


def release_round(deps: Deps, round_: Round, policy: ApprovalSettings) -> str:
    """The state of the round after what can be done now: promoted, rejected, or still open."""
    found = deps.ledger.get(round_.id)
    if found.state is not RoundState.OPEN:
        show_in_mlflow(deps, round_.task)
        return found.state.value
    with leased(deps.ledger, round_.id, deps.settings.home) as steps:
        verdict = _last_verdict(deps, round_)
        version = judged_version(deps, round_, verdict)
        if verdict["verdict"] == "reject":
            return _reject(deps, steps, version, _unmet(verdict))
        answer = ask_approval(deps, round_, version, verdict, policy)
        if answer.state is ApprovalState.PENDING:
            return "waits for approval"
        if answer.state is ApprovalState.REJECTED:
            return _reject(
                deps, steps, version, [f"rejected by {answer.decided_by}: {answer.note}"]
            )
        try:
            promote(deps, round_, version, verdict, answer)
        except ConflictError as error:
            return _reject(deps, steps, version, [str(error)])
        show_in_mlflow(deps, round_.task)
        confirm_serving(deps, round_.task, version)
        reasons = [reason["sentence"] for reason in verdict["reasons"]]
        return deps.ledger.close_round(steps.lease, RoundState.PROMOTED, reasons).state.value


def judged_version(deps: Deps, round_: Round, verdict: Json) -> ModelVersion:
    """The version that the verdict names; the round's newest, where an older release named none."""
    if "name" in verdict:
        return deps.versions.get(verdict["name"])
    versions = deps.versions.list_versions(round_.task)
    return next(version for version in versions if version.round_id == round_.id)


@transient_task("approval")
def ask_approval(
    deps: Deps, round_: Round, version: ModelVersion, verdict: Json, policy: ApprovalSettings
) -> Approval:
    """The answer about a version that the gate passed, waited for as long as the policy says."""
    expected = champion_of(deps, round_)
    asked = deps.approvals.request(version.name, expected=expected, evidence_digest=digest(verdict))
    if asked.state is not ApprovalState.PENDING:
        return asked
    if policy.mode == "auto":
        return deps.approvals.approve(version.name, by="policy: auto", channel="policy")
    store = deps.mlflow()
    if store.approval(version) is None:
        store.set_tags(version, {"approval": "pending"})
    deadline, pause = time.monotonic() + policy.wait_s, threading.Event()
    while True:
        answer = _take_up(deps, version)
        if answer.state is not ApprovalState.PENDING or time.monotonic() >= deadline:
            return answer
        pause.wait(_POLL_S)


def _take_up(deps: Deps, version: ModelVersion) -> Approval:
    """The answer as it stands, after a look at the tag that a reviewer sets in MLflow."""
    answer = deps.approvals.get(version.name)
    if answer.state is not ApprovalState.PENDING:
        return answer
    store = deps.mlflow()
    tag = store.approval(version)
    if tag == "approved":
        store.verify_version(version)  # a person approves what was registered, nothing else
        return deps.approvals.approve(version.name, by=store.approver(version), channel="mlflow")
    if tag == "rejected":
        return deps.approvals.reject(
            version.name, by=store.approver(version), channel="mlflow", reason="tag in MLflow"
        )
    return answer


@transient_task("promote")
def promote(
    deps: Deps, round_: Round, version: ModelVersion, verdict: Json, answer: Approval
) -> None:
    """Make the version live, if what it was judged against still is; done once for a round."""
    deps.champions.promote(
        round_.task,
        version.name,
        decision_id=f"promote-{round_.id}",
        expected=answer.expected,
        decided_by=answer.decided_by or "unknown",
        evidence_digest=answer.evidence_digest,
        reasons=[reason["sentence"] for reason in verdict["reasons"]],
    )


@transient_task("show in MLflow")
def show_in_mlflow(deps: Deps, task_name: str) -> None:
    """Aliases as the database says; nothing to do before the first promotion."""
    if deps.champions.history(task_name, 1):
        reconcile(task_name, deps.champions, deps.outbox, deps.mlflow())


@transient_task("confirm")
def confirm_serving(deps: Deps, task_name: str, version: ModelVersion) -> bool:
    """Whether the gateway answers with the version within a minute; it may also be down."""
    deadline, pause = time.monotonic() + _SWITCH_S, threading.Event()
    url = f"{deps.settings.api_url}/v1/serving"
    while time.monotonic() < deadline:
        try:
            shown = httpx.get(url, timeout=5, trust_env=False).raise_for_status().json()
        except httpx.HTTPError:
            return False
        # Not the list of loaded adapters: one is loaded before requests are routed to it.
        if _route(shown, task_name).get("version") == version.name:
            return True
        pause.wait(0.5)
    return False


def _route(shown: Json, task_name: str) -> Json:
    routes: list[Json] = shown["tasks"]
    return next((route for route in routes if route["task"] == task_name), {})


def _last_verdict(deps: Deps, round_: Round) -> Json:
    found = deps.ledger.last_result(round_.id, "register")
    if found is None:
        raise PerennialError(f"{round_.id} has no verdict yet; run the flow retrain")
    return found


def _reject(deps: Deps, steps: Steps, version: ModelVersion, reasons: list[str]) -> str:
    deps.versions.reject(version.name)
    return deps.ledger.close_round(steps.lease, RoundState.REJECTED, reasons).state.value


def _unmet(verdict: Json) -> list[str]:
    return [reason["sentence"] for reason in verdict["reasons"] if not reason["is_met"]]
