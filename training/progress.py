"""How far a run is: a bar in a terminal, lines elsewhere, and `progress.jsonl` for plots.

The file only grows. After a restart a step may appear twice; the later line counts.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What one step did. Losses in nats a token; None where the batch had no such row."""

    step: int
    num_steps: int
    loss: float
    cross_entropy: float | None
    kl: float | None
    lr: float
    grad_norm: float
    num_tokens: int
    elapsed_s: float
    preference: float | None = None


class ProgressLog:
    """Writes each step to a file and shows it; use as a context manager."""

    def __init__(self, path: Path, console: Console) -> None:
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._console = console
        self._started = time.monotonic()
        self._num_tokens = 0
        self._num_seen = 0
        self._last_line = 0.0
        self._bar = _bar(console) if console.is_terminal else None
        self._task = self._bar.add_task("train", total=None, note="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        self._file.close()

    def step(self, record: StepRecord) -> None:
        """Append the record and show it."""
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()
        self._num_tokens += record.num_tokens
        self._num_seen += 1
        now = time.monotonic()
        rate = self._num_tokens / max(now - self._started, 1e-9)
        eta_s = (now - self._started) / self._num_seen * (record.num_steps - record.step)
        note = f"loss {record.loss:.3f} · {rate:.0f} tokens/s"
        if self._bar and self._task is not None:
            self._bar.update(self._task, total=record.num_steps, completed=record.step, note=note)
        elif now - self._last_line >= _LINE_EVERY_S or record.step == record.num_steps:
            self._last_line = now
            text = f"step {record.step}/{record.num_steps} · {note} · ETA {eta_s:.0f} s"
            self._console.print(text, highlight=False)


def read_progress(path: Path) -> list[StepRecord]:
    """The records by step, the latest of each."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line)
    latest = {row["step"]: StepRecord(**row) for row in rows}
    return [latest[step] for step in sorted(latest)]


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )
