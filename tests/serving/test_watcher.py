import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from perennial.infra.errors import IntegrityError, NotFoundError, UnavailableError
from perennial.serving.engine import BASE, AdapterRef, Answer, EngineHealth, Finish
from perennial.serving.watcher import LiveRoutes, RouteWatcher
from tests.serving.builders import FakeSource

V = [AdapterRef(name=f"support-v{i}-aa") for i in range(6)]


class FakeEngine:
    """Loads by name and can refuse to."""

    def __init__(self):
        self.loaded = set()
        self.errors = {}
        self.attempts = []
        self.probe_error = None

    def ensure_loaded(self, adapter):
        self.attempts.append(adapter.name)
        if adapter.name in self.errors:
            raise self.errors[adapter.name]
        self.loaded.add(adapter.name)

    def unload(self, name):
        self.loaded.discard(name)

    async def chat(self, request, adapter=BASE):
        assert adapter is BASE or adapter.name in self.loaded
        if self.probe_error:
            raise self.probe_error
        return Answer(
            text="", finish=Finish(reason="length", num_prompt_tokens=1, num_completion_tokens=1)
        )

    def stream(self, request, adapter=BASE):
        raise NotImplementedError

    def health(self):
        return EngineHealth(is_ready=True, loaded=(), num_running=0, num_waiting=0, max_waiting=1)


class Rig:
    def __init__(self):
        self.engine, self.source = FakeEngine(), FakeSource()
        self.live = LiveRoutes(["support"])
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.watcher = RouteWatcher(
            source=self.source, engine=self.engine, live=self.live, clock=lambda: self.now
        )

    def follow(self, adapter):
        self.source.champions["support"] = adapter
        self.now += timedelta(hours=1)
        asyncio.run(self.watcher.poll_once())
        return self.live.find("support")

    @property
    def health(self):
        return self.watcher.health()[0]


@pytest.fixture
def rig():
    return Rig()


def test_the_base_answers_before_any_promotion(rig):
    assert rig.follow(BASE).role == "base"
    assert rig.follow(V[1]).version == V[1].name


def test_no_version_yet_is_unavailable_and_no_task_not_found(rig):
    with pytest.raises(UnavailableError), rig.live.use("support"):
        pass
    with pytest.raises(NotFoundError), rig.live.use("other"):
        pass


def test_the_previous_stays_loaded_and_older_ones_go(rig):
    for adapter in V[1:5]:
        rig.follow(adapter)
    assert rig.engine.loaded == {V[3].name, V[4].name}
    assert rig.follow(V[3]).version == V[3].name
    assert rig.engine.loaded == {V[3].name, V[4].name}


def test_a_version_in_use_is_not_unloaded(rig):
    rig.follow(V[1])
    with rig.live.use("support") as route:
        rig.follow(V[2])
        rig.follow(V[3])
        assert route.version in rig.engine.loaded
    rig.follow(V[3])
    assert rig.engine.loaded == {V[2].name, V[3].name}


@pytest.mark.parametrize("where", ["source", "load", "probe", "unnamed"])
def test_a_failure_keeps_the_last_good_and_is_shown(rig, where):
    rig.follow(V[1])
    if where == "source":
        rig.source.error = UnavailableError("database down")
    elif where == "unnamed":
        rig.source.error = KeyError("a bug")
    elif where == "load":
        rig.engine.errors[V[2].name] = IntegrityError("digest differs")
    else:
        rig.engine.probe_error = UnavailableError("no answer")
    assert rig.follow(V[2]).version == V[1].name
    since = rig.health.failing_since
    assert rig.health.failure
    assert rig.follow(V[2]).version == V[1].name
    assert rig.health.failing_since == since
    rig.source.error = rig.engine.probe_error = None
    rig.engine.errors.clear()
    assert rig.follow(V[2]).version == V[2].name
    assert rig.health.failure is None


def test_a_broken_version_is_not_tried_at_every_poll(rig):
    rig.engine.errors[V[2].name] = IntegrityError("digest differs")
    rig.follow(V[2])
    for _ in range(10):
        rig.now += timedelta(milliseconds=90)
        asyncio.run(rig.watcher.poll_once())
    assert rig.engine.attempts == [V[2].name]
    assert rig.follow(V[3]).version == V[3].name
