"""How far a run is: a bar in a terminal, lines elsewhere, and `progress.jsonl` for plots.

The file only grows. Where a step comes again, a run went on from there or another began: lines
before it that tell of this step or of later ones no longer count.
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


class Meter:
    """Shows how far something is; use as a context manager."""

    def __init__(self, what: str, console: Console) -> None:
        self._what = what
        self._console = console
        self._last_line = 0.0
        self._bar = _bar(what, console) if console.is_terminal else None
        self._task = self._bar.add_task(what, total=None, note="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, done: int, total: int, note: str, eta_s: float) -> None:
        """Move the bar; without a terminal, a line every few seconds and one at the end."""
        now = time.monotonic()
        if self._bar and self._task is not None:
            self._bar.update(self._task, total=total, completed=done, note=note)
        elif now - self._last_line >= _LINE_EVERY_S or done == total:
            self._last_line = now
            text = f"{self._what} {done}/{total} · {note} · ETA {eta_s:.0f} s"
            self._console.print(text, highlight=False)


class ProgressLog:
    """Writes each step to a file and shows it; use as a context manager."""

    def __init__(self, path: Path, console: Console) -> None:
        self._file: IO[str] = path.open("a", encoding="utf-8")
        if path.read_bytes()[-1:] not in (b"", b"\n"):  # a full disk cut the last line
            self._file.write("\n")
        self._meter = Meter("step", console)
        self._started = time.monotonic()
        self._num_tokens = 0
        self._num_seen = 0

    def __enter__(self) -> Self:
        self._meter.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._meter.__exit__()
        self._file.close()

    def step(self, record: StepRecord) -> None:
        """Append the record and show it."""
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()
        self._num_tokens += record.num_tokens
        self._num_seen += 1
        elapsed_s = time.monotonic() - self._started
        eta_s = elapsed_s / self._num_seen * (record.num_steps - record.step)
        note = f"loss {record.loss:.3f} · {self._num_tokens / max(elapsed_s, 1e-9):.0f} tokens/s"
        self._meter.show(record.step, record.num_steps, note, eta_s)


def read_progress(path: Path) -> list[StepRecord]:
    """The records by step, the latest of each; what is no whole record is passed over."""
    found: list[StepRecord] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = StepRecord(**json.loads(line))
        except (TypeError, ValueError):
            continue
        while found and found[-1].step >= record.step:
            found.pop()
        found.append(record)
    return found


def _bar(what: str, console: Console) -> Progress:
    return Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )
