"""A lock file has one holder, and none is left behind by the dead."""

import subprocess
import sys
from pathlib import Path

import pytest

from perennial.infra.errors import UnavailableError
from perennial.infra.locks import hold

_HOLDER = """
import sys
from pathlib import Path
from perennial.infra.locks import hold
with hold(Path(sys.argv[1]), timeout_s=0):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_holder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run" / "up.lock"

    with (
        hold(path, timeout_s=0),
        pytest.raises(UnavailableError, match="held by another process"),
        hold(path, timeout_s=0),
    ):
        pass


def test_killed_holder_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "up.lock"
    argv = [sys.executable, "-c", _HOLDER, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UnavailableError), hold(path, timeout_s=0):
            pass
        holder.kill()
        holder.wait()

        with hold(path, timeout_s=5):
            pass


def test_lock_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be opened"), hold(tmp_path, timeout_s=0):
        pass
