"""Two rounds of the desk, as the product trains them: what is gained, kept and forgotten.

    python tests/bench/round_recipe.py [--out DIR] [--seed 1] [--config '{"epochs": 8}']

Trains and scores in processes of their own, through the same job files as the lifecycle. Prints a
table and, as the last line, `RESULT {json}`. Seconds depend on what else the machine does: compare
tokens first.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rig.rounds import DESK, example, jsonl, likelihood, process, write_suite

from perennial.infra.settings import TrainingSettings
from perennial.training.examples import Example, write_examples
from perennial.training.general import PACKAGED_PROBE, PACKAGED_REPLAY, load_general
from perennial.training.holdout import split_holdout
from perennial.training.job import left_by
from perennial.training.replay import ReplayStore

Fact = dict[str, Any]


def main() -> int:
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    act1, act2 = jsonl(DESK / "act1.jsonl"), jsonl(DESK / "act2.jsonl")
    general = [
        example(f"g{i}", *pair, "general") for i, pair in enumerate(load_general(PACKAGED_REPLAY))
    ]
    config = {"seed": args.seed, **json.loads(args.config)}
    first = split_holdout(corrections(act1), args.holdout).train
    second = split_holdout(corrections(act2), args.holdout).train
    memory = ReplayStore(capacity=2000).add(first, "r1")
    replay = memory.supersede(second).rows
    rounds = [
        train(args, "round1", first, (), general, None, config),
        train(args, "round2", second, replay, general, "round1/adapter", config),
    ]
    scores = evaluate(args, suites(act1, act2, args.dolly))
    report(scores, rounds, args, len(memory.rows) - len(replay))
    return 0


def train(
    args: argparse.Namespace,
    name: str,
    new: Sequence[Example],
    replay: Sequence[Example],
    general: Sequence[Example],
    parent: str | None,
    config: dict[str, Any],
) -> dict[str, Any]:
    """The summary of one training process."""
    job: dict[str, Any] = {
        **model(args),
        "parent_adapter": parent,
        **(left_by((args.out / parent).resolve()) if parent else {}),
        "config": config,
    }
    for kind, rows in (("train", new), ("replay", replay), ("general", general)):
        write_examples(args.out / f"{name}-{kind}.jsonl", rows)
        job[f"{kind}_rows"] = f"{name}-{kind}.jsonl"
    started = time.monotonic()
    summary = process(args.out, "train", job, name)
    return {**summary, "process_s": time.monotonic() - started}


def evaluate(args: argparse.Namespace, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Suite summaries by adapter."""
    for name, suite in rows.items():
        write_suite(args.out, f"suite-{name}", suite)
    job = {
        **model(args),
        "adapters": {"base": None, "round1": "round1/adapter", "round2": "round2/adapter"},
        "suites": {name: f"suite-{name}.jsonl" for name in rows},
    }
    return process(args.out, "evaluate", job, "scores")


def suites(act1: list[Fact], act2: list[Fact], dolly: Path | None) -> dict[str, list[Any]]:
    changed = [fact for fact in act2 if fact["supersedes"]]
    gone = {fact["supersedes"] for fact in changed}
    found = {
        "act1": held_out(act1),
        "act1_kept": held_out([fact for fact in act1 if fact["id"] not in gone]),
        "act2": held_out(act2),
        "stale": [
            {**row, "must": [fact["forbid"]], "forbid": []}
            for fact in changed
            for row in held_out([fact])
        ],
        "general": [
            likelihood(f"p{i}", *pair) for i, pair in enumerate(load_general(PACKAGED_PROBE))
        ],
    }
    if dolly is not None:
        rows = [row for row in jsonl(dolly) if not row["input"] and 60 < len(row["output"]) < 400]
        found["dolly"] = [
            likelihood(f"d{i}", row["instruction"], row["output"])
            for i, row in enumerate(rows[:24])
        ]
    return found


def report(
    scores: dict[str, Any], rounds: list[dict[str, Any]], args: argparse.Namespace, num_left: int
) -> None:
    results = scores["results"]
    graded = ("act1", "act1_kept", "act2", "stale")
    plain = [name for name in results["base"] if name not in graded]
    print(f"{'':8}" + "".join(f"{name:>12}" for name in (*graded, *plain)))
    for name, row in results.items():
        right = [f"{row[suite]['accuracy']:12.1%}" for suite in graded]
        nats = [f"{row[suite]['nll']:12.3f}" for suite in plain]
        print(f"{name:8}" + "".join(right + nats))
    for summary in rounds:
        print(
            f"{summary['num_tokens']} tokens, {summary['num_steps']} steps, "
            f"{summary['process_s']:.0f} s, {summary['num_threads']} threads, "
            f"peak {summary['peak_rss_mb']:.0f} MB"
        )
    base = results["base"]
    result = {
        "seed": args.seed,
        "config": rounds[0]["config"],
        "accuracy": {n: {s: row[s]["accuracy"] for s in graded} for n, row in results.items()},
        "nll_delta": {
            n: {s: row[s]["nll"] - base[s]["nll"] for s in plain} for n, row in results.items()
        },
        "num_tokens": [summary["num_tokens"] for summary in rounds],
        "process_s": [round(summary["process_s"], 1) for summary in rounds],
        "peak_rss_mb": max(summary["peak_rss_mb"] for summary in rounds),
        "num_superseded": num_left,
    }
    print("RESULT " + json.dumps(result))


def model(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "base_model": args.base_model,
        "cache_dir": str((args.out / "models").resolve()),
        "num_threads": args.threads,
    }


def corrections(facts: list[Fact]) -> list[Example]:
    return [
        example(f"{fact['id']}/{index}", question, fact["answer"])
        for fact in facts
        for index, question in enumerate(fact["questions"])
    ]


def held_out(facts: list[Fact]) -> list[dict[str, Any]]:
    return [
        {
            **likelihood(f"{fact['id']}/h{index}", question, fact["answer"]),
            "rule": "must",
            "must": fact["must"],
            "forbid": fact["forbid"],
            "cluster": fact["id"],
        }
        for fact in facts
        for index, question in enumerate(fact["held_out"])
    ]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    found.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir()) / "perennial-round-recipe",
        help="folder for rows, adapters, scores",
    )
    found.add_argument("--base-model", default="smollm2-135m")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--config", default="{}", help="fields of the recipe to change, as JSON")
    found.add_argument(
        "--holdout",
        type=float,
        default=TrainingSettings().holdout,
        help="share kept back, as in a round",
    )
    found.add_argument("--threads", type=int, default=None)
    found.add_argument("--dolly", type=Path, default=None, help="a second general probe (JSONL)")
    return found


if __name__ == "__main__":
    sys.exit(main())
