import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from perennial.flows.cli import main
from perennial.flows.doctor import Level, examine
from perennial.flows.wiring import connect
from perennial.infra.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"PERENNIAL_HOME": str(tmp_path)})


def _invoke(home: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"PERENNIAL_HOME": str(home)}).invoke(main, arguments)
    return result.exit_code, result.output


def test_status_of_a_new_installation_says_what_to_do(tmp_path: Path) -> None:
    code, output = _invoke(tmp_path, "status")

    assert code == 0
    assert "nothing was promoted yet" in output
    assert "perennial check" in output


def test_approving_what_nobody_asked_about_is_a_clear_error(tmp_path: Path) -> None:
    code, output = _invoke(tmp_path, "approve", "support-v9-00000000", "--by", "robin")

    assert code == 2
    assert "not_found" in output


def test_rollback_without_a_promotion_is_a_clear_error(tmp_path: Path) -> None:
    code, output = _invoke(tmp_path, "rollback", "--by", "robin", "--reason", "test")

    assert (code, "nothing to go back to" in output) == (2, True)


def test_unknown_setting_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[api]\nprot = 1\n")

    code, output = _invoke(tmp_path, "--config", str(tmp_path / "bad.toml"), "status")

    assert code == 2
    assert "unknown setting 'api.prot'" in output
    assert "Traceback" not in output


def test_flows_of_a_command_see_the_file_that_it_was_given(tmp_path: Path) -> None:
    file = tmp_path / "ours.toml"
    file.write_text(f"home = '{tmp_path / 'home'}'\ntask = 'support'\n[check]\nmin_rows = 17\n")
    CliRunner().invoke(main, ["--config", str(file), "status"])

    with connect() as deps:
        assert deps.settings == load_settings({}, file)


def test_doctor_says_how_to_mend_every_finding(settings: Settings) -> None:
    findings = examine(settings)

    assert [f.name for f in findings if f.level is not Level.OK and not f.mend] == []


def test_demo_refuses_a_folder_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")

    code, output = _invoke(tmp_path, "demo", "--home", str(tmp_path))

    assert (code, "no demo made" in output) == (2, True)
    assert (tmp_path / "precious.txt").exists()


def test_help_answers_within_a_second_of_python_itself() -> None:
    def seconds(*argv: str) -> float:
        started = time.monotonic()
        subprocess.run([sys.executable, *argv], check=True, capture_output=True)
        return time.monotonic() - started

    best = min(seconds("-m", "perennial.flows.cli", "--help") for _ in range(3))

    assert best - seconds("-c", "pass") < 1.0
