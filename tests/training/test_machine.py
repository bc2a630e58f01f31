"""What is told about this machine."""

import math
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from perennial.training.machine import choose_threads, cpu_quota, threads_for

PEAK = "from perennial.training.machine import peak_rss_mb; print(peak_rss_mb())"


def test_the_peak_is_not_that_of_the_process_which_started_this_one() -> None:
    ballast = b"\1" * 10**9
    told = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True)
    assert 50 < float(told.stdout) < len(ballast) / 1e6


@pytest.mark.parametrize(
    ("num_allowed", "quota", "idle_share", "num"),
    [
        (2, math.inf, 1.0, 2),
        (64, math.inf, 1.0, 16),
        (64, 2.0, 1.0, 2),
        (64, 2.5, 0.9, 2),
        (64, 0.5, 1.0, 1),
        (8, 6.0, 0.5, 4),
        (4, math.inf, 0.02, 1),
    ],
)
def test_threads_are_the_idle_cores_within_the_quota(
    num_allowed: int, quota: float, idle_share: float, num: int
) -> None:
    assert threads_for(num_allowed, quota, idle_share) == num


def test_a_number_of_threads_that_is_given_is_taken_without_a_look_at_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(interval: float) -> float:
        raise AssertionError(f"waited for {interval} s")

    monkeypatch.setattr(psutil, "cpu_percent", look)
    num_before = torch.get_num_threads()
    try:
        assert choose_threads(2) == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_before)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_a_containers_quota_is_read(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota
