"""The continual benchmark: every arm through a stream of tasks, trained as a round is.

A step trains and is examined in processes of their own, through the job files of a round. Its
result is a folder in `steps/`, complete or absent, under a digest of what it depends on: a killed
benchmark goes on where it stopped. Which steps there are is decided in `training.arms`; figures and
pages are left to `bench_report`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console

from perennial import training
from perennial.flows.bench_board import StepBoard
from perennial.flows.processes import Json, model_fields
from perennial.infra.artifacts import MANIFEST, publish, write_atomic
from perennial.infra.errors import InputError
from perennial.infra.settings import Settings
from perennial.training import config as configs
from perennial.training.arms import Course, Shared, Step, course, plan
from perennial.training.cache import folder_digest
from perennial.training.continual import GENERAL
from perennial.training.evaluate import longest_row
from perennial.training.examples import Example, write_examples
from perennial.training.general import PACKAGED_REPLAY, load_general
from perennial.training.grading import Grader
from perennial.training.job import left_by
from perennial.training.machine import choose_place, choose_threads_once
from perennial.training.modelfiles import (
    context_length,
    ensure_base_model,
    load_tokenizer,
    weights_pattern,
)
from perennial.training.progress import read_progress
from perennial.training.stream import (
    Order,
    Task,
    choose_graders,
    ordered,
    read_stream,
    spread,
)
from perennial.training.tokens import encode_example, encode_text

_MODEL = "model"  # the one adapter, or the base, of an evaluation
_MAX_NEW_TOKENS = 64
_SPARE_TOKENS = 8
_MAX_TEST_LEN = 1024  # tokens; another number would name the results on disk anew
_CODE = Path(training.__file__).parent
_PACKAGES = ("perennial-llm", "peft", "torch", "transformers")
TRAINED = "trained.json"


class Execute(Protocol):
    """Runs a training or an evaluation; returns when `out` is filled."""

    def __call__(
        self,
        command: Literal["train", "evaluate"],
        job: Path,
        out: Path,
        *,
        on_line: Callable[[str], None],
    ) -> None:
        """Raise the error that the training process names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a person asked for. `general` is measured on; `general_replay` may be trained on.

    `rows` and `test_rows`: at most so many of every file to train on, and of every other. Of
    `general_replay` a round draws its share.
    """

    stream: Path
    general: Path
    general_replay: Path | None
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    orders: tuple[Order, ...]
    rows: int | None
    test_rows: int | None
    graders: Mapping[str, Grader]
    out: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """A request with everything read and checked; `left_out` counts rows that were too long."""

    request: Request
    tasks: tuple[Task, ...]
    graders: Mapping[str, Grader]
    courses: Mapping[Order, Course]
    probe: tuple[Example, ...]
    shared: Shared
    left_out: Mapping[str, int]
    max_new_tokens: int
    computed_by: Json
    model: Mapping[str, str | int | None]

    def steps(self, arm: str, seed: int, order: Order) -> tuple[Step, ...]:
        """The steps of an arm with one seed in one order."""
        return plan(arm, self.courses[order], seed, self.shared)

    def result(self, step: Step) -> Path:
        """The folder with what a step gave."""
        return self.request.out / "steps" / step.key


def prepare(settings: Settings, request: Request) -> Bench:
    """The benchmark, with its inputs checked before the first training.

    Raises:
        InputError: a file is missing or malformed, an arm is unknown, or no row fits the context.
        ModelMissingError: the base model is not on this machine.
    """
    given = _read(settings, request)
    graders = choose_graders(given.tasks, request.graders)
    overrides = settings.training.overrides
    folder = ensure_base_model(settings.model.name, settings.model.cache_dir)
    tokenizer = load_tokenizer(folder)
    max_test_len = min(_MAX_TEST_LEN, longest_row(folder))
    max_len = min(configs.from_json(overrides).max_len, context_length(folder))
    rows = _Fit(tokenizer=tokenizer, max_len=max_len, max_test_len=max_test_len).rows(given)
    max_new_tokens = min(_MAX_NEW_TOKENS, _longest_answer(tokenizer, rows) + _SPARE_TOKENS)
    tests = [task.test for task in rows.tasks]
    by = computed_by(settings, folder)
    salt = _digest([by, max_new_tokens, tests, rows.probe])
    replay_rows, dev_share = settings.training.replay_rows, settings.training.holdout
    bench = Bench(
        request=request,
        tasks=rows.tasks,
        graders=graders,
        courses={
            order: course(ordered(rows.tasks, order), replay_rows) for order in request.orders
        },
        probe=rows.probe,
        shared=Shared(overrides=overrides, general=rows.general, salt=salt, dev_share=dev_share),
        left_out={name: num - rows.nums[name] for name, num in given.nums.items()},
        max_new_tokens=max_new_tokens,
        computed_by=by,
        model={
            **model_fields(settings),
            "base_model": str(folder.resolve()),
            "num_threads": settings.model.threads
            or choose_threads_once(request.out / "num_threads", None),
        },
    )
    for arm in request.arms:
        bench.steps(arm, request.seeds[0], request.orders[0])
    return bench


def computed_by(settings: Settings, folder: Path) -> Json:
    """What figures depend on beside rows and configuration: model, code, and where it runs.

    Raises:
        ConfigError: the settings ask for a GPU that is not there.
    """
    place = choose_place(settings.model.device, settings.model.dtype)
    # Weights, and in *.json and *.jinja configuration, tokenizer and chat template.
    model = folder_digest(folder, weights_pattern(folder), "*.j*")
    packages = {name: version(name) for name in _PACKAGES}
    return {"model": model, "code": folder_digest(_CODE, "*.py"), **packages, **asdict(place)}


def run_steps(bench: Bench, execute: Execute, console: Console) -> None:
    """Have the result of every step; those that are there already are left alone."""
    asked = bench.request
    steps = {
        step.key: (f"{arm} · seed {seed} · {order}", step)
        for seed in asked.seeds
        for order in asked.orders
        for arm in ("base", *asked.arms)
        for step in bench.steps(arm, seed, order)
    }
    todo = {k: s for k, s in steps.items() if not (bench.result(s[1]) / MANIFEST).exists()}
    _write_suites(bench)
    with StepBoard(console, num_steps=len(steps), num_done=len(steps) - len(todo)) as board:
        worker = _Worker(bench=bench, execute=execute, on_line=board.line)
        for key, (name, step) in tuple(todo.items()):
            board.begin(f"{name} · round {step.index + 1}")
            publish(bench.result(step), partial(worker.fill, step))
            board.end()
            del todo[key]
            parents = {other.parent.key for _, other in todo.values() if other.parent}
            _drop_adapters(asked.out / "work", keep=parents)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Worker:
    """Trains and examines one step at a time."""

    bench: Bench
    execute: Execute
    on_line: Callable[[str], None]

    def fill(self, step: Step, folder: Path) -> None:
        """Write the row results of every suite, and what the training took, into `folder`."""
        work = self._work(step)
        adapter = self.train(step) if step.config else None
        job = {
            **self.bench.model,
            "adapters": {_MODEL: str(adapter) if adapter else None},
            "suites": {name: str(_suites(self.bench) / f"{name}.jsonl") for name in step.examined},
            "max_new_tokens": self.bench.max_new_tokens,
            "kl_suites": [GENERAL] if adapter and GENERAL in step.examined else [],
        }
        self._run("evaluate", job, work / "scores")
        for name in step.examined:
            shutil.copyfile(work / "scores" / _MODEL / f"{name}.jsonl", folder / f"{name}.jsonl")
        if adapter:
            (folder / TRAINED).write_text(json.dumps(_cost(adapter.parent)))

    def train(self, step: Step) -> Path:
        """The adapter of a step, trained now if it is not there, and its parents' before it."""
        work = self._work(step)
        if not (work / "train" / "summary.json").exists():
            assert step.config is not None  # only steps that train have an adapter
            parent = self.train(step.parent) if step.parent else None
            job = {**self.bench.model, "config": step.config.to_json()}
            if parent:
                job |= {"parent_adapter": str(parent), **left_by(parent)}
            for name in ("new", "replay", "general", "dev"):
                rows: Sequence[Example] = getattr(step, name)
                write_examples(work / f"{name}.jsonl", rows)
                job["train_rows" if name == "new" else f"{name}_rows"] = f"{name}.jsonl"
            self._run("train", job, work / "train")
        return work / "train" / "adapter"

    def _run(self, command: Literal["train", "evaluate"], job: Json, out: Path) -> None:
        path = out.parent / f"{out.name}.json"
        write_atomic(path, json.dumps(job, indent=1).encode())
        self.execute(command, path, out, on_line=self.on_line)

    def _work(self, step: Step) -> Path:
        return self.bench.request.out.resolve() / "work" / step.key


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """The stream, general rows to train on, and those to measure on."""

    tasks: tuple[Task, ...]
    general: tuple[Example, ...]
    probe: tuple[Example, ...]

    @property
    def nums(self) -> Mapping[str, int]:
        """How many there are of each."""
        stream = sum(len(task.train) + len(task.test) for task in self.tasks)
        return {"stream": stream, "general": len(self.general), "probe": len(self.probe)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    """Keeps the rows that training and evaluation take; they leave out longer ones."""

    tokenizer: Any  # transformers
    max_len: int
    max_test_len: int

    def rows(self, given: _Rows) -> _Rows:
        probe_len = min(self.max_len, self.max_test_len)
        return _Rows(
            tasks=tuple(self._task(task) for task in given.tasks),
            general=tuple(row for row in given.general if self._holds(row, self.max_len)),
            probe=tuple(row for row in given.probe if self._holds(row, probe_len)),
        )

    def _task(self, task: Task) -> Task:
        train = tuple(row for row in task.train if self._holds(row.example, self.max_len))
        test = tuple(row for row in task.test if self._holds(row.example, self.max_test_len))
        if not train:
            raise InputError(
                f"task {task.name}: no row to train on has at most {self.max_len} tokens; "
                "raise max_len",
                task=task.name,
            )
        if not test:
            raise InputError(
                f"task {task.name}: no test row has at most {self.max_test_len} tokens, which is "
                "what an examination takes; shorten them",
                task=task.name,
            )
        return replace(task, train=train, test=test)

    def _holds(self, row: Example, max_len: int) -> bool:
        num_chars = len(row.completion) + sum(len(text) for _, text in row.messages)
        return encode_example(self.tokenizer, row, 10**6 + 100 * num_chars).num_tokens <= max_len


def _cost(trained: Path) -> Json:
    """What a training took; the time of one that was interrupted is not known."""
    summary = json.loads((trained / "summary.json").read_bytes())
    is_whole = summary["resumed_from"] == 0
    return {
        "num_tokens": sum(row.num_tokens for row in read_progress(trained / "progress.jsonl")),
        "wall_s": summary["wall_s"] if is_whole else None,
        "peak_rss_mb": summary["peak_rss_mb"],
    }


def _read(settings: Settings, request: Request) -> _Rows:
    probe = _general(request.general, request.test_rows)
    return _Rows(
        tasks=read_stream(request.stream, request.rows, request.test_rows),
        general=_replayed(settings, request, probe),
        probe=probe,
    )


def _general(path: Path, max_rows: int | None) -> tuple[Example, ...]:
    rows = tuple(
        Example(id=f"general-{i}", messages=(("user", asked),), completion=told, kind="general")
        for i, (asked, told) in enumerate(load_general(path))
    )
    return spread(rows, max_rows)


def _replayed(
    settings: Settings, request: Request, probe: Sequence[Example]
) -> tuple[Example, ...]:
    """General rows to train on, whole: none that asks what the probe asks."""
    default = settings.training.general_file or PACKAGED_REPLAY
    rows = _general(request.general_replay or default, None)
    asked = {row.prompt_key for row in probe}
    return tuple(row for row in rows if row.prompt_key not in asked)


def _write_suites(bench: Bench) -> None:
    for task in bench.tasks:
        _write_suite(bench, task.name, [row.example for row in task.test])
    _write_suite(bench, GENERAL, bench.probe)


def _write_suite(bench: Bench, name: str, rows: Sequence[Example]) -> None:
    lines = (
        {"id": row.id, "messages": row.messages, "reference": row.completion, "rule": "exact"}
        for row in rows
    )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(_suites(bench) / f"{name}.jsonl", text.encode())


def _suites(bench: Bench) -> Path:
    return bench.request.out.resolve() / "suites" / bench.shared.salt[:16]


def _drop_adapters(work: Path, keep: set[str]) -> None:
    for folder in work.iterdir():
        if folder.name not in keep:
            shutil.rmtree(folder)


def _longest_answer(tokenizer: Any, rows: _Rows) -> int:  # Any: transformers
    """Tokens of the longest answer that a task or the probe wants."""
    wanted = [answer for task in rows.tasks for row in task.test for answer in row.outputs]
    wanted += [row.completion for row in rows.probe]
    return max(len(encode_text(tokenizer, answer)) for answer in wanted)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
