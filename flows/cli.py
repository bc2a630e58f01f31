"""The command `perennial`. Heavy packages are imported inside the commands that need them."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from perennial.infra.clock import new_id
from perennial.infra.errors import PerennialError
from perennial.infra.log import configure_logging
from perennial.infra.settings import (
    Settings,
    apply_process_defaults,
    export_settings,
    load_process_settings,
)
from perennial.registry.server import client_environment

NICENESS = 5  # of the worker: serving and ingestion go first where they share the cores

F = TypeVar("F", bound=Callable[..., None])


class _Group(click.Group):
    """Shows our own errors as one line and exit status 2, and Ctrl-C as 130."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PerennialError as error:
            click.secho(f"{error.code}: {error}", fg="red", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            sys.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(path_type=Path), help="Settings file to read.")
@click.version_option(package_name="perennial-llm")
@click.pass_context
def main(ctx: click.Context, config: Path | None) -> None:
    """Keep a production LLM good at its job, and prove each change."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    ctx.obj = config


def _with_settings(run: Callable[..., None]) -> Callable[..., None]:
    """Give a command the settings as its first argument."""

    @click.pass_context
    def wrapped(ctx: click.Context, /, **options: object) -> None:
        settings = load_process_settings(ctx.obj)
        configure_logging(settings.log_level)
        export_settings(settings)
        apply_process_defaults(settings, client_environment())
        run(settings, **options)

    wrapped.__doc__ = run.__doc__
    wrapped.__name__ = run.__name__
    return wrapped


@main.command()
@_with_settings
def up(settings: Settings) -> None:
    """Start gateway, feedback API, MLflow, Prefect and a worker; Ctrl-C stops them."""
    from perennial.flows.up import run_up

    run_up(settings)


@main.command()
@_with_settings
def serve(settings: Settings) -> None:
    """Run only the gateway and the feedback API."""
    from perennial.flows.app import run_app

    run_app(settings)


@main.command()
@_with_settings
def worker(settings: Settings) -> None:
    """Run only the worker that executes scheduled flows."""
    from perennial.flows.schedules import run_worker

    os.nice(NICENESS)
    run_worker(settings)


@main.command()
@_with_settings
def migrate(settings: Settings) -> None:
    """Bring the database to the current schema."""
    from perennial.infra.migrate import upgrade

    upgrade(settings.resolved_database_url)
    click.echo("the database is at the current schema")


@main.command()
@click.option("--force", is_flag=True, help="Start a round even when the policy says hold.")
@_with_settings
def check(settings: Settings, force: bool) -> None:
    """Run the lifecycle now, in this process: look at traffic and retrain when it calls for it."""
    from perennial.flows.lifecycle import lifecycle

    click.echo(lifecycle(task_name=settings.task, force=force))


@main.command()
@_with_settings
def status(settings: Settings) -> None:
    """Show champion, last decision with its reasons, rounds, pending approvals and URLs."""
    from perennial.flows.cli_show import show_status

    show_status(settings)


@main.command()
@_with_settings
def history(settings: Settings) -> None:
    """Show what was live when, by whose decision."""
    from perennial.flows.cli_show import show_history

    show_history(settings)


@main.command()
@click.argument("version")
@click.option("--by", required=True, help="Who decides; kept in the record.")
@_with_settings
def approve(settings: Settings, version: str, by: str) -> None:
    """Approve VERSION, which the gate has passed; the next release run promotes it."""
    from perennial.flows.wiring import connect

    with connect(settings) as deps:
        deps.approvals.approve(version, by=by, channel="cli")
    click.echo(f"{version} is approved by {by}")


@main.command()
@click.argument("version")
@click.option("--by", required=True, help="Who decides; kept in the record.")
@click.option("--reason", required=True, help="Why; kept in the record.")
@_with_settings
def reject(settings: Settings, version: str, by: str, reason: str) -> None:
    """Reject VERSION; the champion stays."""
    from perennial.flows.wiring import connect

    with connect(settings) as deps:
        deps.approvals.reject(version, by=by, channel="cli", reason=reason)
    click.echo(f"{version} is rejected by {by}")


@main.command()
@click.option("--by", required=True, help="Who decides; kept in the record.")
@click.option("--reason", required=True, help="Why; kept in the record.")
@_with_settings
def rollback(settings: Settings, by: str, reason: str) -> None:
    """Make the version before the champion live again; serving follows within a second."""
    from perennial.flows.wiring import connect

    with connect(settings) as deps:
        change = deps.champions.rollback(
            settings.task, decision_id=new_id("dec"), decided_by=by, reason=reason
        )
    click.echo(f"live now: {change.version or 'base'}")


@main.group()
def keys() -> None:
    """Create, list, rotate and revoke API keys."""


_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON value, for machines.")


@keys.command("create")
@click.option("--tenant", default="default", show_default=True, help="The app that the key is for.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=("ingest", "read"),
    show_default=True,
    type=click.Choice(["ingest", "read", "review", "train", "promote", "admin"]),
    help="What it allows; may be given several times.",
)
@click.option("--expires-in", help="Time until it expires, such as 90d; never by default.")
@_as_json
@_with_settings
def create(
    settings: Settings,
    tenant: str,
    scopes: tuple[str, ...],
    expires_in: str | None,
    as_json: bool,
) -> None:
    """Print a new key; it is shown this once."""
    from perennial.flows.cli_keys import create_key

    create_key(settings, tenant, scopes, expires_in, as_json)


@keys.command("list")
@_as_json
@_with_settings
def list_(settings: Settings, as_json: bool) -> None:
    """Show every key without its secret."""
    from perennial.flows.cli_keys import list_keys

    list_keys(settings, as_json)


@keys.command("rotate")
@click.argument("key_id")
@click.option(
    "--overlap",
    default="24h",
    show_default=True,
    help="Time that the old key goes on working, such as 30m, 24h or 7d.",
)
@click.option("--expires-in", help="Time until the new key expires; as long as the old one had.")
@_as_json
@_with_settings
def rotate(
    settings: Settings, key_id: str, overlap: str, expires_in: str | None, as_json: bool
) -> None:
    """Print a key that replaces the one with this id, with the same tenant and scopes."""
    from perennial.flows.cli_keys import rotate_key

    rotate_key(settings, key_id, overlap, expires_in, as_json)


@keys.command("revoke")
@click.argument("key_id")
@_as_json
@_with_settings
def revoke(settings: Settings, key_id: str, as_json: bool) -> None:
    """Revoke the key with this id."""
    from perennial.flows.cli_keys import revoke_key

    revoke_key(settings, key_id, as_json)


@main.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--format",
    "format_",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "perennial", "openai-chat", "mlflow", "langfuse"]),
    help="What the lines are; auto decides for each.",
)
@click.option("--task", help="Task of lines that name none; the configured one by default.")
@click.option("--tenant", default="default", show_default=True, help="The app that it is for.")
@click.option(
    "--scale", nargs=2, type=float, metavar="MIN MAX", help="Ends of the scale of numeric scores."
)
@click.option("--url", help="Send to the service at this address instead of the database.")
@click.option("--key-env", help="Variable that holds the API key for --url, which names the app.")
@click.option("--dry-run", "is_dry", is_flag=True, help="Check every line, store nothing.")
@_with_settings
def import_(
    settings: Settings,
    file: Path,
    format_: str,
    task: str | None,
    tenant: str,
    scale: tuple[float, float] | None,
    url: str | None,
    key_env: str | None,
    is_dry: bool,
) -> None:
    """Import FILE, one JSON object a line, gzip or not; run again, it stores nothing twice."""
    from perennial.feedback.formats.reading import Format, Reading
    from perennial.flows.cli_import import read_key, run_import

    if url and tenant != "default":
        raise click.UsageError("--tenant says nothing with --url: the API key names the app")
    key = read_key(key_env) if key_env else None
    reading = Reading(task=task or settings.task, format=Format(format_), scale=scale)
    if not run_import(settings, file, reading, tenant=tenant, url=url, key=key, is_dry=is_dry):
        sys.exit(1)


@main.command()
@_with_settings
def doctor(settings: Settings) -> None:
    """Examine this machine and say how to mend what is found."""
    from perennial.flows.cli_show import show_findings
    from perennial.flows.doctor import examine

    if show_findings(examine(settings)):
        sys.exit(1)


@main.command()
@click.option("--markdown", is_flag=True, help="The table of docs/configuration.md.")
@_with_settings
def config(settings: Settings, markdown: bool) -> None:
    """Show every setting: its value now, its default and what it means."""
    from perennial.flows.cli_settings import settings_table, show_settings

    click.echo(settings_table()) if markdown else show_settings(settings)


@main.command()
@click.option("--home", type=click.Path(path_type=Path), help="Folder of the demo's state.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures there.")
@click.option("--keep", is_flag=True, help="Leave the services up until Ctrl-C.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the trainings.")
@_with_settings
def demo(
    settings: Settings, home: Path | None, json_file: Path | None, keep: bool, seed: int
) -> None:
    """Watch a live model go stale, learn from its users, win against itself and go live."""
    from perennial.flows.demo import run_demo

    run_demo(home or settings.home / "demo", seed=seed, json_file=json_file, keep=keep)


@main.command()
@click.option("--round", "round_id", metavar="ID", help="Round to try on; by default the newest.")
@click.option("--lr", help="Learning rates, with commas; half, same and double by default.")
@click.option("--epochs", help="Epochs, with commas; half, same and 1.5 times by default.")
@click.option(
    "--budget", default="60m", show_default=True, help="Time for all trials, such as 90s or 2h."
)
@click.option(
    "--max-drift",
    type=click.FloatRange(0),
    default=0.02,
    show_default=True,
    help="Rise of the general NLL over the parent's that is allowed, nats a token.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of results, tune/ beside the round's rows by default; it goes on there.",
)
@_with_settings
def tune(
    settings: Settings,
    round_id: str | None,
    lr: str | None,
    epochs: str | None,
    budget: str,
    max_drift: float,
    out: Path | None,
) -> None:
    """Choose learning rate and epochs on the rows of a round; may be killed and run again.

    Writes result.json and front.png into --out.
    """
    from perennial.flows.cli_tune import read_request, run_tune

    request = read_request(
        round_id=round_id, lr=lr, epochs=epochs, budget=budget, max_drift=max_drift, out=out
    )
    run_tune(settings, request)


@main.group()
def bench() -> None:
    """Measure what the recipe learns and what it forgets, on streams of your own."""


@bench.command("continual")
@click.option(
    "--stream",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with 01-name.train.jsonl and 01-name.test.jsonl for each round.",
)
@click.option(
    "--general",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="General rows that drift is measured on, never trained.",
)
@click.option(
    "--general-replay",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="General rows that arms may train on; training.general_file or the packaged by default.",
)
@click.option(
    "--arms",
    default="naive,replay-same-tokens,full,joint,single",
    show_default=True,
    help="Which ways to train, with commas; the base model is always measured.",
)
@click.option("--seeds", default="0", show_default=True, help="Seeds, with commas.")
@click.option(
    "--order",
    default="given",
    show_default=True,
    help="Of the rounds: given, reversed, or given,reversed.",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    help="At most so many rows of every file of the stream and of --general, spread over it.",
)
@click.option(
    "--test-rows",
    type=click.IntRange(1),
    help="The same of every test file and of --general; --rows by default.",
)
@click.option(
    "--grader",
    "graders",
    multiple=True,
    metavar="TASK=GRADER",
    help="Grade 01-name by exact, contains, rouge_l or json_fields; by its answers by default.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of results; the same one again goes on where it stopped.",
)
@_with_settings
def continual(
    settings: Settings,
    stream: Path,
    general: Path,
    general_replay: Path | None,
    arms: str,
    seeds: str,
    order: str,
    rows: int | None,
    test_rows: int | None,
    graders: tuple[str, ...],
    out: Path,
) -> None:
    """Train a stream of tasks round after round and show what is kept; may be killed and run again.

    Writes result.json, index.html and plots into --out.
    """
    from perennial.flows.cli_bench import read_request, run_continual

    request = read_request(
        stream=stream,
        general=general,
        general_replay=general_replay,
        arms=arms,
        seeds=seeds,
        order=order,
        rows=rows,
        test_rows=test_rows,
        graders=graders,
        out=out,
    )
    run_continual(settings, request)


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
