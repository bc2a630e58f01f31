"""The app in a real server process, killed while clients post."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.infra.clock import utc_now
from perennial.infra.db import Database, create_all

SERVER = """
import socket, sys
import uvicorn
from perennial.feedback.api import ApiDeps, create_app
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.keys import open_access
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.infra.clock import utc_now
from perennial.infra.db import Database

store = SqlFeedbackStore(Database(sys.argv[1]), utc_now)
app = create_app(ApiDeps(
    store=store, committer=GroupCommitter(store.write), authenticate=open_access()
))
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
"""
FEEDBACK = {
    "target": {"interaction_id": "int_unknown"},
    "signal": {"kind": "correction", "text": "Three years."},
}
NUM_CLIENTS = 4


@contextmanager
def _server(url: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", SERVER, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            base = f"http://127.0.0.1:{int(process.stdout.readline())}"
            yield process, base
        finally:
            process.kill()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/p.db")
    create_all(database)
    yield database
    database.dispose()


def _url(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


@pytest.mark.slow
def test_server_answers_and_refuses_oversize_without_dying(database: Database) -> None:
    with _server(_url(database)) as (process, base), httpx.Client(base_url=base) as client:
        created = client.post("/v1/feedback", json=FEEDBACK)
        big = b" " * (8 << 20)
        for content in (big, (big[i : i + 65_536] for i in range(0, len(big), 65_536))):
            try:
                answer = client.post(
                    "/v1/feedback", content=content, headers={"Content-Type": "application/json"}
                )
                assert answer.status_code == 413
            except httpx.WriteError:
                pass  # the server answered and hung up while the client was still sending
        again = client.get(f"/v1/feedback/{created.json()['id']}")

        assert (created.status_code, again.status_code) == (201, 200)
        assert process.poll() is None


class Clients:
    """Threads that post feedback with fresh keys until the server is gone."""

    def __init__(self, base: str, name: str) -> None:
        self.sent: dict[str, str | None] = {}
        self._threads = [
            threading.Thread(target=self._post, args=(base, f"{name}-{i}"))
            for i in range(NUM_CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def num_acknowledged(self) -> int:
        return sum(id is not None for id in self.sent.copy().values())

    def _post(self, base: str, name: str) -> None:
        with httpx.Client(base_url=base) as client:
            for i in range(10_000):
                key = f"{name}-{i}"
                self.sent[key] = None
                try:
                    answer = client.post(
                        "/v1/feedback", json=FEEDBACK, headers={"Idempotency-Key": key}
                    )
                except httpx.TransportError:
                    return
                assert answer.status_code == 201, answer.text
                self.sent[key] = answer.json()["id"]


@pytest.mark.slow
def test_killed_server_has_kept_every_acknowledged_row_once(database: Database) -> None:
    sent: dict[str, str | None] = {}
    for round_ in range(3):
        with _server(_url(database)) as (process, base):
            clients = Clients(base, f"k{round_}")
            deadline = time.monotonic() + 60
            while clients.num_acknowledged() < 40:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            clients.join()
            sent |= clients.sent

    store = SqlFeedbackStore(database, utc_now)
    kept = {item.id for item in store.list_feedback("default", 0, 100_000).items}
    acknowledged = {id for id in sent.values() if id is not None}
    assert len(acknowledged) >= 120
    assert acknowledged <= kept

    with _server(_url(database)) as (_, base), httpx.Client(base_url=base) as client:
        for key, id in sent.items():
            answer = client.post("/v1/feedback", json=FEEDBACK, headers={"Idempotency-Key": key})
            assert answer.status_code in ((200,) if id else (200, 201))
            assert id is None or answer.json()["id"] == id

    assert len(store.list_feedback("default", 0, 100_000).items) == len(sent)
