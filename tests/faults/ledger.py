"""Clients that write down what they sent and what they were promised, and the audit of both.

A promise is a 2xx. After whatever happened to the server, the audit asks: is every promised row
there, is any row there twice, is there a row that nobody sent? An event is a function of its key,
and carries the key in its text, so the audit trusts no column that the server chose.
"""

import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from sqlalchemy import select, text

from perennial.feedback.tables import FeedbackRow, InteractionRow
from perennial.infra.db import Database
from tests.faults.harness import until
from tests.faults.wire import Answer, Wire

PAUSE_S = 0.05
PATIENCE_S = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One post."""

    key: str
    path: str
    body: Mapping[str, Any]


@dataclass(kw_only=True)
class Ledger:
    """Every key that was sent, the id that was promised for it, and what should not have been."""

    sent: set[str] = field(default_factory=set)
    promised: dict[str, str] = field(default_factory=dict)
    refused: Counter[int] = field(default_factory=Counter)
    num_broken: int = 0
    faults: list[str] = field(default_factory=list)

    def note(self, key: str, answer: Answer) -> bool:
        """Whether `answer` promised; a refusal must say when to come back."""
        if answer.status in (200, 201):
            is_replay = answer.headers.get("idempotency-replayed") == "true"
            if is_replay != (answer.status == 200):
                self.faults.append(f"{key}: {answer.status}, but replayed is {is_replay}")
            self.promise(key, answer.json()["id"])
            return True
        self.refused[answer.status] += 1
        if answer.status not in (429, 503):
            self.faults.append(f"{key}: {answer.status} {answer.body[:300]!r}")
        elif not _is_kind_refusal(answer):
            self.faults.append(f"{key}: a refusal without Retry-After: {answer.headers}")
        return False

    def note_batch(self, keys: Sequence[str], answer: Answer) -> Sequence[str]:
        """The keys that are still without a promise."""
        if answer.status != 200:
            self.note(keys[0], answer)
            return keys
        items = answer.json()["items"]
        if [item["index"] for item in items] != list(range(len(keys))):
            self.faults.append(f"{keys[0]}: not one status for each of {len(keys)} items")
        for key, item in zip(keys, items, strict=False):
            if item["status"] in (200, 201):
                self.promise(key, (item.get("feedback") or item["interaction"])["id"])
            else:
                self.faults.append(f"{key}: {item}")
        return ()

    def promise(self, key: str, id: str) -> None:
        """An event is stored as `id`, the server says."""
        if self.promised.setdefault(key, id) != id:
            self.faults.append(f"{key}: promised {self.promised[key]}, then {id}")


def event(key: str) -> Event:
    """The event of `key`, `CLIENT-N`: an interaction, or feedback on the next or the last one."""
    client, _, number = key.rpartition("-")
    n = int(number)
    if n % 2 == 0:
        return Event(key=key, path="/v1/interactions", body=_interaction(key))
    about = n + 1 if n % 4 == 1 else n - 1
    body = {
        "target": {"interaction_id": f"int-{client}-{about}"},
        "signal": {"kind": "correction", "text": key},
    }
    return Event(key=key, path="/v1/feedback", body=body)


def send(wire: Wire, sent: Event) -> Answer:
    return wire.post(sent.path, sent.body, {"Idempotency-Key": sent.key})


class Client(threading.Thread):
    """Posts events, one or `2 * size` at a time, each until promised, whatever the server does."""

    def __init__(
        self, name: str, port: int, ledger: Ledger, enough: threading.Event, size: int
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._port = port
        self._ledger = ledger
        self._enough = enough
        self._size = size
        self._hopeless = threading.Event()
        self._wire: Wire | None = None

    def run(self) -> None:
        try:
            self._post_until_enough()
        except BaseException as error:
            self._ledger.faults.append(f"{self.name}: {error!r}")
            raise
        finally:
            self._hang_up()

    def give_up(self) -> None:
        """Leave the events at hand without their promise."""
        self._hopeless.set()

    def _post_until_enough(self) -> None:
        for first in count(0, 4 * self._size):
            if self._enough.is_set() or self._hopeless.is_set():
                break
            # Of four events in a row each feedback has its interaction.
            keys = [f"{self.name}-{n}" for n in range(first, first + 4 * self._size)]
            if self._size == 1:
                for key in keys:
                    self._deliver([key])
            else:
                self._deliver(keys[1::2])
                self._deliver(keys[::2])

    def _deliver(self, keys: Sequence[str]) -> None:
        self._ledger.sent.update(keys)
        while keys and not self._hopeless.is_set():
            try:
                keys = self._post(keys)
            except OSError:
                self._ledger.num_broken += self._wire is not None
                self._hang_up()
            if keys:
                self._hopeless.wait(PAUSE_S)

    def _post(self, keys: Sequence[str]) -> Sequence[str]:
        """The keys that are still without a promise."""
        self._wire = self._wire or Wire(self._port)
        if self._size == 1:
            is_promised = self._ledger.note(keys[0], send(self._wire, event(keys[0])))
            return () if is_promised else keys
        items = [{**event(key).body, "idempotency_key": key} for key in keys]
        answer = self._wire.post(f"{event(keys[0]).path}/batch", {"items": items})
        return self._ledger.note_batch(keys, answer)

    def _hang_up(self) -> None:
        if self._wire is not None:
            self._wire.close()
        self._wire = None


@contextmanager
def load(
    port: int, ledger: Ledger, name: str, num_clients: int = 4, size: int = 1
) -> Iterator[None]:
    """Clients post while the block runs; then each finishes, for which the server must be up."""
    enough = threading.Event()
    clients = [Client(f"{name}{i}", port, ledger, enough, size) for i in range(num_clients)]
    for client in clients:
        client.start()
    try:
        yield
    except BaseException:
        for client in clients:
            client.give_up()
        raise
    finally:
        enough.set()
        for client in clients:
            client.join(PATIENCE_S)
            if client.is_alive():
                ledger.faults.append(f"{client.name}: no promise in {PATIENCE_S} s")
                client.give_up()


def wait_for_promises(ledger: Ledger, num_more: int) -> None:
    enough = len(ledger.promised) + num_more
    until(lambda: len(ledger.promised) >= enough)


def wait_for_refusals(ledger: Ledger, num_more: int) -> None:
    enough = ledger.refused[503] + num_more
    until(lambda: ledger.refused[503] >= enough)


def audit(ledger: Ledger, url: str) -> list[str]:
    """What is wrong: nothing, if each promise was kept once and nothing else is there."""
    database = Database(url)
    rows = [*stored(database)]
    ids: dict[str, str] = dict(rows)
    times = Counter(key for key, _ in rows)
    found = list(ledger.faults)
    found += [f"{key}: promised and lost" for key in ledger.promised.keys() - ids.keys()]
    found += [f"{key}: stored {n} times" for key, n in times.items() if n > 1]
    found += [f"{key}: stored, never sent" for key in ids.keys() - ledger.sent]
    found += [
        f"{key}: promised as {id}, stored as {ids[key]}"
        for key, id in ledger.promised.items()
        if ids.get(key, id) != id
    ]
    found += _broken(database)
    database.dispose()
    return found


def replay(ledger: Ledger, port: int, rng: random.Random, num: int = 50) -> list[str]:
    """What is wrong when some promised events are sent again: each must get its first id."""
    keys = rng.sample(sorted(ledger.promised), min(num, len(ledger.promised)))
    found = []
    with Wire(port) as wire:
        for key in keys:
            answer = send(wire, event(key))
            is_replay = answer.headers.get("idempotency-replayed") == "true"
            if answer.status != 200 or not is_replay or answer.json()["id"] != ledger.promised[key]:
                found.append(f"{key}: replayed as {answer.status} {answer.body[:200]!r}")
    return found


def stored(database: Database) -> Iterator[tuple[str, str]]:
    """The key and the id of each row."""
    with database.read() as session:
        for key, id in session.execute(select(InteractionRow.completion, InteractionRow.id)):
            yield key, id
        for signal, id in session.execute(select(FeedbackRow.signal, FeedbackRow.id)):
            yield signal["text"], id


def _interaction(key: str) -> dict[str, Any]:
    return {
        "id": f"int-{key}",
        "task": "support",
        "messages": [{"role": "user", "content": "How long is the warranty?"}],
        "completion": key,
        "model_version": "support-v1-0a1b2c3d",
    }


def _is_kind_refusal(answer: Answer) -> bool:
    is_problem = answer.headers.get("content-type") == "application/problem+json"
    return is_problem and answer.headers.get("retry-after", "").isdecimal()


def _broken(database: Database) -> Iterable[str]:
    """Feedback that waits for an interaction that is there, and damage to the file."""
    is_there = select(InteractionRow.id).where(
        InteractionRow.tenant == FeedbackRow.tenant,
        InteractionRow.id == FeedbackRow.target_interaction_id,
    )
    waiting = select(FeedbackRow.id).where(FeedbackRow.status == "pending", is_there.exists())
    with database.read() as session:
        yield from (f"{id}: not joined" for id in session.scalars(waiting))
        if database.dialect == "sqlite":
            verdicts = session.scalars(text("PRAGMA integrity_check"))
            yield from (f"damaged: {verdict}" for verdict in verdicts if verdict != "ok")
