import html
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from click.testing import CliRunner
from rich.console import Console

from perennial import training
from perennial.flows.bench import Request, prepare, run_steps
from perennial.flows.bench_report import write_report
from perennial.flows.cli import main
from perennial.flows.cli_bench import arms_table, log_result, run_name
from perennial.infra.errors import InputError
from perennial.infra.settings import Settings
from perennial.training import run
from tests.registry.builders import MlflowServer
from tests.training.builders import save_tiny

ARMS = ("naive", "full", "joint")
QUIET = Console(quiet=True)


class InProcess:
    """Trains here, without the start of a process; stops as if killed at one of its calls."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.trained: list[dict[str, Any]] = []
        self._stop_at = stop_at

    def __call__(
        self,
        command: Literal["train", "evaluate"],
        job: Path,
        out: Path,
        *,
        on_line: Callable[[str], None],
    ) -> None:
        if len(self.calls) == self._stop_at:
            raise KeyboardInterrupt
        self.calls.append(command)
        on_line(f"{command} begins")
        assert run.main([command, str(job), str(out)]) == 0
        if command == "train":
            self.trained.append(json.loads((out / "summary.json").read_bytes()))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, general rows, and two rounds of which the second overrides the first."""
    home = tmp_path_factory.mktemp("bench")
    save_tiny(home / "tiny")
    for part, wording in (("train", "item {}"), ("test", "what is {}")):
        for name, box, items in (("01-boxes", "a", (0, 1, 2, 3)), ("02-moved", "b", (0, 7, 8, 9))):
            rows: list[dict[str, Any]] = [
                {"instruction": wording.format(i), "input": "", "outputs": [f"{box}{i}"]}
                for i in items
            ]
            if (name, part) == ("02-moved", "test"):
                rows[0]["forbid"] = ["a0"]
            write_rows(home / "stream" / f"{name}.{part}.jsonl", rows)
    general = [{"prompt": f"say {i}", "answer": f"word {i}"} for i in range(6)]
    write_rows(home / "probe.jsonl", general[:3])
    write_rows(home / "replay.jsonl", general[2:])
    return home


def settings(inputs: Path) -> Settings:
    tiny = {"rank": 4, "epochs": 2, "batch_tokens": 100, "lr": 5e-3, "shrink": 1.0}
    return Settings.model_validate(
        {
            "model": {"name": str(inputs / "tiny"), "threads": 1},
            "training": {"overrides": tiny},
        }
    )


def request(inputs: Path, out: Path, **fields: Any) -> Request:
    given: dict[str, Any] = {
        "stream": inputs / "stream",
        "general": inputs / "probe.jsonl",
        "general_replay": inputs / "replay.jsonl",
        "arms": ARMS,
        "seeds": (0,),
        "orders": ("given",),
        "rows": None,
        "test_rows": fields.get("rows"),
        "graders": {},
        "out": out,
    }
    return Request(**{**given, **fields})


def bench(inputs: Path, out: Path, execute: InProcess, **fields: Any) -> dict[str, Any]:
    prepared = prepare(settings(inputs), request(inputs, out, **fields))
    run_steps(prepared, execute, QUIET)
    return write_report(prepared)


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    times = {"wall_s", "wall_over_naive", "peak_rss_mb"}
    arms = {
        name: {key: value for key, value in arm.items() if key not in times}
        for name, arm in result["arms"].items()
    }
    return {**result, "arms": arms}


@pytest.fixture(scope="session")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted benchmark of two rounds and three arms."""
    out = tmp_path_factory.mktemp("whole")
    return out, bench(inputs, out, InProcess())


def test_every_arm_has_its_figures_and_matrices(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole

    assert json.loads((out / "result.json").read_bytes()) == result
    assert list(result["arms"]) == ["base", *ARMS]
    full, joint = result["arms"]["full"], result["arms"]["joint"]
    for metric in ("ap", "bwt", "la", "forgetting", "fwt", "general_nll_delta", "stale_rate"):
        low, high = full["intervals"][metric]
        assert low <= full[metric] <= high
    assert full["tokens"] > result["arms"]["naive"]["tokens"] > 0
    assert full["wall_s"] > 0
    assert full["peak_rss_mb"] > 0
    assert full["kl_to_base"] > 0
    assert [len(row) for row in full["r_matrices"][0]["r"]] == [2, 2]
    assert joint["bwt"] is None
    assert joint["r_matrices"][0]["r"][0] == [None, None]
    assert result["arms"]["base"]["general_nll_delta"] == 0
    assert result["paired"]["full-minus-naive"]["general_nll_delta"]["value"] < 0


def test_a_terminal_of_80_columns_cuts_nothing_off(whole: tuple[Path, dict[str, Any]]) -> None:
    arms = whole[1]["arms"]
    long = {**whole[1], "arms": {**arms, "replay-same-tokens": {**arms["full"], "tokens": 229_210}}}
    screen = io.StringIO()

    Console(width=80, file=screen).print(arms_table(long))
    shown = screen.getvalue()

    assert "…" not in shown
    assert "229210" in shown
    low, high = arms["full"]["intervals"]["ap"]
    assert f"{arms['full']['ap']:.1f} ±{(high - low) / 2:.1f}" in shown


def test_the_page_stands_alone(whole: tuple[Path, dict[str, Any]]) -> None:
    page = (whole[0] / "index.html").read_text()

    assert page.count("data:image/png;base64,") == 5
    assert 'src="http' not in page
    assert "Full minus the others" in page
    heads = {name: html.escape(arm["says"]) for name, arm in whole[1]["arms"].items()}
    assert all(f"<th>{name}<small>{says}</small>" in page for name, says in heads.items())


def test_rows_of_the_probe_are_never_trained_on(inputs: Path, tmp_path: Path) -> None:
    prepared = prepare(settings(inputs), request(inputs, tmp_path))

    asked = {row.messages for row in prepared.probe}
    assert len(prepared.shared.general) == 3
    assert not asked & {row.messages for row in prepared.shared.general}


def test_fewer_rows_leave_the_general_rows_to_train_on_whole(inputs: Path, tmp_path: Path) -> None:
    prepared = prepare(settings(inputs), request(inputs, tmp_path, rows=2, test_rows=1))

    assert {(len(task.train), len(task.test)) for task in prepared.tasks} == {(2, 1)}
    assert len(prepared.probe) == 1
    assert len(prepared.shared.general) == 4


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_a_killed_benchmark_goes_on_to_equal_figures(
    inputs: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]], stop_at: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench(inputs, tmp_path, InProcess(stop_at))
    assert not (tmp_path / "result.json").exists()

    rest = InProcess()
    result = bench(inputs, tmp_path, rest)

    assert len(rest.calls) == 11 - stop_at
    assert without_times(result) == without_times(whole[1])
    assert list((tmp_path / "work").iterdir()) == []


def test_another_arm_trains_only_what_is_missing(inputs: Path, tmp_path: Path) -> None:
    bench(inputs, tmp_path, InProcess(), arms=("full",))

    added = InProcess()
    bench(inputs, tmp_path, added, arms=("full", "no-replay"))

    # Its first round is that of `full`: trained again for its adapter, not examined again.
    assert added.calls == ["train", "train", "evaluate"]


def test_replayed_rows_have_the_teachers_of_their_round(inputs: Path, tmp_path: Path) -> None:
    execute = InProcess()
    bench(inputs, tmp_path, execute, arms=("full", "no-kd"))

    # Three of the four rows of the first round are not overridden by the second.
    assert [found["num_taught"] for found in execute.trained] == [0, 3, 0, 0]


def test_every_start_goes_on_from_what_the_round_before_left(inputs: Path, tmp_path: Path) -> None:
    execute = InProcess()
    bench(inputs, tmp_path, execute, arms=("slow-fast", "blend", "from-base"))

    starts = [found["start"]["start"] for found in execute.trained]
    assert starts == ["base", "slow-fast", "base", "blend", "base", "base"]
    assert [found["num_taught"] for found in execute.trained] == [0, 3, 0, 3, 0, 0]
    assert execute.trained[3]["dev_loss_by_alpha"]
    # What a round from the base replays it learns as new: three of the first round's four rows.
    assert [found["num_rows"]["new"] for found in execute.trained[4:]] == [4, 7]


def test_both_orders_and_seeds_are_runs_of_an_arm(inputs: Path, tmp_path: Path) -> None:
    asked = {"arms": ("naive",), "seeds": (0, 1), "orders": ("given", "reversed"), "rows": 2}

    result = bench(inputs, tmp_path, InProcess(), **asked)

    runs = result["arms"]["naive"]["r_matrices"]
    assert [(r["seed"], r["order"]) for r in runs] == [
        (0, "given"), (0, "reversed"), (1, "given"), (1, "reversed"),
    ]  # fmt: skip
    assert result["tasks"]["01-boxes"]["num_test"] == 2


def test_rows_that_do_not_fit_are_counted_and_left_out(inputs: Path, tmp_path: Path) -> None:
    long = [{"prompt": "x" * 600, "answer": "y"}, {"prompt": "short", "answer": "z"}]
    write_rows(tmp_path / "replay.jsonl", long)

    prepared = prepare(
        settings(inputs), request(inputs, tmp_path, general_replay=tmp_path / "replay.jsonl")
    )

    assert prepared.left_out == {"stream": 0, "general": 1, "probe": 0}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("train", "no row to train on has at most 64 tokens; raise max_len"),
        ("test", "no test row has at most 512 tokens, .*; shorten them"),
    ],
)
def test_a_task_without_a_row_that_fits_is_refused(
    inputs: Path, tmp_path: Path, part: str, message: str
) -> None:
    for other in ("train", "test"):
        asked = "x" * (9000 if other == part else 1)
        write_rows(tmp_path / f"01-a.{other}.jsonl", [{"instruction": asked, "outputs": ["a"]}])

    given = settings(inputs)
    given.training.overrides.update(max_len=64)
    with pytest.raises(InputError, match=message):
        prepare(given, request(inputs, tmp_path / "out", stream=tmp_path))


def test_what_changes_the_figures_makes_another_run_in_mlflow(inputs: Path, tmp_path: Path) -> None:
    def name(overrides: dict[str, Any] | None = None, **fields: Any) -> str:
        given = settings(inputs)
        given.training.overrides.update(overrides or {})
        return run_name(prepare(given, request(inputs, **{"out": tmp_path, **fields})))

    write_rows(tmp_path / "general.jsonl", [{"prompt": "say so", "answer": "so"}])
    others = [
        name({"lr": 1e-3}),
        name(orders=("given", "reversed")),
        name(seeds=(1,)),
        name(arms=("full",)),
        name(rows=2),
        name(test_rows=2),
        name(general_replay=tmp_path / "general.jsonl"),
        name(graders={"01-boxes": "contains"}),
    ]
    assert len({name(), *others}) == 1 + len(others)
    assert name() == name(out=tmp_path / "elsewhere")


def test_other_code_makes_other_steps(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> set[str]:
        prepared = prepare(settings(inputs), request(inputs, tmp_path))
        return {step.key for step in prepared.steps("full", 0, "given")}

    before = keys()
    code = shutil.copytree(Path(training.__file__).parent, tmp_path / "code")
    monkeypatch.setattr("perennial.flows.bench._CODE", code)
    assert keys() == before
    (code / "loss.py").write_text("# another loss\n")
    assert not keys() & before


def test_an_arm_without_general_rows_has_no_budget_of_drift(inputs: Path, tmp_path: Path) -> None:
    given = settings(inputs)
    given.training.overrides.update(kl_budget=0.5)

    prepared = prepare(given, request(inputs, tmp_path, arms=("no-general",)))

    budgets = {arm: {step.config.kl_budget for step in prepared.steps(arm, 0, "given")
                     if step.config} for arm in ("full", "no-general")}  # fmt: skip
    assert budgets == {"full": {0.5}, "no-general": {0.0}}


def test_another_model_of_the_same_name_or_another_dtype_makes_other_steps(
    inputs: Path, tmp_path: Path
) -> None:
    tiny = shutil.copytree(inputs / "tiny", tmp_path / "tiny")

    def first_key(dtype: str = "auto") -> str:
        given = settings(tmp_path).model_dump()
        given["model"]["dtype"] = dtype
        prepared = prepare(Settings.model_validate(given), request(inputs, tmp_path / "out"))
        return prepared.steps("full", 0, "given")[0].key

    found = [first_key(), first_key("bfloat16")]
    with (tiny / "tokenizer.json").open("a") as file:
        file.write(" ")
    found.append(first_key())
    for path in tiny.glob("model*.safetensors"):
        path.write_bytes(path.read_bytes() + b" ")
    found.append(first_key())

    assert len({*found}) == 4
    assert first_key() == found[-1]


@pytest.mark.slow
def test_a_benchmark_is_one_run_in_mlflow_with_its_figures_and_pages(
    inputs: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    server = MlflowServer(tmp_path)
    server.start()
    try:
        logged = Settings.model_validate(
            {**settings(inputs).model_dump(), "mlflow": {"uri": server.uri}}
        )
        prepared = prepare(logged, request(inputs, whole[0]))
        url = log_result(logged, prepared, whole[1])
        assert log_result(logged, prepared, whole[1]) == url
        run_id = url.rpartition("/")[2]
        shown = httpx.get(f"{server.uri}/api/2.0/mlflow/runs/get", params={"run_id": run_id})
        files = httpx.get(f"{server.uri}/api/2.0/mlflow/artifacts/list", params={"run_id": run_id})
    finally:
        server.kill()

    figures = {row["key"]: row["value"] for row in shown.json()["run"]["data"]["metrics"]}
    assert figures["full/ap"] == pytest.approx(whole[1]["arms"]["full"]["ap"])
    assert {"index.html", "plots", "result.json"} == {f["path"] for f in files.json()["files"]}


@pytest.mark.slow
def test_a_command_killed_with_sigkill_goes_on_to_equal_figures(
    inputs: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(inputs, whole).wait(timeout=300) == 0

    child = command(inputs, killed)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and child.poll() is None:
        if any((killed / "work").glob("*/train/summary.json")):
            break
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not (killed / "result.json").exists()
    assert command(inputs, killed).wait(timeout=300) == 0

    first, second = (json.loads((out / "result.json").read_bytes()) for out in (whole, killed))
    assert without_times(first) == without_times(second)


def command(inputs: Path, out: Path) -> subprocess.Popen[bytes]:
    """The command line with one arm, in processes of its own."""
    options = {
        "--stream": inputs / "stream",
        "--general": inputs / "probe.jsonl",
        "--arms": "naive",
        "--out": out,
    }
    argv = [sys.executable, "-m", "perennial.flows.cli", "bench", "continual"]
    environment = {
        **os.environ,
        "PERENNIAL_MODEL__NAME": str(inputs / "tiny"),
        "PERENNIAL_MODEL__THREADS": "1",
        "PERENNIAL_TRAINING__OVERRIDES": "{ rank = 4, epochs = 2, batch_tokens = 100 }",
    }
    return subprocess.Popen(
        [*argv, *(str(part) for pair in options.items() for part in pair)],
        env=environment,
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "full,fulll"], "unknown arm 'fulll'"),
        (["--arms", ","], "--arms needs at least one value"),
        (["--seeds", "0,x"], "--seeds must be whole numbers"),
        (["--order", "random"], "--order must be given, reversed"),
        (["--grader", "01-boxes=bleu"], "--grader must be TASK=GRADER"),
        (["--grader", "03-x=exact"], "no task '03-x' to grade"),
        (["--rows", "0"], "x>=1"),
        (["--stream", "nowhere"], "does not exist"),
    ],
)
def test_bad_options_are_refused_before_any_training(
    inputs: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    given = {
        "--stream": str(inputs / "stream"),
        "--general": str(inputs / "probe.jsonl"),
        "--out": str(tmp_path / "out"),
        options[0]: options[1],
    }
    environment = {
        "PERENNIAL_MODEL__NAME": str(inputs / "tiny"),
        "PERENNIAL_MODEL__THREADS": "1",
        "PERENNIAL_HOME": str(tmp_path / "home"),
    }
    arguments = [part for pair in given.items() for part in pair]

    found = CliRunner().invoke(main, ["bench", "continual", *arguments], env=environment)

    assert found.exit_code == 2
    assert message in found.output
    assert not (tmp_path / "out" / "steps").exists()
