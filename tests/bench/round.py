"""One round beside the trainer a user would pick: the same rows, epochs, rank and threads.

    python tests/bench/round.py [--rows 64] [--epochs 3] [--threads 2] [--seeds 0,1,2] [--out DIR]

Arms, each in a process of its own: our round (recipe `sft` on whole questions, `shrink` 1, other
settings as shipped), the same with an adapter on every layer as TRL has it, the first round of the
default recipe with the packaged general rows (all as shipped but the epochs), TRL's SFTTrainer as
it comes, and SFTTrainer at its best here (packing "bfd", as many tokens a step as we take, no
activation checkpointing). TRL gets our learning rate, since its own default learns nothing in three
epochs.
Wall time is from loading the model to the saved adapter; caches are cold. All adapters are then
scored in one process on questions that none has seen, and on general answers. All arms run once for
a seed, so that a slow minute of the machine does not fall on one of them. Prints a table of medians
and, as the last line, `RESULT {json}`: `wall_vs_trl_…` is the median, over the seeds, of the ratio
of our fastest arm that learned as much as that peer, null if none did; `recipe_wall_over` is that
of the default recipe, whatever it learned.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rig.rounds import (
    DESK,
    Figures,
    example,
    jsonl,
    likelihood,
    medians,
    model,
    process,
    run_peer,
    seeds,
    write_suite,
)

from perennial.training import modelfiles
from perennial.training.config import TrainConfig
from perennial.training.examples import Example, read_examples, write_examples
from perennial.training.general import PACKAGED_PROBE, PACKAGED_REPLAY, load_general
from perennial.training.machine import peak_rss_mb
from perennial.training.tokens import encode_example

# The same loss of the same tokens, and the whole of what was learned.
LIKE_PEERS = {"recipe": "sft", "question_dropout": 0.0, "shrink": 1.0}
RECIPE = "perennial-recipe"
OURS: Mapping[str, Mapping[str, Any]] = {
    "perennial": LIKE_PEERS,
    "perennial-all-layers": {**LIKE_PEERS, "top_layers": 99},
    RECIPE: {},
}
PEERS = ("trl-default", "trl-bfd")
SUITES = ("held_out", "general")


def main() -> int:
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.arm:
        train_peer(args)
        return 0
    folder = modelfiles.ensure_base_model(args.base_model, args.out / "models")
    args.base_model = str(folder.resolve())
    facts = jsonl(DESK / "act1.jsonl")
    rows = [
        example(f"{fact['id']}/{i}", question, fact["answer"])
        for i in range(3)
        for fact in facts
        for question in fact["questions"][i : i + 1]
    ][: args.rows]
    write_examples(args.out / "rows.jsonl", rows)
    general = (example(f"g{i}", *pair) for i, pair in enumerate(load_general(PACKAGED_REPLAY)))
    write_examples(
        args.out / "general_rows.jsonl", [replace(row, kind="general") for row in general]
    )
    write_suites(args.out, rows, facts)
    report(args, len(rows), [measure(args, seed) for seed in args.seeds])
    return 0


def measure(args: argparse.Namespace, seed: int) -> dict[str, Figures]:
    """Every arm once: what it cost, and its losses."""
    out = args.out / f"seed-{seed}"
    out.mkdir(exist_ok=True)
    found = {arm: train_ours(args, arm, seed) for arm in OURS}
    found |= {arm: run_peer(__file__, args, arm, seed) for arm in PEERS}
    return {arm: row | found.get(arm, {}) for arm, row in losses(args, seed).items()}


def train_ours(args: argparse.Namespace, arm: str, seed: int) -> Figures:
    """Wall seconds and peak memory of our round, from its own summary."""
    config = {**OURS[arm], "epochs": args.epochs, "seed": seed}
    job = {**model(args), "train_rows": "../rows.jsonl", "config": config}
    if arm == RECIPE:
        job["general_rows"] = "../general_rows.jsonl"
    out = args.out / f"seed-{seed}"
    summary = process(out, "train", job, arm)
    return {name: summary[name] for name in ("wall_s", "peak_rss_mb")}


def train_peer(args: argparse.Namespace) -> None:
    """Train with TRL in this process; imports are not timed, as they are not for us."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    torch.set_num_threads(args.threads)
    ours, out = TrainConfig(), args.out / f"seed-{args.seeds[0]}"
    rows = read_examples(args.out / "rows.jsonl")
    started = time.monotonic()
    folder = Path(args.base_model)
    tokenizer = modelfiles.load_tokenizer(folder)
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([prepared(tokenizer, row) for row in rows]),
        peft_config=peft.LoraConfig(
            r=ours.rank, lora_alpha=ours.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=trl.SFTConfig(
            output_dir=str(out / f"{args.arm}-state"),
            num_train_epochs=args.epochs,
            learning_rate=ours.lr,
            completion_only_loss=True,
            seed=args.seeds[0],
            use_cpu=True,
            bf16=False,  # it raises on this kind of processor
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **packed(args.arm, ours),
        ),
    )
    trainer.train()
    trainer.save_model(str(out / args.arm))
    wall_s = time.monotonic() - started
    print("\n" + json.dumps({"wall_s": wall_s, "peak_rss_mb": peak_rss_mb()}))


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


def write_suites(out: Path, rows: list[Example], facts: list[dict[str, Any]]) -> None:
    """What the adapters are judged by: other questions about the same facts, general answers."""
    known = {row.id.partition("/")[0] for row in rows}
    suites = {
        "held_out": [
            likelihood(f"{fact['id']}/h{i}", question, fact["answer"])
            for fact in facts
            if fact["id"] in known
            for i, question in enumerate(fact["held_out"])
        ],
        "general": [
            likelihood(f"p{i}", *pair) for i, pair in enumerate(load_general(PACKAGED_PROBE))
        ],
    }
    for name, suite in suites.items():
        write_suite(out, name, suite)


def losses(args: argparse.Namespace, seed: int) -> dict[str, Figures]:
    """Mean NLL by adapter and suite, all scored in one process."""
    adapters = {"base": None, **{arm: f"{arm}/adapter" for arm in OURS}}
    adapters |= {arm: arm for arm in PEERS}
    suites = {name: f"../{name}.jsonl" for name in SUITES}
    job = {**model(args), "adapters": adapters, "suites": suites}
    out = args.out / f"seed-{seed}"
    results = process(out, "evaluate", job, "scores")["results"]
    return {arm: {name: row[name]["nll"] for name in SUITES} for arm, row in results.items()}


def report(args: argparse.Namespace, num_rows: int, runs: list[dict[str, Figures]]) -> None:
    print(f"\n{'':21}{'wall s':>9}{'peak MB':>9}{'held-out NLL':>14}{'general NLL':>13}")
    middle = {arm: medians([run[arm] for run in runs]) for arm in runs[0]}
    for arm, row in middle.items():
        told = f"{row['wall_s']:9.1f}{row['peak_rss_mb']:9.0f}" if "wall_s" in row else " " * 18
        print(f"{arm:21}{told}{row['held_out']:14.3f}{row['general']:13.3f}")
    result = {
        "wall_vs_trl_default": wall_against("trl-default", runs, middle),
        "wall_vs_trl_bfd": wall_against("trl-bfd", runs, middle),
        "recipe_wall_over": {peer: ratio(runs, RECIPE, peer) for peer in PEERS},
        "held_out_loss": column(middle, "held_out"),
        "general_loss": column(middle, "general"),
        "wall_s": column(middle, "wall_s"),
        "peak_rss_mb": column(middle, "peak_rss_mb"),
        "runs": runs,
        "num_rows": num_rows,
        "epochs": args.epochs,
        "threads": args.threads,
        "seeds": args.seeds,
    }
    print("RESULT " + json.dumps(result))


def column(rows: dict[str, Figures], name: str) -> Figures:
    return {arm: round(row[name], 4) for arm, row in rows.items() if name in row}


def wall_against(
    peer: str, runs: list[dict[str, Figures]], middle: dict[str, Figures]
) -> float | None:
    """Our wall time over the peer's, of the fastest arm whose held-out loss is not above its."""
    as_good = [arm for arm in OURS if middle[arm]["held_out"] <= middle[peer]["held_out"]]
    if not as_good:
        return None
    fastest = min(as_good, key=lambda arm: middle[arm]["wall_s"])
    return ratio(runs, fastest, peer)


def ratio(runs: list[dict[str, Figures]], ours: str, peer: str) -> float:
    """Our wall time over the peer's, the median of the seeds."""
    return round(statistics.median(run[ours]["wall_s"] / run[peer]["wall_s"] for run in runs), 3)


def prepared(tokenizer: Any, row: Example) -> dict[str, Any]:
    """Token ids, the same for all arms: in a text "<|im_end|>" would forge a turn."""
    found = encode_example(tokenizer, row, TrainConfig().max_len)
    return {
        "input_ids": found.ids_T.tolist(),
        "completion_mask": found.label_mask_T.astype(int).tolist(),
    }


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    found.add_argument("--rows", type=int, default=64)
    found.add_argument("--epochs", type=int, default=3)
    found.add_argument("--threads", type=int, default=os.cpu_count())
    found.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="a run of all arms for each")
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
