"""What a run has told of its steps, after a full disk, a kill or another job."""

import io
from pathlib import Path

from rich.console import Console

from perennial.training.progress import ProgressLog, StepRecord, read_progress


def record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step,
        num_steps=9,
        loss=loss,
        cross_entropy=loss,
        kl=None,
        lr=1e-3,
        grad_norm=1.0,
        num_tokens=5,
        elapsed_s=0.1,
    )


def tell(path: Path, *records: StepRecord) -> None:
    with ProgressLog(path, Console(file=io.StringIO())) as log:
        for one in records:
            log.step(one)


def test_a_line_that_a_full_disk_cut_short_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tell(path, record(1), record(2))
    path.write_bytes(path.read_bytes()[:-40])
    tell(path, record(3))
    assert read_progress(path) == [record(1), record(3)]


def test_lines_that_were_once_joined_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tell(path, record(1), record(2))
    path.write_bytes(path.read_bytes()[:-40] + b'{"step": 3}\n\0\xff\n7\n')
    tell(path, record(4))
    assert read_progress(path) == [record(1), record(4)]


def test_steps_before_a_restart_and_of_an_earlier_job_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tell(path, *(record(step) for step in range(1, 6)))
    tell(path, record(4, loss=2.0))
    assert read_progress(path) == [record(1), record(2), record(3), record(4, loss=2.0)]
    tell(path, record(1, loss=3.0))
    assert read_progress(path) == [record(1, loss=3.0)]
