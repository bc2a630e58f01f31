"""Ids sort by time and never repeat."""

import re
import subprocess
import sys

from perennial.infra.clock import new_id

_FORK = """
import os
from perennial.infra.clock import new_id
new_id("x")
if os.fork() == 0:
    print("child", new_id("x")[-18:], flush=True)
    os._exit(0)
os.wait()
print("parent", new_id("x")[-18:], flush=True)
"""


def test_ids_are_version_7_and_unique() -> None:
    ids = [new_id("int") for _ in range(5000)]

    assert len(set(ids)) == 5000
    assert all(re.fullmatch(r"int_[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", id) for id in ids)
    assert [id[:16] for id in ids] == sorted(id[:16] for id in ids)


def test_forked_child_does_not_repeat_its_parent() -> None:
    lines = subprocess.check_output([sys.executable, "-c", _FORK], text=True).split()

    assert lines[1] != lines[3]
