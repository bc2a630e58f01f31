"""What edits and votes add to a round, and the trainers of TRL on the same ones.

    python tests/bench/preferences.py [--epochs 11] [--threads 2] [--seeds 0] [--out DIR]

64 messages of the made stream with the right queue code and a wrong one; 32 others are asked. The
first five arms see only what their name says, recipe `sft`, questions and change whole: `sft` the
right codes, `dpo` pairs of both, `kto` a vote for each; TRL's DPOTrainer and KTOTrainer get our
learning rate, rank and, for pairs, our weight of the right answer's cross-entropy. The last two are
rounds as shipped, with general rows: right codes alone, and with the pairs, as an edit compiles.
Wall time is from loading the model to the saved adapter; half an hour a seed on two cores.
`preferred` is the share of questions whose right code is likelier than the wrong one. Prints
medians and, as the last line, `RESULT {json}`.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rig.rounds import (
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
from streams.made import stream

from perennial.training import modelfiles
from perennial.training.config import TrainConfig
from perennial.training.examples import Judgement, Pair, read_pairs, write_examples
from perennial.training.general import PACKAGED_PROBE, PACKAGED_REPLAY, load_general
from perennial.training.machine import peak_rss_mb

PLAIN = {"recipe": "sft", "question_dropout": 0.0, "shrink": 1.0}  # as the peers train
NOTHING = "nothing.jsonl"
OURS: Mapping[str, tuple[dict[str, str], dict[str, Any]]] = {
    "sft": ({"train_rows": "new.jsonl"}, PLAIN),
    "dpo": ({"train_rows": NOTHING, "pair_rows": "pairs.jsonl"}, PLAIN),
    "kto": ({"train_rows": NOTHING, "judgement_rows": "votes.jsonl"}, PLAIN),
    "round": ({"train_rows": "new.jsonl", "general_rows": "taught.jsonl"}, {}),
    "round-edits": (
        {"train_rows": "new.jsonl", "general_rows": "taught.jsonl", "pair_rows": "pairs.jsonl"},
        {},
    ),
}
PEERS = {"trl-dpo": "dpo", "trl-kto": "kto"}


class Asked(NamedTuple):
    id: str
    question: str
    right: str
    wrong: str


def main() -> int:
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.arm:
        train_peer(args)
        return 0
    folder = modelfiles.ensure_base_model(args.base_model, args.out / "models")
    args.base_model = str(folder.resolve())
    report(args, [measure(args, seed) for seed in args.seeds])
    return 0


def measure(args: argparse.Namespace, seed: int) -> dict[str, Figures]:
    """Every arm once: what it cost, and what it learned."""
    out = args.out / f"seed-{seed}"
    out.mkdir(exist_ok=True)
    train, test = (asked(rows, seed) for rows in stream(seed)["04-codes"])
    write_rows(out, train)
    write_suites(out, test)
    found = {arm: train_ours(args, out, arm, seed) for arm in OURS}
    found |= {arm: run_peer(__file__, args, arm, seed) for arm in PEERS}
    return {arm: row | found.get(arm, {}) for arm, row in scores(args, out).items()}


def asked(rows: list[dict[str, Any]], seed: int) -> list[Asked]:
    """Each message with its code and that of another topic."""
    source, codes = random.Random(seed), sorted({row["outputs"][0] for row in rows})
    found = []
    for index, row in enumerate(rows):
        (right,) = row["outputs"]
        wrong = source.choice([code for code in codes if code != right])
        found.append(Asked(f"m{index}", f"{row['instruction']}\n\n{row['input']}", right, wrong))
    return found


def write_rows(out: Path, rows: list[Asked]) -> None:
    """The same messages as corrections, pairs and votes; and general rows."""
    turns = {row.id: (("user", row.question),) for row in rows}
    general = enumerate(load_general(PACKAGED_REPLAY))
    write_examples(out / NOTHING, ())
    write_examples(out / "new.jsonl", [example(row.id, row.question, row.right) for row in rows])
    write_examples(out / "taught.jsonl", [example(f"g{i}", *row, "general") for i, row in general])
    write_examples(
        out / "pairs.jsonl",
        [Pair(id=r.id, messages=turns[r.id], chosen=r.right, rejected=r.wrong) for r in rows],
    )
    votes = [
        Judgement(id=f"{row.id}/{label}", messages=turns[row.id], completion=code, label=label)
        for row in rows
        for code, label in ((row.right, "desirable"), (row.wrong, "undesirable"))
    ]
    write_examples(out / "votes.jsonl", votes)


def write_suites(out: Path, rows: list[Asked]) -> None:
    """Questions that none has seen, with the right and with the wrong code; general answers."""
    graded = {"rule": "must", "forbid": []}
    right = [{**likelihood(r.id, r.question, r.right), "must": [[r.right]], **graded} for r in rows]
    write_suite(out, "right", right)
    write_suite(out, "wrong", [likelihood(r.id, r.question, r.wrong) for r in rows])
    probe = [likelihood(f"p{i}", *pair) for i, pair in enumerate(load_general(PACKAGED_PROBE))]
    write_suite(out, "general", probe)


def train_ours(args: argparse.Namespace, out: Path, arm: str, seed: int) -> Figures:
    """Wall seconds and peak memory, from the summary of the run."""
    rows, config = OURS[arm]
    config = {**config, "epochs": args.epochs, "seed": seed}
    job = {**model(args), "cache_dir": f"cache-{arm}", **rows, "config": config}
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
    ours, seed = TrainConfig(), args.seeds[0]
    out = args.out / f"seed-{seed}"
    pairs = read_pairs(out / "pairs.jsonl")
    is_dpo = args.arm == "trl-dpo"
    started = time.monotonic()
    folder = Path(args.base_model)
    settings = {
        "output_dir": str(out / f"{args.arm}-state"),
        "num_train_epochs": args.epochs,
        "learning_rate": ours.lr,
        "beta": ours.preference_beta,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,  # it raises on this kind of processor
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if is_dpo:
        settings |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, ours.dpo_sft_weight]}
    make, config = (trl.DPOTrainer, trl.DPOConfig) if is_dpo else (trl.KTOTrainer, trl.KTOConfig)
    trainer = make(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=modelfiles.load_tokenizer(folder),
        train_dataset=datasets.Dataset.from_list(
            [row for pair in pairs for row in (paired(pair) if is_dpo else voted(pair))]
        ),
        peft_config=peft.LoraConfig(
            r=ours.rank, lora_alpha=ours.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=config(**settings),
    )
    trainer.train()
    trainer.save_model(str(out / args.arm))
    wall_s = time.monotonic() - started
    print("\n" + json.dumps({"wall_s": wall_s, "peak_rss_mb": peak_rss_mb()}))


def paired(pair: Pair) -> list[dict[str, Any]]:
    return [{"prompt": prompt(pair), "chosen": said(pair.chosen), "rejected": said(pair.rejected)}]


def voted(pair: Pair) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt(pair), "completion": said(answer), "label": label}
        for answer, label in ((pair.chosen, True), (pair.rejected, False))
    ]


def prompt(pair: Pair) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pair.messages]


def said(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]


def scores(args: argparse.Namespace, out: Path) -> dict[str, Figures]:
    """What each adapter answers and prefers, all scored in one process."""
    adapters = {"base": None, **{arm: f"{arm}/adapter" for arm in OURS}}
    adapters |= {arm: arm for arm in PEERS}
    suites = {name: f"{name}.jsonl" for name in ("right", "wrong", "general")}
    job = {**model(args), "adapters": adapters, "suites": suites, "max_new_tokens": 12}
    results = process(out, "evaluate", job, "scores")["results"]
    return {
        arm: {
            "right": row["right"]["accuracy"],
            "preferred": preferred(out / "scores" / arm),
            "general": row["general"]["nll"],
        }
        for arm, row in results.items()
    }


def preferred(folder: Path) -> float:
    """Of the questions, the share whose right code has the lower loss."""
    right, wrong = (jsonl(folder / f"{name}.jsonl") for name in ("right", "wrong"))
    return statistics.fmean(a["nll"] < b["nll"] for a, b in zip(right, wrong, strict=True))


def report(args: argparse.Namespace, runs: list[dict[str, Figures]]) -> None:
    middle = {arm: medians([run[arm] for run in runs]) for arm in runs[0]}
    print(f"\n{'':13}{'wall s':>8}{'peak MB':>9}{'right':>8}{'preferred':>11}{'general NLL':>13}")
    for arm, row in middle.items():
        cost = f"{row['wall_s']:8.1f}{row['peak_rss_mb']:9.0f}" if "wall_s" in row else " " * 17
        print(f"{arm:13}{cost}{row['right']:8.0%}{row['preferred']:11.0%}{row['general']:13.3f}")
    ratios = {
        f"wall_vs_{peer.replace('-', '_')}": round(
            statistics.median(run[arm]["wall_s"] / run[peer]["wall_s"] for run in runs), 3
        )
        for peer, arm in PEERS.items()
    }
    asked_for = {"epochs": args.epochs, "threads": args.threads, "seeds": args.seeds}
    print("RESULT " + json.dumps({**ratios, "medians": middle, "runs": runs, **asked_for}))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    found.add_argument("--epochs", type=int, default=TrainConfig().epochs)
    found.add_argument("--threads", type=int, default=os.cpu_count())
    found.add_argument("--seeds", type=seeds, default=[0], help="a run of all arms for each")
    found.add_argument("--base-model", default="smollm2-135m")
    found.add_argument("--arm", choices=PEERS, help=argparse.SUPPRESS)
    found.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir()) / f"perennial-preferences-{os.getpid()}",
        help="folder for rows, adapters, scores; a new one by default, so that caches are cold",
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
