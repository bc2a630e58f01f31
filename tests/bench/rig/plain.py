"""The control: feedback as a plain service takes it, one session and one commit for each request.

    python tests/bench/rig/plain.py URL

FastAPI, pydantic and SQLAlchemy over the tables of the product, with the same promise: a key may
come again, and an answer means that the row is on disk. It neither redacts nor limits nor checks a
key, so it does less. Prints one line of JSON when it listens.
"""

import argparse
import json
import socket
import sys
import threading
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Header
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from perennial.feedback.tables import FeedbackRow, InteractionRow
from perennial.infra.clock import new_id, utc_now
from perennial.infra.db import Database
from perennial.infra.migrate import upgrade

TENANT = "default"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Target(_Body):
    interaction_id: str


class Correction(_Body):
    kind: str
    text: str


class Feedback(_Body):
    target: Target
    signal: Correction
    subject: str
    tags: dict[str, str]


class Message(_Body):
    role: str
    content: str


class Interaction(_Body):
    task: str
    messages: list[Message]
    completion: str
    model_version: str


class Created(BaseModel):
    id: str


def build(database: Database) -> FastAPI:
    """Routes in worker threads, as FastAPI runs those that block."""
    app = FastAPI()
    turn = threading.Lock()  # else SQLite's waiting writers sleep for up to 100 ms at a time

    @app.post("/v1/interactions", status_code=201)
    def add_interaction(body: Interaction) -> Created:
        row = InteractionRow(
            **body.model_dump(),
            tenant=TENANT,
            id=new_id("int"),
            route_role="external",
            received_at=utc_now(),
            tags={},
            payload_sha256="",
        )
        with turn, database.write() as session:
            session.add(row)
        return Created(id=row.id)

    @app.post("/v1/feedback", status_code=201)
    def add_feedback(
        body: Feedback, idempotency_key: Annotated[str | None, Header()] = None
    ) -> Created:
        now = utc_now()
        with turn, database.write() as session:
            known = select(FeedbackRow).filter_by(tenant=TENANT, idempotency_key=idempotency_key)
            if idempotency_key and (row := session.scalar(known)):
                return Created(id=row.id)
            about = session.scalar(
                select(InteractionRow).filter_by(tenant=TENANT, id=body.target.interaction_id)
            )
            row = FeedbackRow(
                tenant=TENANT,
                id=new_id("fb"),
                task=about.task if about else None,
                target_interaction_id=body.target.interaction_id,
                target_messages=[],
                kind=body.signal.kind,
                signal={"text": body.signal.text},
                source_kind="end_user",
                subject=body.subject,
                may_train=True,
                status="joined" if about else "pending",
                interaction_id=about.id if about else None,
                received_at=now,
                joined_at=now if about else None,
                tags=body.tags,
                idempotency_key=idempotency_key,
                payload_sha256="",
            )
            session.add(row)
        return Created(id=row.id)

    @app.get("/readyz")
    def readyz() -> dict[str, str]:
        return {}

    return app


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="the control")
    parser.add_argument("url")
    args = parser.parse_args()
    upgrade(args.url)
    app = build(Database(args.url))
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(json.dumps({"port": listener.getsockname()[1], "key": "none"}), flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, loop="uvloop")
    uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
