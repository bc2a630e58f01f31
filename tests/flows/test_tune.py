import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import CliRunner
from matplotlib.image import imread
from rich.console import Console

from perennial.flows.cli import main
from perennial.flows.cli_tune import read_request
from perennial.flows.tune import prepare, run_trials
from perennial.flows.tune_report import write_result
from perennial.flows.wiring import connect
from perennial.infra.artifacts import publish, read_manifest
from perennial.infra.errors import (
    DivergedError,
    InputError,
    OutOfMemoryError,
    TrainingError,
)
from perennial.infra.settings import Settings
from perennial.registry.versions import NewVersion
from perennial.training.examples import Example, read_examples, write_examples
from tests.flows.test_bench import InProcess
from tests.training.builders import example, write_job

QUIET = Console(quiet=True)
OVERRIDES = {"rank": 4, "epochs": 2, "batch_tokens": 100, "lr": 5e-3, "top_layers": 2}


def fill_round(folder: Path) -> None:
    """The rows of a round as curation leaves them, with some that the gate judges by."""
    rows: dict[str, list[Example]] = {
        "train": [example(i) for i in range(20)],
        "replay": [example(i, "replay") for i in range(40, 44)],
        "general": [example(i, "general") for i in range(60, 76)],
        "dev": [],
        "suites/target": [example(i) for i in range(80, 84)],
    }
    for name, examples in rows.items():
        write_examples(folder / f"{name}.jsonl", examples)
    for name in ("pairs", "judgements"):
        (folder / f"{name}.jsonl").touch()


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """An installation with a champion and one round after it, of which only the rows are there."""
    home = tmp_path_factory.mktemp("tune")
    champion = home / "champion"
    InProcess()("train", write_job(home / "first"), champion, on_line=print)
    found = Settings.model_validate(
        {
            "home": home,
            "model": {"name": str(home / "first/tiny"), "threads": 1, "cache_dir": home / "cache"},
            "training": {"overrides": OVERRIDES},
        }
    )
    with connect(found) as deps:
        old = deps.ledger.open_round(found.task, "the first", "0")
        version = deps.versions.register(
            NewVersion(
                task=found.task,
                adapter_digest=read_manifest(champion / "adapter").digest,
                adapter_path=champion / "adapter",
                base_digest="0" * 64,
                round_id=old.id,
                parent=None,
                dataset_digest="0" * 64,
            ),
            (),
        )
        new = deps.ledger.open_round(found.task, "the second", "1")
        lease = deps.ledger.claim(new.id, "test", ttl_s=60)
        deps.ledger.finish_step(lease, "begin", "0", {"champion": version.name})
        publish(home / "rounds" / new.id / "data", fill_round)
    return found


def tune(
    settings: Settings,
    out: Path,
    execute: Any,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> dict[str, Any]:
    given = {"round_id": None, "lr": "5e-3,2e-2", "epochs": "2", "budget": "9h", "max_drift": 0.02}
    with connect(settings) as deps:
        search = prepare(deps, read_request(**{**given, "out": out, **options}))
    return write_result(search, run_trials(search, execute, QUIET, clock))


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "trials": [{**trial, "wall_s": None} for trial in result["trials"]]}


class Watched(InProcess):
    """Keeps what every training was given."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[dict[str, Any]] = []
        self.rows: set[str] = set()

    def __call__(
        self,
        command: Literal["train", "evaluate"],
        job: Path,
        out: Path,
        *,
        on_line: Callable[[str], None],
    ) -> None:
        body = json.loads(job.read_bytes())
        if command == "train":
            self.jobs.append(body)
            files = [Path(body[name]) for name in ("train_rows", "replay_rows", "general_rows")]
            self.rows.update(row.id for path in files for row in read_examples(path))
        super().__call__(command, job, out, on_line=on_line)


@pytest.fixture(scope="session")
def whole(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted search of two settings: its folder, what it trained, its result."""
    out, execute = tmp_path_factory.mktemp("whole"), Watched()
    return out, execute, tune(settings, out, execute)


def test_a_search_measures_each_setting_and_chooses(whole: Any) -> None:
    out, _, result = whole

    assert json.loads((out / "result.json").read_bytes()) == result
    assert [(t["lr"], t["epochs"]) for t in result["trials"]] == [(5e-3, 2), (2e-2, 2)]
    assert sum(t["is_chosen"] for t in result["trials"]) == 1
    for trial in result["trials"]:
        assert trial["tokens"] > 0
        assert trial["wall_s"] > 0
        assert trial["gain"] != 0
        assert trial["drift"] != 0
    chosen = next(t for t in result["trials"] if t["is_chosen"])
    assert result["overrides"] == {**OVERRIDES, "lr": chosen["lr"], "epochs": chosen["epochs"]}
    assert imread(BytesIO((out / "front.png").read_bytes()), format="png").shape[1] > 500


def test_a_finished_search_keeps_no_text_of_users(whole: Any) -> None:
    kept = [path for path in whole[0].rglob("*") if path.is_file() and path.suffix != ".png"]

    assert not any(b"what is item" in path.read_bytes() for path in kept)
    assert not (whole[0] / "work").exists()


def test_all_settings_start_from_the_parent_of_the_round(settings: Settings, whole: Any) -> None:
    _, execute, _ = whole

    assert {job["parent_adapter"] for job in execute.jobs} == {
        str(settings.home / "champion/adapter")
    }
    assert {job["teachers"] for job in execute.jobs} == {str(settings.home / "champion/teachers")}


def test_rows_that_are_measured_on_are_not_trained_on(whole: Any) -> None:
    _, execute, result = whole

    assert result["num_rows"] == {"trained": 16, "dev": 4, "probe": 4}
    assert len(execute.rows) == 16 + 4 + 12
    assert not execute.rows & {f"correction-{i}" for i in range(80, 84)}


def test_a_search_killed_in_its_second_trial_goes_on_to_the_same_result(
    settings: Settings, tmp_path: Path, whole: Any
) -> None:
    # Its calls: examine the parent, train, examine, train, examine.
    with pytest.raises(KeyboardInterrupt):
        tune(settings, tmp_path, InProcess(stop_at=4))
    assert not (tmp_path / "result.json").exists()

    rest = InProcess()
    result = tune(settings, tmp_path, rest)

    assert rest.calls == ["train", "evaluate"]
    assert without_times(result) == without_times(whole[2])
    assert [trial["wall_s"] is None for trial in result["trials"]] == [False, True]


def test_a_wider_search_trains_only_what_is_new(
    settings: Settings, tmp_path: Path, whole: Any
) -> None:
    tune(settings, tmp_path, InProcess())

    added = InProcess()
    result = tune(settings, tmp_path, added, epochs="1,2")

    assert added.calls == ["train", "evaluate"] * 2
    assert len(result["trials"]) == 4


def test_what_the_budget_does_not_hold_is_named(settings: Settings, tmp_path: Path) -> None:
    execute, each_100_s = InProcess(), partial(next, count(0, 100))

    result = tune(settings, tmp_path, execute, clock=each_100_s, budget="150s", epochs="1,2")

    # After two epochs in 100 s there is time for one more, which then took 100 s too.
    assert [(t["epochs"], t["wall_s"]) for t in result["trials"]] == [(2, 100), (1, 100)]
    assert [s["lr"] for s in result["not_tried"]] == [2e-2, 2e-2]
    assert execute.calls == ["evaluate", *["train", "evaluate"] * 2]


def test_another_model_of_the_same_name_or_another_dtype_is_tried_anew(
    settings: Settings, tmp_path: Path
) -> None:
    tiny = shutil.copytree(settings.model.name, tmp_path / "tiny")

    def folders(dtype: str) -> tuple[Path, ...]:
        model = settings.model.model_copy(update={"name": str(tiny), "dtype": dtype})
        options = {"round_id": None, "lr": "5e-3", "epochs": "2", "budget": "9h"}
        asked = read_request(**options, max_drift=0.02, out=tmp_path / "out")
        with connect(settings.model_copy(update={"model": model})) as deps:
            search = prepare(deps, asked)
        return (search.parent_folder, *(plan.folder for plan in search.plans))

    found = [folders("auto"), folders("bfloat16")]
    with (tiny / "model.safetensors").open("ab") as file:
        file.write(b" ")
    found.append(folders("auto"))

    assert len({folder for of_one in found for folder in of_one}) == 3 * 2
    assert folders("auto") == found[-1]


class Failing(InProcess):
    """Ends every training above a learning rate with an error, else as asked."""

    def __init__(self, error: TrainingError) -> None:
        super().__init__()
        self._error = error

    def __call__(
        self,
        command: Literal["train", "evaluate"],
        job: Path,
        out: Path,
        *,
        on_line: Callable[[str], None],
    ) -> None:
        if command == "train" and json.loads(job.read_bytes())["config"]["lr"] > 1e-2:
            raise self._error
        super().__call__(command, job, out, on_line=on_line)


def test_a_setting_that_diverges_is_left_aside_and_said(settings: Settings, tmp_path: Path) -> None:
    result = tune(settings, tmp_path, Failing(DivergedError("train ended: loss diverged")))

    first, second = result["trials"]
    assert first["is_chosen"]
    assert (second["gain"], second["is_on_front"]) == (None, False)
    assert second["failure"] == "train ended: loss diverged"

    again = InProcess()
    assert without_times(tune(settings, tmp_path, again)) == without_times(result)
    assert again.calls == []


def test_a_setting_that_memory_was_refused_for_is_tried_again(
    settings: Settings, tmp_path: Path, whole: Any
) -> None:
    first = tune(settings, tmp_path, Failing(OutOfMemoryError("train ended: out of memory")))
    assert first["trials"][1]["failure"] == "train ended: out of memory"

    again = InProcess()
    result = tune(settings, tmp_path, again)

    assert again.calls == ["train", "evaluate"]
    assert without_times(result) == without_times(whole[2])


def test_a_training_that_failed_otherwise_ends_the_search_and_is_no_figure(
    settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError):
        tune(settings, tmp_path, Failing(TrainingError("train was killed", status=-9)))

    assert len(tune(settings, tmp_path, InProcess())["trials"]) == 2


def test_too_few_rows_to_keep_some_apart_are_refused(settings: Settings, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with connect(settings.model_copy(update={"home": home, "database_url": ""})) as deps:
        small = deps.ledger.open_round(settings.task, "small", "0")
        lease = deps.ledger.claim(small.id, "test", ttl_s=60)
        deps.ledger.finish_step(lease, "begin", "0", {"champion": None})

        def fill(folder: Path) -> None:
            fill_round(folder)
            write_examples(folder / "train.jsonl", [example(0), example(1)])

        publish(home / "rounds" / small.id / "data", fill)

    small_settings = settings.model_copy(update={"home": home})
    with pytest.raises(InputError, match=r"train.jsonl gives 0 rows .* larger round with --round"):
        tune(small_settings, tmp_path / "out", InProcess())


def invoke(settings: Settings, *options: str) -> Any:
    environment = {
        "PERENNIAL_HOME": str(settings.home),
        "PERENNIAL_MODEL__NAME": settings.model.name,
        "PERENNIAL_MODEL__THREADS": "1",
        "PERENNIAL_TRAINING__OVERRIDES": "{ rank = 4, epochs = 2, batch_tokens = 100, lr = 5e-3 }",
    }
    return CliRunner(env=environment).invoke(main, ["tune", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "1e-3,fast"], "--lr must be positive numbers with commas"),
        (["--lr", "1e-3,inf"], "--lr must be positive numbers with commas"),
        (["--lr", ""], "--lr must be positive numbers with commas"),
        (["--epochs", "4,2.5"], "--epochs must be positive whole numbers with commas"),
        (["--epochs", "0"], "--epochs must be positive whole numbers with commas"),
        (["--budget", "soon"], "--budget must be a number and one of s m h d"),
        (["--budget", "0m"], "--budget must hold one training"),
        (["--max-drift", "-1"], "x>=0"),
        (["--round", "rnd_x"], "no round rnd_x of task assistant has rows; there are: rnd_"),
    ],
)
def test_bad_options_are_refused_before_any_training(
    settings: Settings, tmp_path: Path, options: list[str], message: str
) -> None:
    found = invoke(settings, "--out", str(tmp_path / "out"), *options)

    assert found.exit_code == 2
    assert message in found.output
    assert not (tmp_path / "out").exists()


def test_without_a_round_the_command_says_how_to_begin_one(tmp_path: Path) -> None:
    found = CliRunner(env={"PERENNIAL_HOME": str(tmp_path)}).invoke(main, ["tune"])

    assert found.exit_code == 2
    assert "`perennial check --force` begins one" in found.output


def test_a_budget_under_what_the_round_took_is_refused(settings: Settings, tmp_path: Path) -> None:
    with connect(settings) as deps:
        newest = deps.ledger.list_rounds(settings.task)[0]
    summary = settings.home / "rounds" / newest.id / "train/summary.json"
    summary.parent.mkdir()
    summary.write_text('{"wall_s": 600, "resumed_from": 0, "config": {"epochs": 4}}')

    found = invoke(settings, "--out", str(tmp_path / "out"), "--budget", "299s")
    summary.unlink()
    summary.parent.rmdir()

    assert found.exit_code == 2
    assert "the round's own took 600 s; give at least 6m" in found.output


@pytest.mark.slow
def test_the_command_shows_a_table_and_what_to_set(settings: Settings, tmp_path: Path) -> None:
    found = invoke(settings, "--out", str(tmp_path), "--lr", "5e-3", "--epochs", "2,3")

    assert found.exit_code == 0, found.output
    assert "0.005 × 3" in found.output
    assert "chosen: " in found.output
    assert "overrides = { rank = 4, epochs = " in found.output
