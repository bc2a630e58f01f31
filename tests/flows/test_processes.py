"""What the training process says comes back as the error that it means."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from perennial.flows.processes import run_training_process
from perennial.infra.errors import (
    ConfigError,
    DivergedError,
    ModelMissingError,
    OutOfMemoryError,
    TrainingError,
    UnavailableError,
)
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


def test_what_a_setting_did_and_what_the_machine_refused_are_told_apart(
    tmp_path: Path, settings: Settings
) -> None:
    fast = {"config": {"lr": 1e30, "max_grad_norm": 1e30, "rank": 2}}
    diverging = write_job(tmp_path / "fast", **fast)
    refused = write_job(tmp_path / "huge")
    grow(tmp_path / "huge/tiny")

    for job, kind in ((diverging, DivergedError), (refused, OutOfMemoryError)):
        with pytest.raises(kind) as caught:
            run_training_process("train", job, job.parent / "out", settings, on_line=print)
        assert type(caught.value) is kind


@pytest.mark.timeout(60)
def test_a_child_that_prints_nothing_is_stopped_in_time(tmp_path: Path, settings: Settings) -> None:
    job = tmp_path / "job.json"
    os.mkfifo(job)  # nobody writes into it: whoever reads it hangs
    brief = settings.training.model_copy(update={"timeout_s": 1})
    limited = settings.model_copy(update={"training": brief})

    with pytest.raises(TrainingError, match=r"stopped after 1 s \(training\.timeout_s\)"):
        run_training_process("train", job, tmp_path / "out", limited, on_line=lambda _: None)


def grow(model: Path) -> None:
    """Make a model of more than any memory holds; its large weights are not in the file."""
    config, weights = model / "config.json", model / "model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 10**14}))
    kept = {name: weight for name, weight in load_file(weights).items() if "mlp" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
