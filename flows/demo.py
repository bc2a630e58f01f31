"""`perennial demo`: two acts on a running installation of its own, and one table of what happened.

Act 1: the base model answers badly, users correct it, a round runs and goes live by itself. Act 2:
a product line is launched and a policy changes; the drift is seen, a second round runs, a person
approves it in MLflow. Everything is done through the doors that others use: the gateway and the
feedback API, Prefect's API, MLflow's. Every figure is computed from rows in the store.
"""

import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from perennial.flows import demo_table
from perennial.flows.demo_desk import Act, Desk, Fact, load_facts
from perennial.flows.demo_users import Users, held_out_questions, training_questions
from perennial.flows.remote import MlflowReviewer, PrefectRuns
from perennial.flows.screen import Screen
from perennial.flows.services import services
from perennial.flows.supervisor import Supervisor
from perennial.infra.artifacts import write_atomic
from perennial.infra.errors import ConfigError, StepError
from perennial.infra.migrate import upgrade
from perennial.infra.settings import Settings, load_settings

log = logging.getLogger(__name__)

TASK = "support"
_MARKER = ".perennial-demo"
_ROUND_S = 1800.0
_REVIEWER = "Robin (reviewer)"


def run_demo(home: Path, *, seed: int, json_file: Path | None, keep: bool) -> None:
    """Play both acts under `home`, which is emptied first, and print the table.

    Raises:
        ConfigError: `home` holds something that no demo made.
        StepError: a flow failed or a round was not promoted; the message says where to look.
    """
    settings = _prepare(home.expanduser().resolve(), seed)
    screen = Screen()
    started = time.monotonic()
    supervisor = Supervisor(settings.home, services(settings))
    try:
        with _peak_memory() as peak:
            with screen.step("start gateway, MLflow, Prefect and a worker"):
                supervisor.start()
            play = _Play(settings, screen)
            play.act_1()
            play.act_2()
        figures = demo_table.compute(
            settings, play.desk, wall_s=time.monotonic() - started, peak_rss_mb=peak()
        )
        if json_file:
            write_atomic(json_file, json.dumps(demo_table.to_json(figures), indent=1).encode())
        screen.show(demo_table.render(figures, settings, are_services_up=keep))
        if keep:
            screen.say("services stay up; Ctrl-C stops them")
            threading.Event().wait()
    finally:
        with screen.step("stop the services"):
            supervisor.stop()


class _Play:
    """The two acts, on a running installation."""

    def __init__(self, settings: Settings, screen: Screen) -> None:
        self.desk = Desk(act1=load_facts("act1"), act2=load_facts("act2"))
        self._screen = screen
        self._settings = settings
        self._users = Users(settings.api_url, TASK)
        self._runs = PrefectRuns(settings.prefect_url)
        self._reviewer = MlflowReviewer(settings.mlflow_url)

    def act_1(self) -> None:
        """Ask, correct, retrain, go live by itself, ask again in other words."""
        self._screen.title("Act 1: a desk that nobody has taught")
        self._measure("act1_base", self.desk.kept)
        self._work("act1")
        self._round("round 1: collect, detect, train, evaluate, gate, promote", approval="auto")
        self._measure("act1_after_round1", self.desk.kept)

    def act_2(self) -> None:
        """A launch and a changed policy: drift, a second round with replay, a person's approval."""
        self._screen.title("Act 2: a product line is launched, the return policy changes")
        self._measure("act2_before", self.desk.act2)
        self._work("act2")
        self._round("round 2: drift, train with replay, evaluate, gate, approval, promote",
                    approval="manual")  # fmt: skip
        self._measure("act2_after_round2", self.desk.act2)
        self._measure("act1_after_round2", self.desk.kept)

    def _work(self, act: Act) -> None:
        facts = self.desk.act1 if act == "act1" else self.desk.act2
        questions = training_questions(facts)
        with self._screen.bar(f"users ask and correct ({act})", len(questions)) as advance:
            outcomes = self._users.ask_and_judge(questions, advance)
        self._screen.say(f"{sum(o.is_right for o in outcomes)} of {len(outcomes)} answers right")

    def _measure(self, label: str, facts: tuple[Fact, ...]) -> None:
        questions = held_out_questions(facts)
        with self._screen.bar(f"measure on held-out paraphrases ({label})", len(questions)) as tick:
            outcomes = self._users.measure(questions, label, tick)
        self._screen.say(
            f"{sum(o.is_right for o in outcomes)} of {len(outcomes)} right, answered by "
            f"{', '.join(sorted({o.model_version for o in outcomes}))}"
        )

    def _round(self, title: str, *, approval: str) -> None:
        with self._screen.step(title) as say:
            run = self._runs.start("lifecycle", {"task_name": TASK, "approval": approval})
            deadline = time.monotonic() + _ROUND_S
            while not (state := self._runs.state(run)).is_final:
                if time.monotonic() > deadline:
                    raise StepError(f"{title} took more than {_ROUND_S:.0f} s")
                if approval == "manual" and (version := self._reviewer.waiting(TASK)):
                    self._reviewer.approve(TASK, version, by=_REVIEWER)
                    say(f"{_REVIEWER} read the evidence of version {version} and approved it")
                say(self._runs.last_task(run))
                time.sleep(1.0)
        if not state.is_completed:
            raise StepError(
                f"{title} ended {state.name}: {state.message}; "
                f"see {self._settings.home / 'logs' / 'worker.log'}"
            )


def _prepare(home: Path, seed: int) -> Settings:
    """Fresh settings and a migrated store under an emptied `home`, on ports that are free."""
    if home.exists():
        if any(home.iterdir()) and not (home / _MARKER).exists():
            raise ConfigError(f"{home} holds something that no demo made; choose another --home")
        shutil.rmtree(home)
    home.mkdir(parents=True)
    (home / _MARKER).touch()
    api, mlflow, prefect = _free_ports(3)
    settings = load_settings(
        {
            "PERENNIAL_HOME": str(home),
            "PERENNIAL_TASK": TASK,
            "PERENNIAL_API__PORT": str(api),
            "PERENNIAL_MLFLOW__PORT": str(mlflow),
            "PERENNIAL_PREFECT__PORT": str(prefect),
            "PERENNIAL_MODEL__MAX_BATCH": "16",
            "PERENNIAL_CHECK__EVERY_S": "86400",
            "PERENNIAL_CHECK__COOLDOWN_S": "0",
            "PERENNIAL_APPROVAL__WAIT_S": "600",
            "PERENNIAL_TRAINING__OVERRIDES": f"{{ seed = {seed} }}",
        },
        _no_file(home),
    )
    upgrade(settings.resolved_database_url)
    return settings


def _no_file(home: Path) -> Path:
    """An empty settings file, so that a perennial.toml of the folder we stand in is not read."""
    path = home / "perennial.toml"
    path.touch()
    return path


def _free_ports(num: int) -> list[int]:
    probes = [socket.socket() for _ in range(num)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@contextmanager
def _peak_memory() -> Iterator[Callable[[], float]]:
    """Sample the resident memory of this process and its children; the result is in MB."""
    peak_bytes = 0
    is_over = threading.Event()

    def sample() -> None:
        nonlocal peak_bytes
        me = psutil.Process()
        while not is_over.wait(1.0):
            peak_bytes = max(peak_bytes, sum(map(_resident, [me, *me.children(recursive=True)])))

    thread = threading.Thread(target=sample, name="memory", daemon=True)
    thread.start()
    try:
        yield lambda: peak_bytes / 1e6
    finally:
        is_over.set()
        thread.join()


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
