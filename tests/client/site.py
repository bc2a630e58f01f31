"""A real feedback API on loopback that a test can stop, start again, and see fail."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_server

import uvicorn
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from perennial.feedback.admission import Admission, open_admission
from perennial.feedback.api import ApiDeps, create_app
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.keys import OPEN_TENANT, Authenticate, open_access
from perennial.feedback.records import Feedback, Interaction
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.infra.clock import utc_now
from perennial.infra.db import Database, create_all


def wait_until(is_true: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.01)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What a caller gets in place of an answer; `is_late` when the app has acted before."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    is_late: bool = False


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A request as it arrived."""

    path: str
    key: str | None
    at_s: float


class Site:
    """The API over one SQLite file; what is stored outlives `stop` and `start`."""

    def __init__(self, folder: Path) -> None:
        self.faults: deque[Fault] = deque()
        self.seen: list[Seen] = []
        self.authenticate: Authenticate = open_access()
        self.admission: Admission = open_admission()
        self._database = Database(f"sqlite:///{folder}/p.db")
        create_all(self._database)
        self._store = SqlFeedbackStore(self._database, utc_now)
        with create_server(("127.0.0.1", 0)) as listener:
            self._address: tuple[str, int] = listener.getsockname()
        self.url = f"http://127.0.0.1:{self._address[1]}"

    def start(self) -> None:
        store = self._store
        deps = ApiDeps(
            store=store,
            committer=GroupCommitter(store.write),
            authenticate=self.authenticate,
            admission=self.admission,
        )
        self._app = create_app(deps)
        config = uvicorn.Config(self._answer, interface="asgi3", log_level="warning")
        self._server = uvicorn.Server(config)
        sockets = [create_server(self._address)]
        self._thread = threading.Thread(target=self._server.run, args=[sockets], daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)

    def close(self) -> None:
        self._database.dispose()

    def interactions(self) -> list[Interaction]:
        return list(self._store.list_interactions(OPEN_TENANT, 0, 10_000).items)

    def feedback(self) -> list[Feedback]:
        return list(self._store.list_feedback(OPEN_TENANT, 0, 10_000).items)

    def comments(self) -> list[str]:
        """The texts of the stored comments, sorted."""
        return sorted(getattr(each.signal, "text", "") for each in self.feedback())

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = None
        if scope["type"] == "http":
            key = dict(scope["headers"]).get(b"idempotency-key")
            seen = Seen(path=scope["path"], key=key and key.decode(), at_s=time.monotonic())
            self.seen.append(seen)
            fault = self.faults.popleft() if self.faults else None
        if fault is None:
            await self._app(scope, receive, send)
            return
        if fault.is_late:
            await self._app(scope, receive, _lost)
        else:
            while (await receive()).get("more_body"):
                pass
        response = Response(fault.text, fault.status, headers=dict(fault.headers))
        await response(scope, receive, send)


async def _lost(_message: Message) -> None:
    pass
