"""The server under test: the feedback API alone, as `perennial serve` mounts it, no model.

    python tests/bench/rig/server.py URL [--max-group-rows 512]

Prints one line of JSON when it listens: its port and an API key.
"""

import argparse
import json
import socket
import sys

from fastapi import FastAPI

from perennial.feedback.admission import Admission, DiskWatermark, Rate, TokenBuckets
from perennial.feedback.api import ApiDeps, create_app
from perennial.feedback.committer import GroupCommitter, GroupLimits
from perennial.feedback.connections import serve
from perennial.feedback.key_cache import KeyCache
from perennial.feedback.keys import KeyStore, Scope
from perennial.feedback.redact import redact_for
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.migrate import upgrade
from perennial.infra.settings import ApiSettings


def build(database: Database, *, max_group_rows: int) -> FastAPI:
    """The app as `flows.app` builds it; `max_group_rows` 1 is one commit per request."""
    store, settings = SqlFeedbackStore(database, utc_now), ApiSettings()
    limits = GroupLimits(group_rows=max_group_rows)
    return create_app(
        ApiDeps(
            store=store,
            committer=GroupCommitter(store.write, limits),
            authenticate=KeyCache(KeyStore(database, utc_now).find, utc_now).authenticate,
            admission=Admission(
                keys=TokenBuckets(_rate(settings.max_per_s)),
                subjects=TokenBuckets(_rate(settings.max_per_s_subject)),
                disk=_watermark(database, settings),
            ),
            redact=redact_for(frozenset()),
        )
    )


def _rate(per_s: float) -> Rate:
    return Rate(per_s=per_s, burst=5 * per_s)


def _watermark(database: Database, settings: ApiSettings) -> DiskWatermark | None:
    if database.file is None:
        return None
    return DiskWatermark(database.file.parent, settings.min_free_mb << 20)


def issue_key(database: Database) -> str:
    """A key that may write and read."""
    keys = KeyStore(database, utc_now)
    return keys.issue("bench", frozenset({Scope.INGEST, Scope.READ})).text


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="the server under test")
    parser.add_argument("url")
    parser.add_argument("--max-group-rows", type=int, default=512)
    args = parser.parse_args()
    upgrade(args.url)
    database = Database(args.url)
    app = build(database, max_group_rows=args.max_group_rows)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(json.dumps({"port": listener.getsockname()[1], "key": issue_key(database)}), flush=True)
    with database.as_only_ingest():
        serve(app, listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
