"""The whole loop in one flow; README's picture, top to bottom."""

from typing import Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from perennial.flows.collect import join_pending
from perennial.flows.detect import check_traffic
from perennial.flows.erase import withdraw_erased
from perennial.flows.release import release_round
from perennial.flows.retrain import open_round, retrain_round, round_summary
from perennial.flows.wiring import Deps, connect
from perennial.infra.errors import LeaseLostError
from perennial.infra.settings import ApprovalSettings
from perennial.registry.rounds import Round


@flow(name="lifecycle")
def lifecycle(
    task_name: str, approval: Literal["auto", "manual"] | None = None, force: bool = False
) -> str:
    """Look at traffic; retrain, judge and release when it calls for it. Safe to run twice.

    A round that was interrupted is finished before traffic is looked at again.
    """
    with connect() as deps:
        join_pending(deps)
        withdraw_erased(deps)
        current = deps.ledger.current(task_name) or _new_round(deps, task_name, is_forced=force)
        if current is None:
            return "hold"
        policy = deps.settings.approval
        if approval is not None:
            policy = ApprovalSettings(mode=approval, wait_s=policy.wait_s)
        try:
            retrain_round(deps, current)
            state = release_round(deps, current, policy)
        except LeaseLostError as error:
            return str(error)
        create_markdown_artifact(key="round", markdown=round_summary(deps, current.id))
        return state


def _new_round(deps: Deps, task_name: str, *, is_forced: bool) -> Round | None:
    check = check_traffic(deps, task_name, is_forced=is_forced)
    return open_round(deps, check) if check.decision == "retrain" else None
