"""Whatever is killed at whatever point: run again, and the champion is the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import httpx
import psutil
import pytest

from perennial.flows.wiring import Deps, make_deps
from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.settings import Settings, child_environment
from perennial.registry.rounds import RoundState
from perennial.training.examples import read_judgements, read_pairs
from tests.flows import loop
from tests.flows.conftest import Server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
POINTS = (
    "after:open",
    "after:curate",
    "before:train",
    "after:train",
    "after:gate",
    "before:register",
    "before:promote",
    "after:promote",
    "before:close",
)


@contextmanager
def _worker(settings: Settings, point: str = "none") -> Iterator[subprocess.Popen[bytes]]:
    env = child_environment(settings, {"PYTHONPATH": str(ROOT)})
    env["PREFECT_HOME"] = str(settings.home / "prefect")
    with (settings.home / "worker.log").open("ab") as log:
        argv = [sys.executable, "-m", "tests.flows.loop", point]
        process = subprocess.Popen(argv, env=env, cwd=ROOT, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _run(settings: Settings, point: str = "none") -> int:
    with _worker(settings, point) as process:
        return process.wait(300)


@contextmanager
def _deps(settings: Settings) -> Iterator[Deps]:
    database = Database(settings.resolved_database_url)
    yield make_deps(settings, database, utc_now)
    database.dispose()


def _outcome(settings: Settings) -> tuple[str, int, int]:
    """The champion's name, how often something was promoted, how many rounds there are."""
    with _deps(settings) as deps:
        champion = deps.champions.current(loop.TASK)
        rounds = deps.ledger.list_rounds(loop.TASK)
        assert [r.state for r in rounds] == [RoundState.PROMOTED], _log(settings)
        assert champion is not None
        return champion.version, len(deps.champions.history(loop.TASK)), len(rounds)


def _assert_learned_from_every_kind_of_row(settings: Settings) -> None:
    (round_,) = (settings.home / "rounds").iterdir()
    trained = json.loads((round_ / "train" / "summary.json").read_bytes())["num_rows"]
    assert min(trained[name] for name in ("new", "general", "pairs", "judgements")) > 0
    judged = read_judgements(round_ / "data" / "judgements.jsonl")
    assert trained["judgements"] == len(judged)
    with _deps(settings) as deps:
        champion = deps.champions.current(loop.TASK)
        assert champion is not None
        members = {member.event_id for member in deps.versions.members(champion.version)}
    rows = (*read_pairs(round_ / "data" / "pairs.jsonl"), *judged)
    assert members >= {origin.event_id for row in rows for origin in row.origins}


def _log(settings: Settings) -> str:
    return (settings.home / "worker.log").read_text()[-4000:]


def _wait(settings: Settings, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, _log(settings)
        time.sleep(0.05)


def _has_steps(settings: Settings, step: str) -> bool:
    with _deps(settings) as deps:
        current = deps.ledger.current(loop.TASK)
        return current is not None and step in deps.ledger.steps(current.id)


def _num_train_steps(settings: Settings) -> int:
    files = list(settings.home.glob("rounds/*/train/progress.jsonl"))
    return len(files[0].read_text().splitlines()) if files else 0


def _trainers(settings: Settings) -> list[psutil.Process]:
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if "perennial.training.run" in (p.info["cmdline"] or [])
        and any(str(settings.home) in part for part in p.info["cmdline"])
    ]


@pytest.fixture
def twins(
    tmp_path: Path, parrot: Path, mlflow_server: Server, prefect_server: Server
) -> Iterator[tuple[Settings, Settings, Server]]:
    """Two installations with the same traffic, each with an MLflow of its own."""
    other = Server(name="mlflow", home=tmp_path / "mlflow-twin")
    other.start()
    prefect = f"http://127.0.0.1:{prefect_server.port}/api"
    homes = tmp_path / "one", tmp_path / "two"
    one, two = (
        loop.tiny_settings(home, parrot, f"http://127.0.0.1:{server.port}", prefect)
        for home, server in zip(homes, (mlflow_server, other), strict=True)
    )
    loop.fill(one)
    for file in one.home.glob("perennial.db*"):
        shutil.copy(file, two.home / file.name)
    yield one, two, mlflow_server
    other.kill()


def test_killed_worker_ends_with_the_champion_of_an_uninterrupted_run(
    twins: tuple[Settings, Settings, Server],
) -> None:
    killed, whole, _ = twins
    assert _run(whole) == 0, _log(whole)

    for point in POINTS:
        assert _run(killed, point) == -signal.SIGKILL, f"{point} was not reached: {_log(killed)}"
    assert _run(killed) == 0, _log(killed)

    assert _outcome(killed) == _outcome(whole)
    assert _run(killed) == 0, _log(killed)  # nothing new: it holds
    assert _outcome(killed) == _outcome(whole)


def test_killed_trainer_ends_with_the_same_champion(
    twins: tuple[Settings, Settings, Server],
) -> None:
    killed, whole, _ = twins
    assert _run(whole) == 0, _log(whole)
    _assert_learned_from_every_kind_of_row(whole)

    with _worker(killed) as worker:
        _wait(killed, lambda: _num_train_steps(killed) >= 6)
        trainers = _trainers(killed)
        assert trainers
        for trainer in trainers:
            trainer.kill()
        assert worker.wait(120) != 0
    assert _run(killed) == 0, _log(killed)

    assert _outcome(killed) == _outcome(whole)


def test_gateway_answers_and_the_round_completes_while_mlflow_and_prefect_are_killed(
    tmp_path: Path, parrot: Path, mlflow_server: Server, prefect_server: Server
) -> None:
    api = Server(name="api", home=tmp_path)
    settings = loop.tiny_settings(
        tmp_path,
        parrot,
        f"http://127.0.0.1:{mlflow_server.port}",
        f"http://127.0.0.1:{prefect_server.port}/api",
        api_port=api.port,
    )
    loop.fill(settings)
    api.start(settings)
    try:
        with _asking(settings) as versions:
            with _worker(settings) as worker:
                _wait(settings, lambda: _has_steps(settings, "curate"))
                prefect_server.kill()
                _wait_for_answers(settings, versions)
                os.kill(worker.pid, signal.SIGKILL)
            prefect_server.start()

            mlflow_server.kill()
            with _worker(settings) as worker:
                _wait(settings, lambda: _has_steps(settings, "gate"))
                _wait_for_answers(settings, versions)
                mlflow_server.start()
                assert worker.wait(200) == 0, _log(settings)
            _wait_for_answers(settings, versions)
    finally:
        api.kill()

    champion, num_promotions, num_rounds = _outcome(settings)
    assert (num_promotions, num_rounds) == (1, 1)
    assert list(dict.fromkeys(versions)) == ["base", champion]
    assert versions == sorted(versions, key=["base", champion].index)  # one switch, none back


@contextmanager
def _asking(settings: Settings) -> Iterator[list[str]]:
    """One user who asks without pause; the version of each answer, and any failure is raised."""
    versions: list[str] = []
    stop = Event()

    def ask() -> None:
        question = {"role": "user", "content": loop.WORDINGS[0].format(3)}
        body = {"model": loop.TASK, "messages": [question], "max_tokens": 4}
        with httpx.Client(base_url=settings.api_url, timeout=60, trust_env=False) as client:
            while not stop.wait(0.1):
                answer = client.post("/v1/chat/completions", json=body).raise_for_status()
                versions.append(answer.headers["x-model-version"])

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield versions
        finally:
            stop.set()
        asking.result()


def _wait_for_answers(settings: Settings, versions: list[str]) -> None:
    before = len(versions)
    _wait(settings, lambda: len(versions) >= before + 3)
