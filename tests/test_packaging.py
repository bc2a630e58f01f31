"""The wheel holds the tree, and the command line starts light."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("flows", "feedback", "serving", "monitoring", "training", "registry", "infra")
HEAVY = ("torch", "mlflow", "evidently", "transformers", "prefect", "pandas", "sklearn")


def _tracked() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    shipped = (".py", ".typed", ".jsonl", ".mako")
    return {name for name in listed if name.endswith(shipped) and (ROOT / name).exists()}


def test_wheel_holds_exactly_the_tree(tmp_path: Path) -> None:
    command = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", command, str(tmp_path)], cwd=ROOT, check=True, capture_output=True
    )

    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {n.removeprefix("perennial/") for n in wheel.namelist() if "dist-info" not in n}

    assert names == _tracked()


def test_command_line_loads_no_heavy_package() -> None:
    code = f"import perennial.flows.cli, sys; print([m for m in {HEAVY} if m in sys.modules])"

    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )

    assert loaded.stdout.strip() == "[]"
