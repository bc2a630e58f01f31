"""Follows the champion of each task and switches without a gap.

Poll, load and try the new version, then swap one pointer. The version before stays loaded, so that
a rollback is instant; older ones go when no request uses them. Whatever fails, the last good
version keeps answering and the failure is shown. Who is champion is decided elsewhere.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from perennial.infra.clock import Clock
from perennial.infra.errors import NotFoundError, PerennialError, UnavailableError
from perennial.serving.engine import BASE, AdapterRef, ChatMessage, ChatRequest, Engine
from perennial.serving.routes import Route, RouteTable

_log = logging.getLogger(__name__)
_FIRST_RETRY = timedelta(seconds=1)
_LAST_RETRY = timedelta(seconds=60)


class RouteSource(Protocol):
    """Says who is champion; may block and may raise any `PerennialError`."""

    def champion(self, task: str) -> AdapterRef:
        """The live version of `task`; `BASE` before any promotion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteHealth:
    """What answers a task, and why it is not what it should be."""

    task: str
    version: str | None
    failure: str | None
    failing_since: datetime | None


class LiveRoutes:
    """The routes in force and who uses which version. Belongs to one event loop."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tuple(tasks)
        self._table = RouteTable()
        self._users: Counter[str] = Counter()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks served here."""
        return self._tasks

    def find(self, task: str) -> Route | None:
        """The route in force, or None while there is none."""
        return self._table.find(task)

    def swap(self, route: Route) -> None:
        """From now on requests for its task start with `route`."""
        self._table = self._table.with_route(route)

    @contextmanager
    def use(self, task: str) -> Iterator[Route]:
        """The route for one whole request; its version stays loaded meanwhile.

        Raises:
            NotFoundError: no such task is served here.
            UnavailableError: the task has no version that could be loaded yet.
        """
        if task not in self._tasks:
            raise NotFoundError(f"there is no model {task!r}; see /v1/models")
        route = self._table.find(task)
        if route is None:
            raise UnavailableError(f"no version of {task!r} could be loaded yet")
        self._users[route.version] += 1
        try:
            yield route
        finally:
            self._users[route.version] -= 1

    def is_used(self, version: str) -> bool:
        """Whether a request that started with `version` has not ended."""
        return self._users[version] > 0


@dataclass(kw_only=True, slots=True)
class _Trouble:
    reason: str
    since: datetime
    adapter: AdapterRef | None  # the one that failed; None when the source itself did
    retry_at: datetime
    pause: timedelta


class RouteWatcher:
    """Keeps `live` equal to what `source` says; `run` for ever, or `poll_once` by hand."""

    def __init__(
        self,
        *,
        source: RouteSource,
        engine: Engine,
        live: LiveRoutes,
        clock: Clock,
        interval_s: float = 1.0,
    ) -> None:
        self._source = source
        self._engine = engine
        self._live = live
        self._clock = clock
        self._interval_s = interval_s
        self._previous: dict[str, AdapterRef] = {}
        self._loaded: dict[str, AdapterRef] = {}
        self._troubles: dict[str, _Trouble] = {}

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await self.poll_once()
            await asyncio.sleep(self._interval_s)

    async def poll_once(self) -> None:
        """Ask for every task's champion once and act on it."""
        for task in self._live.tasks:
            try:
                await self._follow(task)
            except Exception as error:  # noqa: BLE001  # task edge: shown in health, logged whole
                _log.exception("following the champion failed task=%s", task)
                self._note(task, None, error)
        await self._unload_unused()

    def health(self) -> tuple[RouteHealth, ...]:
        """Every task, in order."""
        return tuple(self._health_of(task) for task in self._live.tasks)

    async def _follow(self, task: str) -> None:
        try:
            wanted = await asyncio.to_thread(self._source.champion, task)
        except PerennialError as error:
            self._note(task, None, error)
            return
        current = self._live.find(task)
        if current is not None and current.adapter == wanted:
            self._troubles.pop(task, None)
        elif not self._must_pause(task, wanted):
            await self._switch(task, current, wanted)

    async def _switch(self, task: str, current: Route | None, wanted: AdapterRef) -> None:
        try:
            await self._load_and_probe(wanted)
        except PerennialError as error:
            self._note(task, wanted, error)
            return
        if current is not None:
            self._previous[task] = current.adapter
        self._live.swap(Route(task=task, adapter=wanted))
        self._troubles.pop(task, None)
        before = current.version if current else None
        _log.info("route switched task=%s from=%s to=%s", task, before, wanted.name)

    async def _load_and_probe(self, adapter: AdapterRef) -> None:
        if adapter.name != BASE.name:
            await asyncio.to_thread(self._engine.ensure_loaded, adapter)
            self._loaded[adapter.name] = adapter
        probe = ChatRequest(messages=(ChatMessage(role="user", content="Hello"),), max_tokens=1)
        await self._engine.chat(probe, adapter)

    async def _unload_unused(self) -> None:
        keep = {a.name for a in self._previous.values()}
        keep |= {r.version for t in self._live.tasks if (r := self._live.find(t))}
        for name in set(self._loaded) - keep:
            if not self._live.is_used(name):
                await self._unload(name)

    async def _unload(self, name: str) -> None:
        try:
            await asyncio.to_thread(self._engine.unload, name)
        except PerennialError as error:  # it only takes memory; the next poll tries again
            _log.warning("unload failed name=%s reason=%s", name, error)
        else:
            del self._loaded[name]

    def _must_pause(self, task: str, wanted: AdapterRef) -> bool:
        trouble = self._troubles.get(task)
        return (
            trouble is not None and trouble.adapter == wanted and self._clock() < trouble.retry_at
        )

    def _note(self, task: str, adapter: AdapterRef | None, error: Exception) -> None:
        now = self._clock()
        before = self._troubles.get(task)
        is_same = before is not None and before.adapter == adapter
        # A full queue passes, a wrong file does not: only the latter is tried ever more rarely.
        grows = before is not None and is_same and not isinstance(error, UnavailableError)
        pause = min(before.pause * 2, _LAST_RETRY) if before and grows else _FIRST_RETRY
        self._troubles[task] = _Trouble(
            reason=str(error),
            since=before.since if before else now,
            adapter=adapter,
            retry_at=now + pause,
            pause=pause,
        )
        if not is_same:
            _log.error("route kept task=%s wanted=%s reason=%s", task, adapter, error)

    def _health_of(self, task: str) -> RouteHealth:
        route, trouble = self._live.find(task), self._troubles.get(task)
        return RouteHealth(
            task=task,
            version=route.version if route else None,
            failure=trouble.reason if trouble else None,
            failing_since=trouble.since if trouble else None,
        )
