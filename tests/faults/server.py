"""The server under test: the feedback API alone, and the ways in which it can die or lie.

`build_app` is all that knows how the API is composed. Deaths and lies are hung on SQLite and on
ASGI, not on our functions, so that they judge every implementation alike.

`main` runs in a process of its own, which `harness` starts and kills.
"""

import argparse
import asyncio
import ctypes
import json
import os
import signal
import socket
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perennial.feedback.api import ApiDeps, create_app
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.connections import serve
from perennial.feedback.keys import open_access
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.infra.clock import Clock, new_id, utc_now
from perennial.infra.db import Database
from perennial.infra.migrate import upgrade

CLONE_NEWNS = 0x20000


def build_app(database: Database, clock: Clock = utc_now) -> FastAPI:
    """The API over a migrated store, as production composes it."""
    store = SqlFeedbackStore(database, clock)
    committer = GroupCommitter(store.write)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        committer.close()

    access = open_access()
    return create_app(
        ApiDeps(store=store, committer=committer, authenticate=access, lifespan=lifespan)
    )


def main(url: str, port: int, log: Path, options: Sequence[str]) -> None:
    """Serve until stopped, killed or dead by its own hand."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--die", default="never:0", help="ack:K, or the start of a statement :K")
    parser.add_argument("--mutant", default="none", choices=["none", "sync-off", *MUTANTS])
    parser.add_argument("--mounts", help="a shell script, for mounts that only this process sees")
    args = parser.parse_args(options)
    _write_to(log)
    if args.mounts:
        _mount(args.mounts)
    point, _, k = args.die.partition(":")
    if args.mutant == "sync-off":
        _on_connect(_without_sync)
    if point not in ("never", "ack"):
        trace = _dying_trace(point, int(k))
        _on_connect(lambda connection: connection.set_trace_callback(trace))
    upgrade(url)
    database = Database(url)
    app: ASGIApp = MUTANTS.get(args.mutant, _as_it_is)(build_app(database))
    if point == "ack":
        app = dying_at_ack(app, int(k))
    with database.as_only_ingest(), socket.create_server(("127.0.0.1", port)) as listener:
        serve(app, listener)


def _write_to(log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _mount(script: str) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "cannot leave the mounts of others")
    subprocess.run(["sh", "-ec", f"mount --make-rprivate /; {script}"], check=True)


def _on_connect(prepare: Callable[[sqlite3.Connection], object]) -> None:
    """Have `prepare` called with each SQLite connection of this process, whoever opens it."""
    real = sqlite3.connect

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = real(*args, **kwargs)
        prepare(connection)
        return connection

    sqlite3.connect = sqlite3.dbapi2.connect = connect  # type: ignore[assignment]  # this process is the victim


def _dying_trace(point: str, k: int) -> Callable[[str], None]:
    """SIGKILL to this process as SQLite begins the k-th statement that starts with `point`."""
    seen = count(1)

    def trace(statement: str) -> None:
        if statement.lstrip().startswith(point) and next(seen) == k:
            os.kill(os.getpid(), signal.SIGKILL)

    return trace


def dying_at_ack(app: ASGIApp, k: int) -> ASGIApp:
    """`app`, killed when the k-th write is stored and its answer not yet sent."""
    seen = count(1)

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_or_die(message: Message) -> None:
            is_ack = message["type"] == "http.response.start" and message["status"] < 300
            if is_ack and scope["method"] == "POST" and next(seen) == k:
                os.kill(os.getpid(), signal.SIGKILL)
            await send(message)

        await app(scope, receive, send_or_die)

    return call


def ack_first(app: ASGIApp) -> ASGIApp:
    """A mutant that answers a post at once and stores it in a detached task."""
    tasks: set[asyncio.Future[None]] = set()

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        message = await receive()
        body = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]

        async def receive_again() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def drop(_: Message) -> None:
            pass

        task = asyncio.ensure_future(app(scope, receive_again, drop))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        content = json.dumps({"id": json.loads(body).get("id", new_id("fb"))}).encode()
        headers = [(b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return call


def forget_key(app: ASGIApp) -> ASGIApp:
    """A mutant that loses the idempotency key."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kept = [pair for pair in scope["headers"] if pair[0] != b"idempotency-key"]
            scope = {**scope, "headers": kept}
        await app(scope, receive, send)

    return call


def _as_it_is(app: ASGIApp) -> ASGIApp:
    return app


def _without_sync(connection: sqlite3.Connection) -> None:
    """A mutant: `synchronous=OFF`, and deaf to whoever would turn it on."""

    def deaf(action: int, name: str | None, *_: str | None) -> int:
        is_sync = action == sqlite3.SQLITE_PRAGMA and name == "synchronous"
        return sqlite3.SQLITE_IGNORE if is_sync else sqlite3.SQLITE_OK

    connection.execute("PRAGMA synchronous=OFF")
    connection.set_authorizer(deaf)


MUTANTS = {"ack-first": ack_first, "forget-key": forget_key}
