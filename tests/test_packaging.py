"""The wheel holds the tree, and the command line starts light."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLIENT = ROOT / "feedback" / "client"  # a distribution of its own
FOLDERS = ("flows", "feedback", "serving", "monitoring", "training", "registry", "infra")
HEAVY = ("torch", "mlflow", "evidently", "transformers", "prefect", "pandas", "sklearn")


def _tracked(*pathspecs: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *pathspecs],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    shipped = (".py", ".typed", ".jsonl", ".mako")
    return {name for name in listed if name.endswith(shipped) and (ROOT / name).exists()}


def _built(project: Path, wheels: Path) -> set[str]:
    """The files of the wheel of `project`, without its metadata."""
    command = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    # A build folder in the tree still holds the files that were deleted since.
    config = wheels / "build.cfg"
    config.write_text(f"[build]\nbuild_base = {wheels / 'build'}\n")
    subprocess.run(
        [sys.executable, "-c", command, str(wheels)],
        cwd=project,
        env={**os.environ, "DIST_EXTRA_CONFIG": str(config)},
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        return {name for name in wheel.namelist() if "dist-info" not in name}


def test_wheel_holds_exactly_the_tree(tmp_path: Path) -> None:
    names = {name.removeprefix("perennial/") for name in _built(ROOT, tmp_path)}

    assert names == _tracked(*FOLDERS, ":!feedback/client")


def test_wheel_of_the_client_holds_exactly_its_tree(tmp_path: Path) -> None:
    project = shutil.copytree(CLIENT, tmp_path / "client")

    names = {f"feedback/client/src/{name}" for name in _built(project, tmp_path)}

    assert names == _tracked("feedback/client/src")


def test_command_line_loads_no_heavy_package() -> None:
    code = f"import perennial.flows.cli, sys; print([m for m in {HEAVY} if m in sys.modules])"

    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )

    assert loaded.stdout.strip() == "[]"
