"""Makes MLflow's aliases show what the database says, and notes when somebody moved one.

Run at start-up, after each change and now and then; running it twice changes nothing. MLflow is
reached through a protocol, so that this module does not import it.
"""

import logging
from typing import Protocol

from perennial.registry.champion import ChampionStore, Outbox

log = logging.getLogger(__name__)


class Change(Protocol):
    """An alias that was set right."""

    @property
    def alias(self) -> str:
        """Its name."""

    @property
    def was(self) -> str | None:
        """The number that it showed before."""

    @property
    def now(self) -> str | None:
        """The number that it shows now."""


class Aliases(Protocol):
    """Where aliases are kept."""

    def set_aliases(
        self, task: str, champion: str | None, previous: str | None
    ) -> tuple[Change, ...]:
        """What had to be changed so that both show these versions."""


def reconcile(
    task: str, champions: ChampionStore, outbox: Outbox, aliases: Aliases
) -> tuple[Change, ...]:
    """The aliases that had to be set right.

    Raises:
        UnavailableError: MLflow or the database does not answer; what is not told stays noted.
    """
    # Read before the champion: a change that comes in between is told twice, never left out.
    pending = outbox.newest_pending(task)
    champion = champions.current(task)
    live = None if champion is None else champion.version
    changes = aliases.set_aliases(task, live, champions.previous(task))
    if pending is not None:
        outbox.mark_done(task, pending)
    for change in changes:
        level = logging.INFO if pending is not None else logging.WARNING
        event = "alias follows" if pending is not None else "alias moved by hand, put back"
        log.log(
            level, "%s task=%s alias=%s was=%s now=%s",
            event, task, change.alias, change.was, change.now,
        )  # fmt: skip
    return changes
