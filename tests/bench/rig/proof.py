"""What was acknowledged is in the database, exactly once: compared event by event after a run."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rig.events import item_marker
from sqlalchemy import select

from perennial.feedback.tables import FeedbackRow, InteractionRow
from perennial.infra.db import Database

_SHOWN = 5


class BrokenPromise(Exception):
    """An acknowledged event is missing, is there twice, or has another id than was said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """`num_unacked` rows are stored though no 2xx was seen: the client would have asked again."""

    num_acked: int
    num_unacked: int


def prove(url: str, ledgers: Sequence[Path]) -> Proof:
    """Compare the ledgers of all runs against a database with its rows.

    Raises:
        BrokenPromise: with the first few events that are wrong.
    """
    acked = dict(pair for ledger in ledgers for pair in _acked(ledger))
    rows = list(_stored(url))
    times = Counter(marker for marker, _ in rows)
    stored = dict(rows)
    lost = [marker for marker in acked if marker not in stored]
    twice = [marker for marker, count in times.items() if count > 1]
    other = [m for m, id_ in acked.items() if m in stored and stored[m] != id_]
    if lost or twice or other:
        raise BrokenPromise(
            f"{url}: of {len(acked)} acknowledged events {len(lost)} are lost {lost[:_SHOWN]}, "
            f"{len(twice)} are stored twice {twice[:_SHOWN]}, "
            f"{len(other)} have another id than was answered {other[:_SHOWN]}"
        )
    return Proof(num_acked=len(acked), num_unacked=len(stored) - len(acked))


def _acked(ledger: Path) -> Iterator[tuple[str, str]]:
    with ledger.open(encoding="utf-8") as lines:
        for line in lines:
            marker, text = json.loads(line)
            body = json.loads(text)
            if "items" not in body:
                yield marker, body["id"]
                continue
            for item in body["items"]:
                if item["status"] in (200, 201):
                    yield item_marker(marker, item["index"]), item["feedback"]["id"]


def _stored(url: str) -> Iterator[tuple[str, str]]:
    database = Database(url)
    with database.read() as session:
        for table in (FeedbackRow, InteractionRow):
            query = select(table.id, table.tags).execution_options(yield_per=5000)
            for id_, tags in session.execute(query):
                if "event" in tags:  # the interactions that events are about have none
                    yield tags["event"], id_
    database.dispose()
