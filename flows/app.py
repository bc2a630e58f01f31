"""The process that apps talk to: gateway and feedback API on one port.

It needs the store and the model only; MLflow and Prefect may be down.
"""

import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from fastapi import FastAPI
from starlette.requests import Request

from perennial.feedback.access import caller_of
from perennial.feedback.admission import Admission, DiskWatermark, Rate, TokenBuckets
from perennial.feedback.api import ApiDeps, create_app
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.connections import serve
from perennial.feedback.key_cache import KeyCache
from perennial.feedback.keys import Authenticate, KeyStore, Scope, open_access
from perennial.feedback.metrics import Metrics
from perennial.feedback.middleware import access_log
from perennial.feedback.records import Interaction
from perennial.feedback.redact import Redact
from perennial.feedback.rows import submission_of
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.feedback.store import Stored
from perennial.flows.doctor import is_loopback
from perennial.flows.mapping import to_interaction, with_texts_of
from perennial.flows.wiring import choose_redaction
from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.errors import ConfigError
from perennial.infra.migrate import upgrade
from perennial.infra.settings import ApiSettings, Settings
from perennial.registry.champion import ChampionStore
from perennial.serving.embedded import create_embedded_engine
from perennial.serving.engine import BASE, AdapterRef, Engine
from perennial.serving.gateway import GatewayDeps, create_gateway
from perennial.serving.recorder import (
    Outcome,
    RecordedAnswer,
    Recorder,
    RecorderHealth,
    SpoolingRecorder,
)
from perennial.serving.scheduler import Limits
from perennial.training.modelfiles import ensure_base_model

log = logging.getLogger(__name__)

_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def run_app(settings: Settings) -> None:
    """Serve until stopped.

    Raises:
        ConfigError: the address is reachable from elsewhere and no key is asked for.
    """
    if not is_loopback(settings.api.host) and settings.api.auth == "open":
        raise ConfigError(
            f"{settings.api.host} is reachable from other machines and api.auth is open: "
            'set api.auth = "keys" and create one with `perennial keys create`'
        )
    access_log.setLevel(logging.INFO if settings.api.access_log else logging.WARNING)
    upgrade(settings.resolved_database_url)
    database = Database(settings.resolved_database_url)
    with database.as_only_ingest(), _listener(settings.api) as listener:
        serve(build_app(settings, database), listener)


def _listener(api: ApiSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in api.host else socket.AF_INET
    try:
        return socket.create_server((api.host, api.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {api.host}:{api.port}: {error.strerror}; set api.host or api.port"
        ) from error


def build_app(settings: Settings, database: Database) -> FastAPI:
    """The ASGI app over a migrated database; the model is loaded when this returns."""
    engine = create_embedded_engine(
        ensure_base_model(settings.model.name, settings.model.cache_dir),
        num_threads=settings.model.threads,
        limits=Limits(
            max_batch=settings.model.max_batch, default_answer_tokens=settings.model.max_tokens
        ),
    )
    return compose(settings, database, engine)


class OwnEngine(Engine, Protocol):
    """An engine that ends with the app."""

    def close(self) -> None:
        """Give back what it holds."""


def compose(settings: Settings, database: Database, engine: OwnEngine) -> FastAPI:
    """Gateway and feedback API in one app, whatever the engine."""
    store = SqlFeedbackStore(database, utc_now)
    committer = GroupCommitter(store.write)
    authenticate = _authenticate(settings, database)
    redact = choose_redaction(settings.redaction)

    def sink(answer: RecordedAnswer) -> None:
        (outcome,) = committer.submit((submission_of(to_interaction(answer)),))
        if not isinstance(outcome, Stored):
            raise outcome

    metrics = Metrics()
    metrics.watch("perennial_wal_bytes", "Size of SQLite's log", lambda: database.wal_bytes)
    spool = SpoolingRecorder(sink, settings.home / "spool")
    recorder = _Redacting(spool, redact, metrics)
    gateway = create_gateway(
        GatewayDeps(
            engine=engine,
            source=_Champions(ChampionStore(database, utc_now)),
            recorder=recorder,
            tasks=(settings.task,),
            authenticate=_tenant_of(authenticate),
        )
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            yield
        spool.close()
        engine.close()
        committer.close()
        database.dispose()

    app = create_app(
        ApiDeps(
            store=store,
            committer=committer,
            authenticate=authenticate,
            admission=_admission(settings.api, database),
            redact=redact,
            metrics=metrics,
            task=settings.task,
            # A web page must not reach an open API by giving our address to a name of its own.
            allowed_hosts=_hosts(settings.api),
            lifespan=lifespan,
        )
    )
    app.router.routes.extend(gateway.routes())
    return app


def _hosts(api: ApiSettings) -> tuple[str, ...]:
    return () if api.auth == "keys" else (*_LOCAL_NAMES, api.host_in_urls)


def _admission(api: ApiSettings, database: Database) -> Admission:
    return Admission(
        keys=TokenBuckets(_rate(api.max_per_s)),
        subjects=TokenBuckets(_rate(api.max_per_s_subject)),
        disk=_watermark(database.file, api.min_free_mb) if database.file else None,
    )


def _watermark(file: Path, min_free_mb: int) -> DiskWatermark:
    return DiskWatermark(file.parent, min_free_mb << 20)


def _rate(per_s: float) -> Rate:
    """A rate with five seconds of it saved up: users come in bursts."""
    return Rate(per_s=per_s, burst=5 * per_s)


class _Redacting:
    """A recorder that never sees what must not be written: its spool is a disk too."""

    def __init__(self, recorder: Recorder, redact: Redact, metrics: Metrics) -> None:
        self._recorder = recorder
        self._redact = redact
        self._metrics = metrics

    def record(self, answer: RecordedAnswer) -> Outcome:
        """Keep what is left of `answer`."""
        redacted = self._redact(to_interaction(answer))
        self._metrics.count_redacted(redacted.counts)
        assert isinstance(redacted.record, Interaction)  # what went in
        return self._recorder.record(with_texts_of(answer, redacted.record))

    def health(self) -> RecorderHealth:
        """The recorder's."""
        return self._recorder.health()


class _Champions:
    """The registry's champion as the version that serving must load."""

    def __init__(self, champions: ChampionStore) -> None:
        self._champions = champions

    def champion(self, task: str) -> AdapterRef:
        """The live version of `task`, or the base model before any promotion."""
        live = self._champions.current(task)
        if live is None:
            return BASE
        return AdapterRef(name=live.version, path=live.adapter_path, digest=live.adapter_digest)


def _authenticate(settings: Settings, database: Database) -> Authenticate:
    if settings.api.auth == "open":
        return open_access()
    return KeyCache(KeyStore(database, utc_now).find, utc_now).authenticate


def _tenant_of(authenticate: Authenticate) -> Callable[[Request], Awaitable[str]]:
    """For the gateway: the tenant of a key that may ingest, for it may also ask."""

    async def tenant(request: Request) -> str:
        return (await caller_of(request, Scope.INGEST, authenticate)).tenant

    return tenant
