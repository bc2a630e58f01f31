"""What a person watches during the demo: bars and spinners in a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Screen:
    """Shows steps one after the other, each with the time since the start."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._started = time.monotonic()

    def title(self, text: str) -> None:
        """A heading."""
        self._console.print(f"\n[bold]{text}[/bold]")

    def say(self, text: str) -> None:
        """A result of the step before."""
        self._console.print(f"        {text}", style="dim")

    def show(self, thing: RenderableType) -> None:
        """A table or a panel."""
        self._console.print()
        self._console.print(thing)

    @contextmanager
    def step(self, text: str) -> Iterator[Callable[[str], None]]:
        """A step of unknown length; the yielded function shows what it is doing now."""
        self._stamp(text)
        if not self._console.is_terminal:
            yield self._line_per_change()
            return
        with self._console.status("") as status:
            yield lambda now: status.update(f"[dim]{now}[/dim]")

    @contextmanager
    def bar(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """A step of `total` parts; call the yielded function after each, from any thread."""
        if not self._console.is_terminal:
            self._stamp(f"{text}: {total}")
            yield lambda: None
            return
        columns = (TextColumn(self._clock() + " {task.description}"), BarColumn(),
                   MofNCompleteColumn(), TimeElapsedColumn())  # fmt: skip
        with Progress(*columns, console=self._console) as progress:
            part = progress.add_task(text, total=total)
            yield lambda: progress.advance(part)

    def _line_per_change(self) -> Callable[[str], None]:
        last = ""
        guard = threading.Lock()

        def say(now: str) -> None:
            nonlocal last
            with guard:
                if now and now != last:
                    last = now
                    self.say(f"{self._clock()} {now}")

        return say

    def _stamp(self, text: str) -> None:
        self._console.print(f"{self._clock()} {text}")

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 60:3d}:{seconds % 60:02d}"
