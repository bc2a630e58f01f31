import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from perennial.infra import artifacts
from perennial.training import lora
from perennial.training.examples import write_examples
from perennial.training.progress import read_progress
from tests.training.builders import example, write_job

pytestmark = pytest.mark.slow

# Threads and the order of operations are fixed, so a resumed run is equal to the last bit here. The
# stated tolerance leaves room for BLAS kernels that depend on memory alignment.
TOLERANCE = 1e-6


def start(job: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "perennial.training.run", "train", str(job), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(job: Path, out: Path) -> tuple[int, str, str]:
    child = start(job, out)
    told, said = child.communicate(timeout=200)
    return child.returncode, told.decode(), said.decode()


def kill_at_step(job: Path, out: Path, step: int) -> None:
    """SIGKILL the process as soon as its progress file shows the step."""
    child = start(job, out)
    path = out / "progress.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= step:
            break
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(safetensors.torch.load_file(out / "adapter" / lora.WEIGHTS))


@pytest.mark.parametrize("mastered", [0.0, 4.0])
def test_a_killed_run_goes_on_to_the_same_adapter(tmp_path: Path, mastered: float) -> None:
    """Also when the losses it has seen decide what comes next."""
    write_examples(tmp_path / "replay.jsonl", [example(i, "replay") for i in range(50, 70)])
    config = {"rank": 4, "epochs": 6, "batch_tokens": 100, "lr": 5e-3, "checkpoint_steps": 3}
    config |= {"mastered": mastered}
    job = write_job(tmp_path, replay_rows="replay.jsonl", config=config)
    code, told, said = run(job, tmp_path / "whole")
    assert code == 0, said
    assert "loss" in told
    assert "tokens/s" in told
    for step in (1, 4, 8):
        out = tmp_path / f"killed-{step}"
        kill_at_step(job, out, step)
        assert not (out / "summary.json").exists()
        code, _, said = run(job, out)
        assert code == 0, said
        for name, weight in weights(tmp_path / "whole").items():
            torch.testing.assert_close(weights(out)[name], weight, atol=TOLERANCE, rtol=0)
        summary = json.loads((out / "summary.json").read_bytes())
        assert summary["resumed_from"] >= step - 3
        records = read_progress(out / "progress.jsonl")
        assert [record.step for record in records] == list(range(1, summary["num_steps"] + 1))
        assert not (out / "checkpoints").exists()


def test_a_finished_run_is_found_and_not_repeated(tmp_path: Path) -> None:
    job, out = write_job(tmp_path), tmp_path / "out"
    assert run(job, out)[0] == 0
    digest = artifacts.verify(out / "adapter").digest
    code, told, _ = run(job, out)
    assert code == 0
    assert "already trained" in told
    summary = json.loads((out / "summary.json").read_bytes())
    assert summary["adapter_digest"] == digest
    assert summary["peak_rss_mb"] > 50
    (out / "adapter" / lora.WEIGHTS).write_bytes(b"x")
    code, _, said = run(job, out)
    assert (code, said.partition(":")[0]) == (5, "integrity_failed")


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"config": {"rnak": 4}}, 2, "unknown training setting 'rnak'"),
        ({"trian_rows": "x"}, 2, "unknown ['trian_rows']"),
        ({"train_rows": "absent.jsonl"}, 2, "absent.jsonl"),
        ({"num_threads": "two"}, 2, "num_threads must be a positive int"),
        ({"base_model": "/nowhere/at-all"}, 3, "is not on this machine"),
        ({"config": {"lr": 1e30, "max_grad_norm": 1e30, "rank": 2}}, 4, "lower lr"),
    ],
)
def test_a_bad_job_ends_with_its_exit_code_and_one_clear_line(
    tmp_path: Path, fields: dict[str, object], code: int, message: str
) -> None:
    job = write_job(tmp_path, **fields)
    found, _, said = run(job, tmp_path / "out")
    assert found == code
    assert message in said
    assert "Traceback" not in said


def test_evaluation_writes_one_line_for_each_row_and_adapter(tmp_path: Path) -> None:
    job, out = write_job(tmp_path), tmp_path / "out"
    assert run(job, out)[0] == 0
    rows = [
        {
            "id": row.id,
            "messages": row.messages,
            "reference": row.completion,
            "rule": "exact",
            "cluster": row.subject,
        }
        for row in (example(n) for n in range(5))
    ]
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = {
        "base_model": str(tmp_path / "tiny"),
        "adapters": {"base": None, "candidate": "out/adapter"},
        "suites": {"target": "suite.jsonl"},
        "max_new_tokens": 8,
    }
    (tmp_path / "eval.json").write_text(json.dumps(body))
    command = [sys.executable, "-m", "perennial.training.run", "evaluate"]
    subprocess.run([*command, tmp_path / "eval.json", tmp_path / "scores"], check=True, timeout=200)
    results = {}
    for name in ("base", "candidate"):
        lines = (tmp_path / "scores" / name / "target.jsonl").read_text().splitlines()
        results[name] = [json.loads(line) for line in lines]
        assert [row["id"] for row in results[name]] == [row["id"] for row in rows]
        assert {row["cluster"] for row in results[name]} == {"s0", "s1", "s2"}
    means = [sum(row["nll"] for row in results[name]) for name in ("candidate", "base")]
    assert means[0] < means[1]
    summary = json.loads((tmp_path / "scores" / "summary.json").read_bytes())
    assert summary["results"]["base"]["target"]["num_graded"] == 5
