import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from perennial.infra.artifacts import MANIFEST, publish, read_manifest, verify, write_atomic
from perennial.infra.errors import IntegrityError

PUBLISHER = """
import os, signal, sys
from pathlib import Path
from perennial.infra.artifacts import publish

def write(folder):
    (folder / "a.txt").write_text("complete")
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)

publish(Path(sys.argv[1]), write)
"""


def _write(folder: Path) -> None:
    (folder / "a.txt").write_text("a")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("b")


def test_published_folder_verifies_and_publishing_again_changes_nothing(tmp_path: Path) -> None:
    first = publish(tmp_path / "out", _write)

    second = publish(tmp_path / "out", lambda _: pytest.fail("written twice"))

    assert first == second == verify(tmp_path / "out")
    assert set(first.files) == {"a.txt", "sub/b.txt"}


def test_killed_publisher_leaves_nothing_to_find_and_the_next_run_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "out"
    dead = subprocess.run([sys.executable, "-c", PUBLISHER, str(target), "die"], check=False)

    assert dead.returncode == -signal.SIGKILL
    assert not target.exists()

    subprocess.run([sys.executable, "-c", PUBLISHER, str(target), "live"], check=True)
    assert verify(target).files.keys() == {"a.txt"}


def _flip(folder: Path) -> None:
    (folder / "a.txt").write_text("z")


def _add(folder: Path) -> None:
    (folder / "more.txt").write_text("z")


def _drop(folder: Path) -> None:
    (folder / "a.txt").unlink()


def _tear(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 10)


@pytest.mark.parametrize("damage", [_flip, _add, _drop, _tear])
def test_damaged_folder_is_refused(tmp_path: Path, damage: object) -> None:
    publish(tmp_path / "out", _write)
    assert callable(damage)
    damage(tmp_path / "out")

    with pytest.raises(IntegrityError):
        verify(tmp_path / "out")


def test_digest_depends_on_content_only(tmp_path: Path) -> None:
    one, two = publish(tmp_path / "one", _write), publish(tmp_path / "two", _write)

    assert one.digest == two.digest == read_manifest(tmp_path / "two").digest


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, b"old")

    with pytest.raises(TypeError):
        write_atomic(path, "text, not bytes")  # type: ignore[arg-type]  # the mistake under test

    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
