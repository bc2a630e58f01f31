"""What the training process says comes back as the error that it means."""

from pathlib import Path

import pytest

from perennial.flows.processes import run_training_process
from perennial.infra.errors import ConfigError, ModelMissingError, UnavailableError
from perennial.infra.settings import Settings, load_settings
from tests.training.builders import write_job


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "perennial.toml").touch()
    return load_settings({"PERENNIAL_HOME": str(tmp_path)}, tmp_path / "perennial.toml")


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"config": {"rank": -1}}, ConfigError),
        ({"base_model": "no-such-model"}, ModelMissingError),
        ({}, UnavailableError),
    ],
)
def test_an_exit_status_is_the_error_that_it_stands_for(
    tmp_path: Path, settings: Settings, fields: dict[str, object], kind: type[Exception]
) -> None:
    job, out = write_job(tmp_path / "job", **fields), tmp_path / "out"
    out.mkdir()
    (out / "checkpoints").touch()  # where a folder should be: nothing can be written there
    with pytest.raises(kind, match="train ended with status") as caught:
        run_training_process("train", job, out, settings, on_line=lambda _: None)
    assert type(caught.value) is kind
