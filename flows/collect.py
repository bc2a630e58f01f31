"""Join feedback that came before its interaction: the flow `collect`."""

from prefect import flow

from perennial.flows.steps import transient_task
from perennial.flows.wiring import Deps, connect


@flow(name="collect")
def collect(task_name: str) -> str:
    """Join what is pending and say how much traffic there is."""
    with connect() as deps:
        num_joined = join_pending(deps)
        newest = deps.feedback.newest_interaction_at(task_name)
        return f"joined {num_joined}, newest interaction {newest}"


@transient_task("collect")
def join_pending(deps: Deps) -> int:
    """How many pending feedback were joined."""
    return deps.feedback.join_pending()
