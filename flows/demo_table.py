"""The figures of the demo, each computed from rows in the store, and how they are shown."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from perennial.feedback.records import Interaction
from perennial.flows.demo_desk import Desk, Fact, is_right, is_stale
from perennial.flows.detect import BEGINNING
from perennial.flows.mapping import PROBE_TAG
from perennial.flows.up import urls
from perennial.flows.wiring import Deps, connect
from perennial.infra.settings import Settings
from perennial.registry.champion import Change
from perennial.registry.evaluations import Evaluation
from perennial.registry.stats import wilson

_MEASURES = ("act1_base", "act1_after_round1", "act1_after_round2", "act2_before",
             "act2_after_round2")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A share of `n` answers with its 95% Wilson interval."""

    share: float
    n: int
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What the demo measured; `general_nll_delta` in nats per token, last champion minus base."""

    shares: dict[str, Share]
    general_nll_delta: float
    promotions: tuple[Change, ...]
    wall_s: float
    peak_rss_mb: float


def compute(settings: Settings, desk: Desk, *, wall_s: float, peak_rss_mb: float) -> Figures:
    """The figures, from interactions, evaluation rows and the live log."""
    facts = {fact.id: fact for fact in (*desk.act1, *desk.act2)}
    with connect(settings) as deps:
        now = deps.feedback.horizon()
        rows = deps.feedback.interactions_between(settings.task, BEGINNING, now, 100_000)
        shares = {name: _share([_is_right(r, facts) for r in _of(rows, name)])
                  for name in _MEASURES}  # fmt: skip
        changed = {fact.id for fact in desk.changed}
        asked = [r for r in _of(rows, "act2_after_round2") if r.tags["fact"] in changed]
        shares["stale_after_round2"] = _share(
            [is_stale(r.completion, facts[r.tags["fact"]]) for r in asked]
        )
        return Figures(
            shares=shares,
            general_nll_delta=_general_nll_delta(deps),
            promotions=tuple(reversed(deps.champions.history(settings.task))),
            wall_s=wall_s,
            peak_rss_mb=peak_rss_mb,
        )


def to_json(figures: Figures) -> dict[str, Any]:  # Any: JSON
    """The figures as documented for `perennial demo --json`."""
    return {
        **{name: asdict(share) for name, share in figures.shares.items()},
        "general_nll_delta": figures.general_nll_delta,
        "promotions": [
            {"version": c.version, "at": c.at.isoformat(), "decided_by": c.decided_by}
            for c in figures.promotions
        ],
        "wall_s": round(figures.wall_s, 1),
        "peak_rss_mb": round(figures.peak_rss_mb),
    }


def render(figures: Figures, settings: Settings, *, are_services_up: bool) -> Group:
    """The table, what was live when, and where to look."""
    table = Table(title="Held-out paraphrases, asked over HTTP, right by the grader")
    for name in ("", "before", "after round 1", "after round 2"):
        table.add_column(name, justify="left" if not name else "right")
    shares = figures.shares
    table.add_row("act 1: the desk", *(_cell(shares[f"act1_{when}"])
                  for when in ("base", "after_round1", "after_round2")))  # fmt: skip
    table.add_row("act 2: launch and new policy", _cell(shares["act2_before"]), "",
                  _cell(shares["act2_after_round2"]))  # fmt: skip
    table.add_row("answers with the old policy", "", "", _cell(shares["stale_after_round2"]))
    nll = f"{figures.general_nll_delta:+.3f} nats/token"
    table.add_row("general text, NLL against base", "", "", nll)
    live = Table("live since", "version", "by", box=None)
    for change in figures.promotions:
        live.add_row(f"{change.at.astimezone():%H:%M:%S}", change.version, change.decided_by)
    return Group(
        table,
        live,
        Text(f"\n{figures.wall_s:.0f} s, at most {figures.peak_rss_mb:.0f} MB of memory\n"),
        _places(settings, are_services_up=are_services_up),
    )


def _places(settings: Settings, *, are_services_up: bool) -> Table:
    if are_services_up:
        return urls(settings)
    table = Table(show_header=False, box=None)
    table.add_row("drift reports (open in a browser)", str(settings.home / "checks"))
    table.add_row("training rows, adapters, scores", str(settings.home / "rounds"))
    table.add_row("logs of every service", str(settings.home / "logs"))
    table.add_row(
        "see it again",
        f"PERENNIAL_HOME={settings.home} PERENNIAL_TASK={settings.task} perennial up",
    )
    return table


def _of(rows: Sequence[Interaction], label: str) -> list[Interaction]:
    return [row for row in rows if row.tags.get(PROBE_TAG) == label]


def _is_right(row: Interaction, facts: dict[str, Fact]) -> bool:
    return is_right(row.completion, facts[row.tags["fact"]])


def _share(outcomes: Sequence[bool]) -> Share:
    interval = wilson(sum(outcomes), len(outcomes))
    share = sum(outcomes) / len(outcomes) if outcomes else math.nan
    return Share(share=share, n=len(outcomes), low=interval.low, high=interval.high)


def _cell(share: Share) -> str:
    return f"{share.share:.0%} [{share.low:.0%}, {share.high:.0%}] n={share.n}"


def _general_nll_delta(deps: Deps) -> float:
    """Mean NLL of the last candidate on general rows minus that of the base model."""
    rounds = sorted(deps.ledger.list_rounds(deps.settings.task), key=lambda r: r.number)
    if not rounds:
        return math.nan
    champion = deps.champions.current(deps.settings.task)
    before = _nll(deps.evaluations.rows(rounds[0].id, suite="general", version="base"))
    live = champion.version if champion else "base"
    after = _nll(deps.evaluations.rows(rounds[-1].id, suite="general", version=live))
    return after - before


def _nll(rows: Sequence[Evaluation]) -> float:
    known = [row.nll for row in rows if row.nll is not None]
    return sum(known) / len(known) if known else math.nan
