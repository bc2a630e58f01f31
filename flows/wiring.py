"""The only place where adapters are chosen: settings in, everything that flows need out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perennial.feedback.redact import Redact, presidio_redactor, redact, redact_for, redact_nothing
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.feedback.store import FeedbackStore
from perennial.infra.clock import Clock, utc_now
from perennial.infra.db import Database
from perennial.infra.migrate import upgrade
from perennial.infra.settings import (
    RedactionSettings,
    Settings,
    apply_process_defaults,
    load_process_settings,
)
from perennial.monitoring.check_store import SqlCheckStore
from perennial.registry.approvals import Approvals
from perennial.registry.champion import ChampionStore, Outbox
from perennial.registry.evaluations import EvaluationStore
from perennial.registry.rounds import Ledger
from perennial.registry.server import client_environment
from perennial.registry.version_store import VersionStore

if TYPE_CHECKING:
    from perennial.registry.mlflow_store import MlflowStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Deps:
    """What flows and commands stand on."""

    settings: Settings
    clock: Clock
    feedback: FeedbackStore
    checks: SqlCheckStore
    ledger: Ledger
    versions: VersionStore
    evaluations: EvaluationStore
    champions: ChampionStore
    outbox: Outbox
    approvals: Approvals

    def mlflow(self) -> "MlflowStore":
        """MLflow's registry; its import takes seconds, so only who needs it pays."""
        from perennial.registry.mlflow_store import MlflowStore

        return MlflowStore(self.settings.mlflow_url)


@contextmanager
def connect(settings: Settings | None = None) -> Iterator[Deps]:
    """Everything over a migrated store, until the block ends."""
    chosen = settings or load_process_settings()
    apply_process_defaults(chosen, client_environment())
    upgrade(chosen.resolved_database_url)
    database = Database(chosen.resolved_database_url)
    try:
        yield make_deps(chosen, database, utc_now)
    finally:
        database.dispose()


def choose_redaction(redaction: RedactionSettings) -> Redact:
    """What is done to every record before it is written."""
    if not redaction.enabled:
        return redact_nothing
    redactor = presidio_redactor() if redaction.engine == "presidio" else redact
    return redact_for(frozenset(redaction.off_for), redactor)


def make_deps(settings: Settings, database: Database, clock: Clock) -> Deps:
    """Adapters over one database."""
    return Deps(
        settings=settings,
        clock=clock,
        feedback=SqlFeedbackStore(database, clock),
        checks=SqlCheckStore(database, clock),
        ledger=Ledger(database, clock),
        versions=VersionStore(database, clock),
        evaluations=EvaluationStore(database, clock),
        champions=ChampionStore(database, clock),
        outbox=Outbox(database, clock),
        approvals=Approvals(database, clock),
    )
