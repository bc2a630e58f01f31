"""How far a benchmark is: a bar with the time left in a terminal, elsewhere a line for a step."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_WHOLE_RUN_S = 1e7  # the speed is that of all steps so far: single ones take minutes


class StepBoard:
    """Shows steps as they begin and end; use as a context manager."""

    def __init__(self, console: Console, *, num_steps: int, num_done: int) -> None:
        self._console = console
        self._num_steps, self._num_done, self._num_ended = num_steps, num_done, 0
        self._started = self._began = time.monotonic()
        self._name = ""
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[line]}", markup=False, style="dim"),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=_WHOLE_RUN_S,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=num_done, line="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """A step begins."""
        self._name, self._began = name, time.monotonic()
        self._bar.update(self._task, description=name, line="")

    def line(self, text: str) -> None:
        """What the step's process says now."""
        self._bar.update(self._task, line=text)

    def end(self) -> None:
        """The step that began last has its result."""
        self._num_ended += 1
        self._bar.advance(self._task)
        if self._console.is_terminal:
            return
        now = time.monotonic()
        num = self._num_done + self._num_ended
        left_s = (now - self._started) / self._num_ended * (self._num_steps - num)
        took = f"{now - self._began:.0f} s · ETA {left_s:.0f} s"
        text = f"{num}/{self._num_steps} {self._name} · {took}"
        self._console.print(text, highlight=False, markup=False)
