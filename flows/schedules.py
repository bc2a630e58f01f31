"""Deployments as data: which flow runs when, and the worker process that runs them.

Flows are named by module, so that a worker started in any folder finds them.
"""

from datetime import timedelta

from prefect import serve
from prefect.deployments.runner import RunnerDeployment

from perennial.flows.remote import DEPLOYMENT
from perennial.infra.settings import Settings

RELEASE_EVERY_S = 30


def deployments(settings: Settings) -> tuple[RunnerDeployment, ...]:
    """Every deployment: the lifecycle and the release on a schedule, the parts on demand."""
    parameters = {"task_name": settings.task}
    return (
        RunnerDeployment.from_entrypoint(
            "perennial.flows.lifecycle:lifecycle",
            name=DEPLOYMENT,
            interval=timedelta(seconds=settings.check.every_s),
            parameters=parameters,
            concurrency_limit=1,
            description="Collect, detect, decide, retrain and release, when traffic calls for it.",
        ),
        RunnerDeployment.from_entrypoint(
            "perennial.flows.release:release",
            name=DEPLOYMENT,
            interval=timedelta(seconds=max(RELEASE_EVERY_S, settings.check.every_s // 60)),
            parameters=parameters,
            concurrency_limit=1,
            description="Take up approvals, promote, and repair what MLflow shows.",
        ),
        *(
            RunnerDeployment.from_entrypoint(
                f"perennial.flows.{name}:{name}",
                name="manual",
                parameters=parameters,
                concurrency_limit=1,
            )
            for name in ("collect", "detect", "retrain")
        ),
    )


def run_worker(settings: Settings) -> None:
    """Register the deployments and execute their runs, one at a time, until stopped."""
    serve(
        *deployments(settings),
        limit=2,
        query_seconds=2,
        pause_on_shutdown=False,
        print_starting_message=False,
    )
