"""A stream of tasks for the continual benchmark: read, checked, put in an order.

A folder holds `01-name.train.jsonl` and `01-name.test.jsonl` for each task, with `instruction`,
`input` and `outputs[]` in a row; `forbid[]` in a test row are answers that have become stale. What
of it a round trains on is decided in `arms`, how answers are scored in `grading`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from perennial.infra.errors import InputError
from perennial.training.examples import Example, read_jsonl
from perennial.training.grading import Grader, default_grader
from perennial.training.text import clean

Order = Literal["given", "reversed"]
Row = TypeVar("Row")
_FILE = re.compile(r"(\d+-[A-Za-z0-9._-]+)\.(train|test)\.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamRow:
    """One prompt; any of `outputs` is right, the first is taught, none of `forbid` may occur."""

    id: str
    prompt: str
    outputs: tuple[str, ...]
    forbid: tuple[str, ...] = ()

    @property
    def example(self) -> Example:
        """As a demonstration to train on."""
        messages = (("user", self.prompt),)
        return Example(
            id=self.id, messages=messages, completion=self.outputs[0], kind="demonstration"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What one round teaches and how it is examined; `name` is the file's, with its number."""

    name: str
    train: tuple[StreamRow, ...]
    test: tuple[StreamRow, ...]


def read_stream(
    folder: Path, max_rows: int | None = None, max_test_rows: int | None = None
) -> tuple[Task, ...]:
    """The tasks by number, each with at most so many train and test rows (see `spread`).

    Raises:
        InputError: the folder holds no task, a task lacks one of its files, a file has another
            name or no rows, or a row is malformed; names the file and the line.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise InputError(f"{folder} holds no stream: expected 01-name.train.jsonl and .test.jsonl")
    parts: dict[str, dict[str, Path]] = {}
    for path in files:
        match = _FILE.fullmatch(path.name)
        if match is None:
            raise InputError(f"{path} is not named like 01-name.train.jsonl or 01-name.test.jsonl")
        parts.setdefault(match[1], {})[match[2]] = path
    for name, found in parts.items():
        if len(found) < 2:
            raise InputError(f"task {name} in {folder} has only a {next(iter(found))} file")
    names = sorted(parts, key=lambda name: (int(name.partition("-")[0]), name))
    return tuple(
        Task(
            name=name,
            train=spread(_rows(parts[name]["train"]), max_rows),
            test=spread(_rows(parts[name]["test"]), max_test_rows),
        )
        for name in names
    )


def spread(rows: Sequence[Row], most: int | None) -> tuple[Row, ...]:
    """All rows, or `most` of them at even distances: files are often sorted by what they ask.

    >>> spread("abcdefgh", 3)
    ('a', 'c', 'f')
    """
    if most is None or most >= len(rows):
        return tuple(rows)
    return tuple(rows[index * len(rows) // most] for index in range(most))


def ordered(tasks: Sequence[Task], order: Order) -> tuple[Task, ...]:
    """The tasks in the order of the rounds.

    Reversed, a task that overrides another still comes after it: what was overridden would
    otherwise be the newer truth.
    """
    if order == "given":
        return tuple(tasks)
    found = list(reversed(tasks))
    for task in tasks:
        stale = {answer for row in task.test for answer in row.forbid}
        last = max((i for i, other in enumerate(found) if _teaches(other, stale)), default=-1)
        at = found.index(task)
        if at < last:
            found.insert(last, found.pop(at))
    return tuple(found)


def choose_graders(tasks: Sequence[Task], chosen: Mapping[str, Grader]) -> dict[str, Grader]:
    """The grader of each task: the chosen one, else what its answers look like.

    Raises:
        InputError: a grader was chosen for a task that the stream does not have.
    """
    names = [task.name for task in tasks]
    if unknown := [name for name in chosen if name not in names]:
        raise InputError(f"no task {unknown[0]!r} to grade in the stream; it has {names}")
    return {task.name: chosen.get(task.name) or _default_grader(task) for task in tasks}


def _default_grader(task: Task) -> Grader:
    taught = [row.outputs[0] for row in task.train]
    return default_grader(taught, [answer for row in task.test for answer in row.outputs])


def _teaches(task: Task, answers: set[str]) -> bool:
    return any(answer in row.outputs[0] for row in task.train for answer in answers)


def _rows(path: Path) -> tuple[StreamRow, ...]:
    rows = read_jsonl(path)
    if not rows:
        raise InputError(f"{path} has no rows", path=str(path))
    return tuple(_row(raw, path, number) for number, raw in enumerate(rows, start=1))


def _row(raw: Any, path: Path, number: int) -> StreamRow:  # Any: the JSON edge
    where = f"row {number} of {path}"
    if not isinstance(raw, dict) or not isinstance(raw.get("instruction"), str):
        raise InputError(f"{where} needs the text `instruction`", path=str(path))
    given = raw.get("input") or ""
    if not isinstance(given, str):
        raise InputError(f"{where}: `input` must be text, got {given!r}", path=str(path))
    prompt = clean(f"{raw['instruction']}\n\n{given}")
    outputs = _texts(raw.get("outputs"), "outputs", where)
    if not prompt or not outputs or not all(outputs):
        raise InputError(f"{where} needs a prompt and `outputs` that are not empty")
    forbid = _texts(raw.get("forbid") or [], "forbid", where)
    number_of = f"{path.name.removesuffix('.jsonl')}/{number}"
    return StreamRow(id=number_of, prompt=prompt, outputs=outputs, forbid=forbid)


def _texts(raw: Any, name: str, where: str) -> tuple[str, ...]:  # Any: the JSON edge
    if not isinstance(raw, list) or not all(isinstance(part, str) for part in raw):
        raise InputError(f"{where}: `{name}` must be a list of texts, got {raw!r}")
    return tuple(clean(part) for part in raw)
