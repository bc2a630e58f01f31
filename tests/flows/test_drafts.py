"""The base model writes general rows itself, in a process that may be killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from perennial.flows.curate import curate, data_folder, general_file
from perennial.flows.processes import run_training_process
from perennial.infra.errors import ConfigError, IntegrityError
from perennial.infra.settings import Settings, load_settings
from perennial.training import run
from perennial.training.examples import read_examples
from perennial.training.general import Draft, load_general
from tests.flows.test_curate import a_round, deps, first_round
from tests.training.builders import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def as_before() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


def settings(home: Path, **environment: str) -> Settings:
    (home / "perennial.toml").touch()
    return load_settings({"PERENNIAL_HOME": str(home), **environment}, home / "perennial.toml")


def write_job(folder: Path, model: Path, num_rows: int, seed: int = 0) -> Path:
    job = {"base_model": str(model), "num_rows": num_rows, "seed": seed, "num_threads": 1}
    path = folder / "drafts.json"
    path.write_text(json.dumps(job))
    return path


def written(out: Path) -> Path:
    return out / str(json.loads((out / "summary.json").read_bytes())["general"])


def test_a_round_takes_what_the_base_model_wrote(tmp_path: Path, parrot: Path) -> None:
    some = deps(tmp_path, first_round(), PERENNIAL_TRAINING__GENERAL_DRAFTS="5")
    calls = []

    def draft(job: dict[str, Any], out: Path) -> None:
        calls.append(job)
        path = write_job(tmp_path, parrot, job["num_rows"], job["seed"])
        assert run.main(["draft", str(path), str(out)]) == 0

    general = general_file(some.settings, draft)
    curate(some, a_round(1), None, general, data_folder(some, "rnd_1"))

    rows = read_examples(data_folder(some, "rnd_1") / "general.jsonl")
    assert calls == [{"num_rows": 5, "seed": 0}]
    assert tuple((row.question, row.completion) for row in rows) == load_general(general)
    assert len({row.question for row in rows if "box" in row.question}) == 5
    assert {row.kind for row in rows} == {"general"}


def test_without_drafts_the_supplied_file_or_the_packaged_is_taken(tmp_path: Path) -> None:
    def draft(job: dict[str, Any], out: Path) -> None:
        raise AssertionError("nothing is to be written")

    supplied = settings(tmp_path, PERENNIAL_TRAINING__GENERAL_FILE="/rows.jsonl")
    assert general_file(supplied, draft) == Path("/rows.jsonl")
    assert load_general(general_file(settings(tmp_path), draft))


def test_a_file_and_drafts_exclude_each_other(tmp_path: Path) -> None:
    both = {
        "PERENNIAL_TRAINING__GENERAL_FILE": "/rows.jsonl",
        "PERENNIAL_TRAINING__GENERAL_DRAFTS": "5",
    }
    with pytest.raises(ConfigError, match="set general_file or general_drafts, not both"):
        settings(tmp_path, **both)


def test_drafts_are_written_once_for_a_model_a_seed_and_a_number(
    tmp_path: Path, parrot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "drafts"
    found = {}
    for num_rows, seed in ((5, 0), (5, 1), (6, 0), (5, 0)):
        job = write_job(tmp_path, parrot, num_rows, seed)
        assert run.main(["draft", str(job), str(out)]) == 0
        found[num_rows, seed] = written(out)
    assert len(set(found.values())) == 3
    assert len(set(map(load_general, found.values()))) == 3
    assert capsys.readouterr().out.count("tokens/s") == 3
    found[5, 0].write_text("")
    assert run.main(["draft", str(job), str(out)]) == 5
    assert capsys.readouterr().err.startswith(f"{IntegrityError.code}: ")


def test_a_model_without_fit_drafts_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    endless = tiny_model()
    endless.get_input_embeddings().weight[tiny_tokenizer().eos_token_id] = 0.0
    endless.save_pretrained(save_tiny(tmp_path / "tiny"))
    job, out = write_job(tmp_path, tmp_path / "tiny", 2), tmp_path / "drafts"
    message = r"of 16 drafts of the base model 0 are fit, 2 are wanted.*supply .*general_file"
    with pytest.raises(ConfigError, match=message):
        run_training_process("draft", job, out, settings(tmp_path), on_line=lambda _: None)
    assert not (out / "summary.json").exists()


def test_a_lowered_number_takes_the_drafts_that_were_too_few(tmp_path: Path) -> None:
    endless = tiny_model()
    endless.get_input_embeddings().weight[tiny_tokenizer().eos_token_id] = 0.0
    endless.save_pretrained(save_tiny(tmp_path / "tiny"))
    out = tmp_path / "drafts"
    assert run.main(["draft", str(write_job(tmp_path, tmp_path / "tiny", 2)), str(out)]) == 2
    (batch,) = out.glob("*-batches/*.jsonl")
    fit = Draft(prompt="where is box 7?", answer="in hall 7", has_ended=True, num_tokens=9)
    batch.write_text(json.dumps(asdict(fit)) + "\n")

    assert run.main(["draft", str(write_job(tmp_path, tmp_path / "tiny", 1)), str(out)]) == 0

    assert load_general(written(out)) == (("where is box 7?", "in hall 7"),)
    assert not list(out.glob("*-batches"))


@pytest.mark.slow
def test_a_killed_draft_goes_on_to_the_same_rows(tmp_path: Path, parrot: Path) -> None:
    job = write_job(tmp_path, parrot, 36)
    assert run.main(["draft", str(job), str(tmp_path / "whole")]) == 0
    out, other = tmp_path / "killed", tmp_path / "other"
    _kill_at_batch(job, out, 2)
    assert not (out / "summary.json").exists()
    shutil.copytree(out, other)
    min(other.glob("*-batches/*.jsonl")).write_text("")

    for folder in (out, other):
        assert run.main(["draft", str(job), str(folder)]) == 0

    assert written(out).read_bytes() == written(tmp_path / "whole").read_bytes()
    assert written(other).read_bytes() != written(out).read_bytes()  # what was there was taken
    assert not list(out.glob("*-batches"))


def _kill_at_batch(job: Path, out: Path, num_batches: int) -> None:
    command = [sys.executable, "-m", "perennial.training.run", "draft", str(job), str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and child.poll() is None:
            if len(list(out.glob("*-batches/*.jsonl"))) >= num_batches:
                break
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
