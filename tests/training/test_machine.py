"""What is told about this machine."""

import subprocess
import sys

PEAK = "from perennial.training.machine import peak_rss_mb; print(peak_rss_mb())"


def test_the_peak_is_not_that_of_the_process_which_started_this_one() -> None:
    ballast = b"\1" * 10**9
    told = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True)
    assert 50 < float(told.stdout) < len(ballast) / 1e6
