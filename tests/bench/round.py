"""One round beside the trainer a user would pick: the same rows, epochs, rank and threads.

    python tests/bench/round.py [--rows 64] [--epochs 3] [--threads 2] [--seed 0] [--out DIR]

Arms, each in a process of its own: our round (recipe `sft`, other settings as shipped), TRL's
SFTTrainer as it comes, and SFTTrainer at its best here (packing "bfd", as many tokens a step as we
take, no activation checkpointing). TRL gets our learning rate, since its own default learns nothing
in three epochs. Wall time is from loading the model to the saved adapter; caches are cold. All
adapters are then scored in one process on questions that none has seen, and on general answers.
Prints a table and, as the last line, `RESULT {json}`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from perennial.training import modelfiles
from perennial.training.config import TrainConfig
from perennial.training.examples import Example, read_examples, write_examples
from perennial.training.tokens import encode_example

DESK = Path(__file__).parents[2] / "flows" / "desk"
PEERS = ("trl-default", "trl-bfd")


def main() -> int:
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.arm:
        train_peer(args)
        return 0
    modelfiles.ensure_base_model(args.base_model, args.out / "models")
    facts = jsonl(DESK / "act1.jsonl")
    rows = [
        example(f"{fact['id']}/{i}", question, fact["answer"])
        for i in range(3)
        for fact in facts
        for question in fact["questions"][i : i + 1]
    ][: args.rows]
    write_examples(args.out / "rows.jsonl", rows)
    wall = {"perennial": train_ours(args), **{arm: run_peer(args, arm) for arm in PEERS}}
    report(args, len(rows), wall, held_out_losses(args, facts))
    return 0


def train_ours(args: argparse.Namespace) -> dict[str, float]:
    """Wall seconds and peak memory of our round, from its own summary."""
    config = {"recipe": "sft", "epochs": args.epochs, "seed": args.seed}
    job = {**model(args), "train_rows": "rows.jsonl", "config": config}
    process(args, "train", job, "perennial")
    summary = json.loads((args.out / "perennial" / "summary.json").read_bytes())
    return {name: summary[name] for name in ("wall_s", "peak_rss_mb")}


def run_peer(args: argparse.Namespace, arm: str) -> dict[str, float]:
    """The same of a peer, from the line that its process prints last."""
    values = ("rows", "epochs", "threads", "seed", "out", "base_model")
    argv = [sys.executable, __file__, "--arm", arm]
    for name in values:
        argv += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def train_peer(args: argparse.Namespace) -> None:
    """Train with TRL in this process; imports are not timed, as they are not for us."""
    import datasets
    import peft
    import torch
    import trl

    torch.set_num_threads(args.threads)
    ours = TrainConfig()
    rows = read_examples(args.out / "rows.jsonl")
    started = time.monotonic()
    folder = modelfiles.ensure_base_model(args.base_model, args.out / "models")
    tokenizer = modelfiles.load_tokenizer(folder)
    trainer = trl.SFTTrainer(
        model=modelfiles.load_model(folder),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([prepared(tokenizer, row) for row in rows]),
        peft_config=peft.LoraConfig(
            r=ours.rank, lora_alpha=ours.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=trl.SFTConfig(
            output_dir=str(args.out / f"{args.arm}-state"),
            num_train_epochs=args.epochs,
            learning_rate=ours.lr,
            completion_only_loss=True,
            seed=args.seed,
            use_cpu=True,
            bf16=False,  # it raises on this kind of processor
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **packed(args.arm, ours),
        ),
    )
    trainer.train()
    trainer.save_model(str(args.out / args.arm))
    wall_s = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mb = peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
    print("\n" + json.dumps({"wall_s": wall_s, "peak_rss_mb": peak_mb}))


def packed(arm: str, ours: TrainConfig) -> dict[str, Any]:
    """What the second peer sets beyond the defaults."""
    if arm == "trl-default":
        return {}
    return {
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": ours.batch_tokens,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": False,
    }


def held_out_losses(
    args: argparse.Namespace, facts: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Mean NLL by adapter and suite, all scored in one process."""
    known = {row.id.partition("/")[0] for row in read_examples(args.out / "rows.jsonl")}
    suites = {
        "held_out": [
            judged(f"{fact['id']}/h{i}", question, fact["answer"])
            for fact in facts
            if fact["id"] in known
            for i, question in enumerate(fact["held_out"])
        ],
        "general": [
            judged(f"p{i}", row["prompt"], row["answer"])
            for i, row in enumerate(jsonl(DESK / "general_probe.jsonl"))
        ],
    }
    for name, suite in suites.items():
        lines = "".join(json.dumps(row) + "\n" for row in suite)
        (args.out / f"suite-{name}.jsonl").write_text(lines, encoding="utf-8")
    adapters = {"base": None, "perennial": "perennial/adapter", **{arm: arm for arm in PEERS}}
    job = {
        **model(args),
        "adapters": adapters,
        "suites": {name: f"suite-{name}.jsonl" for name in suites},
    }
    process(args, "evaluate", job, "scores")
    results = json.loads((args.out / "scores" / "summary.json").read_bytes())["results"]
    return {arm: {name: row[name]["nll"] for name in suites} for arm, row in results.items()}


def report(
    args: argparse.Namespace,
    num_rows: int,
    measured: dict[str, dict[str, float]],
    losses: dict[str, dict[str, float]],
) -> None:
    print(f"\n{'':12}{'wall s':>9}{'peak MB':>9}{'held-out NLL':>14}{'general NLL':>13}")
    for arm, row in losses.items():
        cost = measured.get(arm)
        told = f"{cost['wall_s']:9.1f}{cost['peak_rss_mb']:9.0f}" if cost else " " * 18
        print(f"{arm:12}{told}{row['held_out']:14.3f}{row['general']:13.3f}")
    ours = measured["perennial"]["wall_s"]
    result = {
        "wall_vs_trl_default": round(ours / measured["trl-default"]["wall_s"], 3),
        "wall_vs_trl_bfd": round(ours / measured["trl-bfd"]["wall_s"], 3),
        "held_out_loss": {arm: round(row["held_out"], 4) for arm, row in losses.items()},
        "general_loss": {arm: round(row["general"], 4) for arm, row in losses.items()},
        "wall_s": {arm: round(row["wall_s"], 1) for arm, row in measured.items()},
        "peak_rss_mb": {arm: round(row["peak_rss_mb"]) for arm, row in measured.items()},
        "num_rows": num_rows,
        "epochs": args.epochs,
        "threads": args.threads,
        "seed": args.seed,
    }
    print("RESULT " + json.dumps(result))


def process(args: argparse.Namespace, command: str, job: dict[str, Any], out: str) -> None:
    path = args.out / f"{out}-job.json"
    path.write_text(json.dumps(job))
    argv = [sys.executable, "-m", "perennial.training.run", command, str(path), str(args.out / out)]
    subprocess.run(argv, check=True)


def model(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "base_model": args.base_model,
        "cache_dir": str((args.out / "models").resolve()),
        "num_threads": args.threads,
        "device": "cpu",  # as the peers
    }


def example(id_: str, question: str, answer: str) -> Example:
    return Example(id=id_, messages=(("user", question),), completion=answer, kind="correction")


def prepared(tokenizer: Any, row: Example) -> dict[str, Any]:
    """Token ids, the same for all arms: in a text "<|im_end|>" would forge a turn."""
    found = encode_example(tokenizer, row, TrainConfig().max_len)
    return {
        "input_ids": found.ids_T.tolist(),
        "completion_mask": found.label_mask_T.astype(int).tolist(),
    }


def judged(id_: str, question: str, answer: str) -> dict[str, Any]:
    return {"id": id_, "messages": [["user", question]], "reference": answer}


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    found.add_argument("--rows", type=int, default=64)
    found.add_argument("--epochs", type=int, default=3)
    found.add_argument("--threads", type=int, default=os.cpu_count())
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--base-model", default="smollm2-135m")
    found.add_argument("--arm", choices=PEERS, help=argparse.SUPPRESS)
    found.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir()) / f"perennial-round-{os.getpid()}",
        help="folder for rows, adapters, scores; a new one by default, so that caches are cold",
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
