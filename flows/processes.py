"""Runs training, evaluation and drafting in processes of their own, one for each output folder.

The child holds a lock on its folder. A worker that comes back after a kill waits for a child that
its predecessor left behind, instead of running a second one beside it.
"""

import contextlib
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from perennial.infra.errors import (
    ConfigError,
    DivergedError,
    ModelMissingError,
    OutOfMemoryError,
    PerennialError,
    TrainingError,
    UnavailableError,
)
from perennial.infra.locks import hold
from perennial.infra.settings import Settings, child_environment

log = logging.getLogger(__name__)

Json = dict[str, Any]  # Any: JSON, as jobs, summaries and results of steps are

_STOP_S = 20.0
_ERRORS: Mapping[int, type[PerennialError]] = {
    2: ConfigError,
    3: ModelMissingError,
    4: DivergedError,
    6: UnavailableError,
    7: OutOfMemoryError,
}


def model_fields(settings: Settings) -> Json:
    """What every job says of the model and of where it is computed."""
    return {
        "base_model": settings.model.name,
        "cache_dir": str(settings.model.cache_dir),
        "num_threads": settings.model.threads or None,
        "device": settings.model.device,
        "dtype": settings.model.dtype,
    }


def run_training_process(
    command: Literal["train", "evaluate", "draft"],
    job: Path,
    out: Path,
    settings: Settings,
    *,
    on_line: Callable[[str], None],
) -> None:
    """Return when `out` is filled; each line that the child prints goes to `on_line`.

    Raises:
        ConfigError, ModelMissingError, DivergedError, OutOfMemoryError, TrainingError: as the child
            said, with its last lines.
        UnavailableError: the disk is full; the next run goes on from the last checkpoint.
    """
    out.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "perennial.training.run", command, str(job), str(out)]
    with hold(out.parent / f".{out.name}.lock", timeout_s=settings.training.timeout_s) as lock:
        child = subprocess.Popen(
            argv,
            env=child_environment(settings, {"PYTHONUNBUFFERED": "1"}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=(lock,),
        )
        lines = _follow(child, settings.training.timeout_s, on_line)
    if child.returncode:
        kind = _ERRORS.get(child.returncode, TrainingError)
        raise kind(
            f"{command} ended with status {child.returncode} for {job}: {' / '.join(lines[-5:])}",
            status=child.returncode,
        )


def _follow(
    child: subprocess.Popen[str], timeout_s: float, on_line: Callable[[str], None]
) -> list[str]:
    lines: list[str] = []
    is_late = threading.Event()

    def stop_late() -> None:
        is_late.set()
        _stop(child)

    # A child that hangs prints nothing, so the loop below never comes to look at a clock.
    watch = threading.Timer(timeout_s, stop_late)
    assert child.stdout is not None  # it is a pipe
    watch.start()
    try:
        for line in child.stdout:
            lines.append(line.rstrip())
            on_line(line.rstrip())
        child.wait()
    finally:
        watch.cancel()
        _stop(child)
        child.stdout.close()
    if is_late.is_set() and child.returncode:
        raise TrainingError(f"stopped after {timeout_s:.0f} s (training.timeout_s)")
    return lines


def _stop(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_STOP_S)
        child.kill()
        child.wait()
