"""What `perennial status`, `history` and `doctor` print."""

from collections.abc import Sequence
from datetime import datetime

import httpx
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from perennial.flows.doctor import Finding, Level
from perennial.flows.up import addresses
from perennial.flows.wiring import Deps, connect
from perennial.infra.settings import Settings

_MARKS = {Level.OK: "[green]ok[/green]", Level.WARN: "[yellow]warn[/yellow]",
          Level.BAD: "[red]bad[/red]"}  # fmt: skip


def show_status(settings: Settings) -> None:
    """Champion, last check with its reasons, rounds, pending approvals and URLs, at a glance."""
    console = Console()
    with connect(settings) as deps:
        console.print(Panel(_champion(deps), title=f"task {settings.task}", title_align="left"))
        console.print(_check(deps))
        console.print(_rounds(deps))
        for approval in deps.approvals.pending(settings.task):
            console.print(
                f"[yellow]waits for approval:[/yellow] {approval.version} since "
                f"{_when(approval.requested_at)}; read it in MLflow, then "
                f"`perennial approve {approval.version} --by NAME`"
            )
    console.print(_services(settings))


def show_history(settings: Settings) -> None:
    """What was live when, newest first."""
    table = Table("since", "live", "instead of", "by", "why", box=None)
    with connect(settings) as deps:
        for change in deps.champions.history(settings.task):
            table.add_row(
                _when(change.at),
                change.version or "base",
                change.previous or "base",
                f"{change.kind} by {change.decided_by}",
                "\n".join(change.reasons),
            )
    Console().print(
        table if table.row_count else "nothing was promoted yet: the base model is live"
    )


def show_findings(findings: Sequence[Finding]) -> bool:
    """Print findings with what mends them; whether one of them is bad."""
    table = Table("check", "", "seen", "what to do", box=None)
    for finding in findings:
        table.add_row(finding.name, _MARKS[finding.level], finding.seen, finding.mend)
    Console().print(table)
    return any(finding.level is Level.BAD for finding in findings)


def _champion(deps: Deps) -> str:
    champion = deps.champions.current(deps.settings.task)
    if champion is None:
        return f"live: the base model {deps.settings.model.name}; nothing was promoted yet"
    previous = deps.champions.previous(deps.settings.task) or "base"
    return (
        f"live: [bold]{champion.version}[/bold] since {_when(champion.since)}; "
        f"a rollback makes {previous} live"
    )


def _check(deps: Deps) -> str:
    check = deps.checks.latest(deps.settings.task)
    if check is None:
        return "no check yet; the schedule makes one, or `perennial check`"
    reasons = "\n".join(f"  - {reason.text}" for reason in check.reasons)
    return (
        f"last check {_when(check.created_at)}: [bold]{check.decision}[/bold]\n{reasons}\n"
        f"  report: {check.report_path}"
    )


def _rounds(deps: Deps) -> Table:
    table = Table("round", "opened", "state", "steps done", "why", box=None)
    for row in deps.ledger.list_rounds(deps.settings.task, 5):
        steps = ", ".join(deps.ledger.steps(row.id))
        table.add_row(
            str(row.number),
            _when(row.opened_at),
            row.state.value,
            steps,
            "; ".join(row.reasons) or row.reason,
        )
    return table


def _services(settings: Settings) -> Table:
    table = Table(show_header=False, box=None)
    for name, url, health in addresses(settings):
        table.add_row(name, url, "[green]up[/green]" if _is_up(health) else "[red]down[/red]")
    return table


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _when(at: datetime) -> str:
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
