"""What the benchmarks of rounds share: rows, the process that trains and scores, medians."""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perennial.training.examples import Example, Kind

DESK = Path(__file__).parents[3] / "flows" / "desk"
Figures = dict[str, float]  # of an arm: seconds, MB, nats a token, shares


def process(folder: Path, command: str, job: dict[str, Any], name: str) -> dict[str, Any]:
    """The summary of a training or evaluation process, which fills `folder/name`."""
    path, out = folder / f"{name}-job.json", folder / name
    path.write_text(json.dumps(job))
    argv = [sys.executable, "-m", "perennial.training.run", command, str(path), str(out)]
    subprocess.run(argv, check=True)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_bytes())
    return summary


def run_peer(script: str, args: argparse.Namespace, arm: str, seed: int) -> Figures:
    """The same figures of another trainer: the line that `script`, run for its arm, prints last."""
    argv = [sys.executable, script, "--arm", arm, "--seeds", str(seed)]
    for name in ("rows", "epochs", "threads", "out", "base_model"):
        if hasattr(args, name):
            argv += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    measured: Figures = json.loads(done.stdout.splitlines()[-1])
    return measured


def example(id_: str, question: str, answer: str, kind: Kind = "correction") -> Example:
    return Example(id=id_, messages=(("user", question),), completion=answer, kind=kind)


def likelihood(id_: str, question: str, answer: str) -> dict[str, Any]:
    """A row of a suite that is not graded."""
    return {"id": id_, "messages": [["user", question]], "reference": answer}


def write_suite(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def model(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "base_model": args.base_model,
        "cache_dir": "cache",  # of activations: one a seed, so that it is cold
        "num_threads": args.threads,
        "device": "cpu",  # as the peers
    }


def medians(rows: Sequence[Figures]) -> Figures:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def seeds(raw: str) -> list[int]:
    return [int(part) for part in raw.split(",")]
