"""Erasure on disk: what the rounds kept of people whose feedback is gone from the store.

The store is emptied by the API at once; files follow here, before the next round begins. What an
adapter has learned stays in it: `VersionStore.versions_trained_on` names those, and a rebuild from
the base on what is left is the way out. Pages in MLflow are left to who keeps them.
"""

import json
import logging
import shutil
from collections.abc import Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perennial.flows.steps import transient_task
from perennial.flows.wiring import Deps
from perennial.infra.artifacts import MANIFEST, seal, write_atomic
from perennial.infra.errors import UnavailableError
from perennial.infra.locks import hold
from perennial.training.examples import read_jsonl

log = logging.getLogger(__name__)


@transient_task("erase")
def withdraw_erased(deps: Deps) -> int:
    """How many rounds held rows of erased feedback, and hold none now.

    Reports of checks that were made before the last erasure go too, whoever's texts they quote.
    Looks again at the next call while a worker of this machine is inside a round.
    """
    erased_at = deps.feedback.last_erased_at()
    if erased_at is None:
        return 0
    try:
        with hold(deps.settings.home / "run" / "round.lock", timeout_s=0):
            _drop_reports(deps.settings.home / "checks", erased_at)
            return _withdraw(deps, deps.feedback.erased_feedback())
    except UnavailableError as error:
        log.info("erasure waits: %s", error)
        return 0


def _drop_reports(checks: Path, erased_at: datetime) -> None:
    for folder in [path for path in checks.glob("*") if path.is_dir()]:
        if _made_at(folder) <= erased_at:
            # Under a name that goes at the next call, should this one be killed on the way.
            shutil.rmtree(folder.rename(folder.with_name(f"erased-{folder.name}")))
            log.info("report from before an erasure deleted check=%s", folder.name)


def _made_at(report: Path) -> datetime:
    """When the check was made; long ago where nothing says so.

    One that is being drawn now says nothing yet: its folder was just written to.
    """
    try:
        scores = json.loads((report / "scores.json").read_bytes())
        return datetime.fromisoformat(scores["checked_at"])
    except (OSError, ValueError, KeyError):
        is_partial = report.name.startswith(".partial-")
        return datetime.fromtimestamp(report.stat().st_mtime if is_partial else 0, UTC)


def _withdraw(deps: Deps, erased: Set[str]) -> int:
    rounds = deps.settings.home / "rounds"
    for partial in rounds.glob("*/.partial-data-*"):  # all rows, of a curation that was killed
        shutil.rmtree(partial)
    folders = sorted(rounds.glob("*/data"))
    held = [folder for folder in folders if _holds(folder, erased)]
    if held:
        shutil.rmtree(deps.settings.model.cache_dir / "trunk", ignore_errors=True)
    for folder in held:
        _clean(deps, folder, erased)
        log.info("erased rows withdrawn round=%s", folder.parent.name)
    return len(held)


def _holds(data: Path, erased: Set[str]) -> bool:
    """Whether a row of the round is to go, or a run that took rows out was killed on the way."""
    return not (data / MANIFEST).exists() or any(
        _is_of(row, erased) for path in data.rglob("*.jsonl") for row in read_jsonl(path)
    )


def _clean(deps: Deps, data: Path, erased: Set[str]) -> None:
    """The round without the rows, what was computed of them, and the page that quotes them."""
    shutil.rmtree(data.parent / "train" / "teachers", ignore_errors=True)
    shutil.rmtree(data.parent / "tune", ignore_errors=True)
    for folder in data.parent.glob("evaluation-*"):
        shutil.rmtree(folder)
    (data / MANIFEST).unlink(missing_ok=True)
    for path in data.rglob("*.jsonl"):
        kept = [row for row in read_jsonl(path) if not _is_of(row, erased)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_atomic(path, lines.encode())
    deps.evaluations.erase_answers(data.parent.name, but=_asked(data))
    write_atomic(data / "diff.md", b"Rows of this round were erased, and this page with them.\n")
    seal(data)


def _asked(data: Path) -> frozenset[str]:
    """Ids of the rows that the round is still judged on."""
    suites = (data / "suites").glob("*.jsonl")
    return frozenset(row["id"] for path in suites for row in read_jsonl(path))


def _is_of(row: Any, erased: Set[str]) -> bool:  # Any: a row as JSON
    return any(event in erased for event, _ in row.get("origins", ()))
